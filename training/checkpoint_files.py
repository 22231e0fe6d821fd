"""The checkpoints of a run as files: written whole, counted, set aside, the best one kept, damaged ones found."""

import itertools
import json
import logging
import math
import os
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from languagebind.config import UserError, first_line
from languagebind.files import atomic_file, temporary_name, write_atomic
from languagebind.hub.checkpoint import checkpoint_step, checkpoints_by_step

from .logger import read_rows

log = logging.getLogger(__name__)

BEST = "best.pt"


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint: under `path` it is whole, or not there.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter when the disk is full
        raise UserError(f"cannot write the checkpoint {path}: {first_line(error)}") from error


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def remove_old(folder: Path, keep_last: int | None) -> None:
    """Remove all but the newest checkpoints."""
    if keep_last is not None:
        for path in checkpoints_by_step(folder)[:-keep_last]:
            path.unlink(missing_ok=True)


def set_aside_later(folder: Path, step: int) -> None:
    """Rename the checkpoints after a step that a run goes on from: they are damaged, or of a course it leaves."""
    for path in checkpoints_by_step(folder):
        if checkpoint_step(path.name) > step:
            aside = _left(path)
            path.replace(aside)
            log.warning("%s is of a later step than this run goes on from: it is %s now", path, aside.name)
    record = folder / "best.json"
    best = json.loads(record.read_bytes()) if record.exists() else {"step": 0}
    if best["step"] > step:
        record.unlink()
        if (folder / BEST).exists():
            (folder / BEST).replace(_left(folder / BEST))
        _best_before(folder, step, best["metric"])


def _best_before(folder: Path, step: int, metric: str) -> None:
    """Find the best checkpoint again among those that are left."""
    for row in read_rows(folder.parent / "metrics.jsonl"):
        if metric in row and row["step"] <= step and checkpoint_path(folder, row["step"]).exists():
            note_best(folder, row["step"], metric, row)


def _left(path: Path) -> Path:
    """A free name for a file that is set aside."""
    names = (path.with_name(f"{path.name}.left{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def note_best(folder: Path, step: int, metric: str, metrics: dict[str, float]) -> None:
    """Keep the checkpoint of this step as the best one, if it is.

    Raises:
        UserError: there is no such metric.
    """
    if metric not in metrics:
        raise UserError(f"--keep-best {metric} is none of the metrics: {', '.join(sorted(metrics))}")
    record, value = folder / "best.json", metrics[metric]
    sign = -1 if "rank" in metric.rpartition("/")[2] else 1  # a lower rank is better
    before = json.loads(record.read_bytes()) if record.exists() else {}
    if (
        value is None
        or math.isnan(value)
        or (before.get("metric") == metric and sign * value <= sign * before["value"])
    ):
        return
    new = temporary_name(folder / BEST)
    new.unlink(missing_ok=True)
    try:
        os.link(checkpoint_path(folder, step), new)  # no second copy on the disk
    except OSError:
        shutil.copyfile(checkpoint_path(folder, step), new)
    new.replace(folder / BEST)
    write_atomic(record, json.dumps({"metric": metric, "value": value, "step": step}).encode())
    log.info("best %s so far: %.4f at step %d", metric, value, step)


class Clock:
    """Tells when the minutes between two checkpoints are over."""

    def __init__(self, minutes: float):
        self.minutes, self.since = minutes, time.monotonic()

    def due(self) -> bool:
        return self.minutes > 0 and time.monotonic() - self.since >= 60 * self.minutes

    def restart(self) -> None:
        self.since = time.monotonic()


def latest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is not damaged, and what is wrong with those after it."""
    faults = []
    for path in reversed(checkpoints_by_step(folder)):
        if (fault := damage(path)) is None:
            return path, faults
        faults.append(f"{path} is damaged ({fault}): it is passed over")
    return None, faults


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file; None: all of its checksums hold. PyTorch does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"the checksum of {broken} is wrong"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads the directory its own way
    except Exception as error:  # a wrong bit in the directory can raise anything
        return first_line(error) or type(error).__name__
    return None
