"""What a run leaves to read: console and out.log, metrics.jsonl, TensorBoard, Weights & Biases."""

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
    """Logging."""

    log_every_n_steps: int = 100
    """steps between two lines"""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """beside metrics.jsonl, which is always written"""
    wandb_project_name: str = "languagebind"

    def __post_init__(self):
        at_least(1, log_every_n_steps=self.log_every_n_steps)


class Logger:
    """Writes metrics on the main rank; elsewhere it does nothing. What a resumed run does again, it replaces.

    Args:
        folder: the run's folder; None on the other ranks.
        config: the run's resolved options, for Weights & Biases.
        first_step: rows of later steps are of a run that was stopped, and are taken out.
    """

    def __init__(self, folder: Path | None, options: LogConfig, config: dict[str, Any], first_step: int = 0):
        self.folder, self.tensorboard, self.wandb = folder, None, None
        if folder is None:
            return
        for name in ("metrics.jsonl", "skipped.jsonl"):
            _keep_until(folder / name, first_step)
        if "tensorboard" in options.report_to:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)
        if "wandb" in options.report_to:
            import wandb

            # Kept in the folder, so that a resumed run goes on in the same charts.
            kept = folder / "wandb_id"
            if not kept.exists():
                kept.write_text(secrets.token_hex(4))
            about = {"project": options.wandb_project_name, "name": folder.name, "id": kept.read_text(), "dir": folder}
            try:
                self.wandb = wandb.init(**about, config=config, resume="allow")
            except (wandb.errors.CommError, wandb.errors.UsageError) as error:
                log.warning(
                    "cannot reach Weights & Biases (%s): its log stays in %s, upload it with wandb sync",
                    first_line(error), folder / "wandb",
                )  # fmt: skip
                wandb.teardown()  # or the name of the run would still be taken
                self.wandb = wandb.init(**about, config=config, mode="offline")
            self.wandb.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one object to metrics.jsonl and send the numbers on."""
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
        """Whether metrics.jsonl has an evaluation of each of these sets at a step; True on the other ranks."""
        if self.folder is None:
            return True
        rows = read_rows(self.folder / "metrics.jsonl")
        found = [name for row in rows if row["step"] == step for name in row]
        return all(any(name.startswith(f"{dataset}/") for name in found) for dataset in datasets)

    def skipped(self, step: int, samples: list[tuple[str, str, str]]) -> None:
        """Append the samples that were left out to skipped.jsonl."""
        if self.folder is None or not samples:
            return
        rows = [{"step": step, "shard": shard, "key": key, "reason": reason} for shard, key, reason in samples]
        _append(self.folder / "skipped.jsonl", rows)

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that a run wrote; empty where there is none.

    Lines that cannot be read are left out: a kill cuts off the last one, and a power cut may leave anything.
    """
    rows = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            log.warning("%s: a line that cannot be read is left out", path)
    return rows


def _keep_until(path: Path, step: int) -> None:
    """Take out what a run that was stopped wrote after a step, and what cannot be read."""
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def log_to_file(error: Exception) -> None:
    """What ended the run, in its out.log; the console has it from `run`."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, str(error), (), None))


def setup_logging(folder: Path | None) -> None:
    """Lines on the console and in `folder`/out.log; warnings alone where there is no folder (other ranks)."""
    root = logging.getLogger()
    root.setLevel(logging.INFO if folder else logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if folder:
        handlers.append(logging.FileHandler(folder / "out.log"))
    for handler in handlers:
        # open_clip and others write what they do to the root logger itself.
        handler.addFilter(lambda record: record.name != "root" or record.levelno >= logging.WARNING)
        handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", "%Y-%m-%d,%H:%M:%S"))
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.handlers = handlers
    for chatty in ("httpx", "aiobotocore", "botocore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
