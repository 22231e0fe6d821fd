"""Checkpoints: whole or not there, loaded without running pickled code."""

import logging
import os
import random
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from languagebind.config import UserError
from languagebind.hub import read_checkpoint

log = logging.getLogger(__name__)

NAME = re.compile(r"step_(\d+)\.pt")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is written, when, and what to go on from."""

    logs: Path = Path("logs")
    """folder that holds a folder for each run"""
    name: str | None = None
    """the run's name; by default made of the time and the main options"""
    save_every_n_steps: int = 1000
    """write a checkpoint each N steps, and at the end; 0: only at the end"""
    resume: str | None = None
    """`latest` of this --name, or a checkpoint's path"""


@dataclass
class TrainState:
    """What a step changes, and all that a checkpoint has to hold to go on from there."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    """updates done"""
    skipped: int = 0
    """samples left out so far by this rank"""
    drawn: dict[int, int] = field(default_factory=dict)
    """samples that each loader worker of this rank has taken from its shards in this epoch"""


def save_checkpoint(path: Path, state: TrainState, ranks: list[dict], config: dict, text_fingerprint: str) -> None:
    """Write a checkpoint under a name of its own and then rename it: under `path` it is whole, or not there.

    Args:
        ranks: `rank_state` of every rank.
    """
    content = {
        "model": state.model.encoder_state(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "step": state.step,
        "ranks": ranks,
        "config": config,
        "text_fingerprint": text_fingerprint,
        "versions": {name: _version(name) for name in ("languagebind", "torch", "open_clip_torch", "transformers")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write the checkpoint {path}: {error.strerror}") from error
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # so that the new name, too, survives a power cut
    os.close(folder)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step; half-written ones have other names and are not seen."""
    found = [path for path in folder.glob("step_*.pt") if NAME.fullmatch(path.name)]
    return max(found, key=lambda path: int(NAME.fullmatch(path.name)[1]), default=None)


def restore(path: Path, state: TrainState, rank: int) -> dict[str, Any]:
    """Put a checkpoint into `state`; returns the checkpoint.

    Raises:
        UserError: it is damaged or belongs to another model.
    """
    checkpoint = read_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds a model but no optimizer state: it cannot be resumed from")
    own = state.model.encoder_state()
    if own.keys() != checkpoint["model"].keys() or any(own[k].shape != v.shape for k, v in checkpoint["model"].items()):
        raise UserError(
            f"{path} holds another model than these options describe (its options are in {path.parent.parent})"
        )
    state.model.load_state_dict(checkpoint["model"], strict=False)  # the text tower is not in it
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.scaler.load_state_dict(checkpoint["scaler"])
    state.step = checkpoint["step"]
    # The sum goes on with the first rank: there may be another number of ranks now.
    state.skipped = sum(saved["skipped"] for saved in checkpoint["ranks"]) if rank == 0 else 0
    if rank < len(checkpoint["ranks"]):
        saved = checkpoint["ranks"][rank]
        state.drawn = dict(saved["drawn"])
        set_rng_state(saved["rng"])
    return checkpoint


def rank_state(state: TrainState) -> dict[str, Any]:
    """What is this rank's own: random generators, places in the shards, samples left out."""
    return {"rng": rng_state(), "drawn": dict(state.drawn), "skipped": state.skipped}


def rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
