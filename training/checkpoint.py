"""Checkpoints: whole or not there, loaded without running pickled code."""

import logging
import random
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from languagebind.config import UserError, at_least, first_line
from languagebind.distributed import world_size
from languagebind.files import atomic_file
from languagebind.hub import read_checkpoint

log = logging.getLogger(__name__)

# Options of model and inputs that leave the meaning of the weights alone.
MAY_CHANGE = ("grad_checkpointing", "patch_dropout", "lora_dropout")

# Data options that leave the order of the samples alone.
SAME_SAMPLES = ("text_features", "max_bad_share")


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
    """`latest` of this --name, or a checkpoint's path or URL"""

    def __post_init__(self):
        at_least(0, save_every_n_steps=self.save_every_n_steps)
        if self.name is not None and (not self.name or "/" in self.name or self.name in (".", "..")):
            raise ValueError(f"name becomes a folder in --logs, so it cannot be {self.name!r}")


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
    """Write a checkpoint: under `path` it is whole, or not there.

    Args:
        ranks: `rank_state` of every rank.

    Raises:
        UserError: it cannot be written.
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter when the disk is full
        raise UserError(f"cannot write the checkpoint {path}: {first_line(error)}") from error


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def restore(path: Path | str, state: TrainState, rank: int, config: dict[str, Any], text_fingerprint: str) -> None:
    """Put a checkpoint into `state`. Where the options differ from the checkpoint's, the new ones hold.

    Args:
        config: the resolved options of this run.
        text_fingerprint: of this run's text tower.

    Raises:
        UserError: it is damaged, or belongs to another model, text tower or precision.
    """
    checkpoint = read_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds a model but no optimizer state: it cannot be resumed from")
    if checkpoint["text_fingerprint"] != text_fingerprint:
        raise UserError(f"{path} was trained with another text tower than --text-tower is now")
    before = checkpoint["config"]
    _check_same(path, before, config)
    own, saved = state.model.encoder_state(), checkpoint["model"]
    if own.keys() != saved.keys() or any(own[key].shape != value.shape for key, value in saved.items()):
        raise UserError(f"{path} holds another model than these options describe; its own are in its run's config.yaml")
    state.model.load_state_dict(saved, strict=False)  # the text tower is not in it
    _restore_optimizer(state.optimizer, checkpoint["optimizer"])
    state.scaler.load_state_dict(checkpoint["scaler"])
    state.step = checkpoint["step"]
    # The sum goes on with the first rank: there may be another number of ranks now.
    state.skipped = sum(own["skipped"] for own in checkpoint["ranks"]) if rank == 0 else 0
    differing = {name for name in before["data"] if before["data"][name] != config["data"].get(name)}
    changed = sorted(differing.difference(SAME_SAMPLES))
    changed += [] if before["seed"] == config["seed"] else ["seed"]
    changed += [] if len(checkpoint["ranks"]) == world_size() else ["number of ranks"]
    if changed:
        log.warning(
            "%s changed since %s: this epoch begins anew, so some of its samples come twice and others not at all",
            ", ".join(changed), path,
        )  # fmt: skip
    else:
        state.drawn = dict(checkpoint["ranks"][rank]["drawn"])
        set_rng_state(checkpoint["ranks"][rank]["rng"])


def _check_same(path: Path | str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """What would make the weights or the optimizer mean something else cannot change."""
    pairs = {"modality": (before["modality"], now["modality"])}
    pairs["precision"] = (before["optim"]["precision"], now["optim"]["precision"])
    for old, new in (
        (before["inputs"], now["inputs"]),
        (before["model"]["encoder"], now["model"]["encoder"]),
        (before["model"]["tuning"], now["model"]["tuning"]),
    ):
        pairs |= {name: (old.get(name), new.get(name)) for name in old.keys() | new.keys()}
    for name, (old, new) in sorted(pairs.items()):
        if old != new and name not in MAY_CHANGE:
            raise UserError(f"{path} was trained with --{name.replace('_', '-')} {old}, not {new}: go on with the same")


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """The averages of the checkpoint, under the learning rates and decay of this run."""
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


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
