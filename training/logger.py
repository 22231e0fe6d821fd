"""Write the logs of a run: console, out.log, metrics.jsonl, skipped.jsonl, TensorBoard, Weights & Biases."""

import json
import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from languagebind.config import UserError, at_least, first_line
from languagebind.files import write_atomic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogConfig:
    """Logging options."""

    log_every_n_steps: int = 100
    """steps between log lines"""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """services that get the metrics, besides metrics.jsonl"""
    wandb_project_name: str = "languagebind"
    """name of the Weights & Biases project"""

    def __post_init__(self):
        at_least(1, log_every_n_steps=self.log_every_n_steps)


class Logger:
    """Writes metrics on the main rank; does nothing on other ranks, whose `folder` is None.

    `config` has the run's options, for Weights & Biases. Rows of later steps than `first_step`, from which the run
    resumes, are removed. `label` starts the run's lines on the console, if several modalities train together.
    """

    def __init__(
        self, folder: Path | None, options: LogConfig, config: dict[str, Any], first_step: int = 0, label: str = ""
    ):
        self.folder, self.label, self.tensorboard, self.wandb = folder, label, None, None
        if folder is None:
            return
        for name in ("metrics.jsonl", "skipped.jsonl"):
            if (folder / name).exists():
                kept = [row for row in read_rows(folder / name) if row["step"] <= first_step]
                write_atomic(folder / name, "".join(json.dumps(row) + "\n" for row in kept).encode())
        if "tensorboard" in options.report_to:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)
        if "wandb" in options.report_to:
            self.wandb = _start_wandb(folder, options.wandb_project_name, config)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append a row to metrics.jsonl, and send the values to the services of --report-to."""
        if self.folder is None:
            return
        # JSON has no NaN.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        _append(self.folder / "metrics.jsonl", [{"step": step, **finite}])
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log({"step": step, **values})

    def evaluated(self, step: int, datasets: Sequence[str]) -> bool:
        """Return True if metrics.jsonl has an evaluation of each dataset at a step, or on other ranks."""
        if self.folder is None:
            return True
        found = [name for row in read_rows(self.folder / "metrics.jsonl") if row["step"] == step for name in row]
        return all(any(name.startswith(f"{dataset}/") for name in found) for dataset in datasets)

    def skipped(self, step: int, samples: list[tuple[str, str, str]]) -> None:
        """Append skipped samples, as (shard, key, reason), to skipped.jsonl."""
        if self.folder is not None and samples:
            rows = [{"step": step, "shard": shard, "key": key, "reason": reason} for shard, key, reason in samples]
            _append(self.folder / "skipped.jsonl", rows)

    def close(self) -> None:
        """Flush and close TensorBoard and Weights & Biases."""
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def _start_wandb(folder: Path, project: str, config: dict[str, Any]) -> Any:
    import wandb

    # The folder keeps the id, so that a resumed run continues the same charts.
    kept = folder / "wandb_id"
    if not kept.exists():
        kept.write_text(secrets.token_hex(4))
    name = folder.relative_to(config["checkpoint"]["logs"]).as_posix()
    options: dict[str, Any] = {"project": project, "name": name, "id": kept.read_text(), "dir": folder}
    try:
        run = wandb.init(**options, config=config, resume="allow", reinit="create_new")  # one for each modality
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        advice = "cannot reach Weights & Biases (%s): upload the log in %s later with wandb sync"
        log.warning(advice, first_line(error), folder / "wandb")
        wandb.teardown()  # or the run's name would still be taken
        wandb.setup(wandb.Settings(mode="offline"))  # for other modalities, too: their failure would end this run
        run = wandb.init(**options, config=config)
    run.define_metric("*", step_metric="step")
    return run


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's .jsonl file, if any. Unreadable lines, as a power cut may leave, give a warning."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            log.warning("%s: skipping an unreadable line", path)
    if wrong := [row for row in rows if not (isinstance(row, dict) and isinstance(row.get("step"), int))]:
        raise UserError(f"{path}: a row should have a whole number `step`: {wrong[0]}")
    return rows


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def log_to_file(error: Exception) -> None:
    """Write an error only to out.log, because the command line prints it on the console."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, str(error), (), None))


def setup_logging(folder: Path | None) -> None:
    """Log to the console and to out.log in `folder`; without a folder (other ranks), log only warnings."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if folder:
        handlers.append(logging.FileHandler(folder / "out.log"))
    for handler in handlers:
        # open_clip and others log progress to the root logger.
        handler.addFilter(lambda record: record.name != "root" or record.levelno >= logging.WARNING)
    level, pattern = logging.INFO if folder else logging.WARNING, "%(asctime)s | %(levelname)s | %(message)s"
    logging.basicConfig(level=level, format=pattern, datefmt="%Y-%m-%d,%H:%M:%S", handlers=handlers, force=True)
    for chatty in ("httpx", "aiobotocore", "botocore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
