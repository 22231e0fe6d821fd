"""Write, rename and check the checkpoint files of a run."""

import itertools
import json
import logging
import math
import os
import shutil
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


def write_checkpoint(folder: Path, content: dict[str, Any], keep_last: int | None) -> None:
    """Write a checkpoint atomically; then remove all checkpoints except the newest `keep_last`."""
    path = checkpoint_path(folder, content["step"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        raise UserError(f"cannot write the checkpoint {path}: {first_line(error)}") from error
    if keep_last is not None:
        for old in checkpoints_by_step(folder)[:-keep_last]:
            old.unlink(missing_ok=True)
    log.info("saved %s", path)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step_{step:08d}.pt"


def set_aside_later(folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps than `step`, from which a run resumes, and update the best one."""
    for path in checkpoints_by_step(folder):
        if (checkpoint_step(path.name) or 0) > step:
            log.warning("renamed %s to %s because the run resumes from an earlier step", path, _set_aside(path).name)
    record = folder / "best.json"
    best = json.loads(record.read_bytes()) if record.exists() else {"step": 0}
    if best["step"] > step:
        record.unlink()
        if (folder / BEST).exists():
            _set_aside(folder / BEST)
        for row in read_rows(folder.parent / "metrics.jsonl"):  # find the best of the remaining checkpoints
            if best["metric"] in row and row["step"] <= step and checkpoint_path(folder, row["step"]).exists():
                note_best(folder, row["step"], best["metric"], row)


def _set_aside(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.left{number or ''}") for number in itertools.count())
    return path.replace(next(name for name in names if not name.exists()))


def note_best(folder: Path, step: int, metric: str, metrics: dict[str, float]) -> None:
    """Save the checkpoint of a step as best.pt if its metric is the best so far."""
    record, value = folder / "best.json", metrics[metric]
    sign = -1 if "rank" in metric.rpartition("/")[2] else 1  # a lower rank is better
    before = json.loads(record.read_bytes()) if record.exists() else {}
    if value is None or math.isnan(value):
        return
    if before.get("metric") == metric and sign * value <= sign * before["value"]:
        return
    new = temporary_name(folder / BEST)
    new.unlink(missing_ok=True)
    try:
        os.link(checkpoint_path(folder, step), new)  # takes no space
    except OSError:
        shutil.copyfile(checkpoint_path(folder, step), new)
    new.replace(folder / BEST)
    write_atomic(record, json.dumps({"metric": metric, "value": value, "step": step}).encode())
    log.info("best %s so far: %.4f at step %d", metric, value, step)


def latest_undamaged(folder: Path, notes: list[str]) -> Path | None:
    """Return the newest undamaged checkpoint, or None; append a note about each damaged one to `notes`."""
    for path in reversed(checkpoints_by_step(folder)):
        if (fault := damage(path)) is None:
            return path
        notes.append(f"skipping {path}, which is damaged: {fault}")
    return None


def damage(path: Path) -> str | None:
    """Return the fault of a checkpoint file, or None. PyTorch itself does not verify the checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"the checksum of {broken} is wrong"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # PyTorch has its own zip parser
    except Exception as error:  # a damaged zip directory raises errors of any type
        return first_line(error)
    return None
