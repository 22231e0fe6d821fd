"""What a run leaves to read: console and out.log, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogConfig:
    """Logging."""

    log_every_n_steps: int = 100
    """steps between two lines"""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """beside metrics.jsonl, which is always written"""
    wandb_project_name: str = "languagebind"


class Logger:
    """Writes metrics on the main rank; elsewhere it does nothing.

    Args:
        folder: the run's folder; None on the other ranks.
        config: the run's resolved options, for Weights & Biases.
    """

    def __init__(self, folder: Path | None, options: LogConfig, config: dict[str, Any]):
        self.folder, self.tensorboard, self.wandb = folder, None, None
        if folder is None:
            return
        if "tensorboard" in options.report_to:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(folder / "tensorboard")
        if "wandb" in options.report_to:
            import wandb

            # The run's name is its id, so that a resumed run goes on in the same charts.
            self.wandb = wandb.init(
                project=options.wandb_project_name, name=folder.name, id=folder.name, resume="allow",
                dir=folder, config=config,
            )  # fmt: skip
            self.wandb.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl and send the numbers on."""
        if self.folder is None:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log({"step": step, **numbers})

    def skipped(self, step: int, samples: list[tuple[str, str, str]]) -> None:
        """Append the samples that were left out to skipped.jsonl."""
        if self.folder is None or not samples:
            return
        with open(self.folder / "skipped.jsonl", "a") as file:
            for shard, key, reason in samples:
                file.write(json.dumps({"step": step, "shard": shard, "key": key, "reason": reason}) + "\n")

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def setup_logging(folder: Path | None) -> None:
    """Lines on the console and in `folder`/out.log; warnings alone where there is no folder (other ranks)."""
    root = logging.getLogger()
    root.setLevel(logging.INFO if folder else logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if folder:
        handlers.append(logging.FileHandler(folder / "out.log"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", "%Y-%m-%d,%H:%M:%S"))
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.handlers = handlers
    logging.getLogger("httpx").setLevel(logging.WARNING)
