"""Checkpoints: whole or not there, loaded without running pickled code."""

import logging
import math
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from languagebind.config import UserError, at_least
from languagebind.distributed import world_size
from languagebind.hub.checkpoint import read_checkpoint

from .engines.base import Engine
from .engines.ema import Ema
from .rng import rng_state, set_rng_state

log = logging.getLogger(__name__)

# Options of model and inputs that leave the meaning of the weights alone.
MAY_CHANGE = ("grad_checkpointing", "grad_checkpointing_blocks", "patch_dropout", "lora_dropout", "fast_resize")

# Data options that leave the order of the samples alone.
SAME_SAMPLES = ("text_features", "max_bad_share", "positives")

# Bytes of a run's name: file systems take 255, with what is put before and after it.
MAX_NAME = 200


@dataclass(frozen=True)
class CheckpointConfig:
    """What is written, when, and what to go on from."""

    logs: Path = Path("logs")
    """folder that holds a folder for each run"""
    name: str | None = None
    """the run's name; by default made of the time and the main options"""
    save_every_n_steps: int = 1000
    """write a checkpoint each N steps, and at the end; 0: only at the end"""
    save_every_minutes: float = 0.0
    """write one after so many minutes without, too; 0: by steps alone"""
    keep_last: int | None = None
    """keep the newest N checkpoints, and the best; by default all"""
    keep_best: str | None = None
    """keep a copy of the checkpoint with the best of this metric, such as nyu_v2/top1, as checkpoints/best.pt"""
    resume: str | None = None
    """`latest` of this --name, or a checkpoint's path or URL"""

    def __post_init__(self):
        at_least(0, save_every_n_steps=self.save_every_n_steps, save_every_minutes=self.save_every_minutes)
        at_least(1, keep_last=self.keep_last)
        name = self.name
        if name is not None and (not name or "/" in name or name in (".", "..") or len(name.encode()) > MAX_NAME):
            raise ValueError(f"name becomes a folder in --logs, so it cannot be {name!r}")


@dataclass
class TrainState:
    """What a step changes, and all that a checkpoint has to hold to go on from there."""

    engine: Engine
    ema: Ema | None = None
    step: int = 0
    """updates done"""
    skipped: int = 0
    """samples left out so far by this rank"""
    drawn: dict[int, int] = field(default_factory=dict)
    """samples that each loader worker of this rank has taken from its shards in this epoch"""


def checkpoint_content(state: TrainState, config: dict, text_fingerprint: str) -> dict[str, Any]:
    """All of a checkpoint but what the ranks have of their own. Every rank has to ask."""
    content = {
        "model": state.engine.model_state(),
        "optimizer": state.engine.optimizer_state(),
        "scaler": state.engine.scaler.state_dict(),
        "step": state.step,
        "config": config,
        "text_fingerprint": text_fingerprint,
        "versions": {name: _version(name) for name in ("languagebind", "torch", "open_clip_torch", "transformers")},
    }
    if state.ema is not None:
        with state.ema.applied():  # cloned, as these tensors are the weights again right after
            averages = state.engine.model_state()
            content["ema"] = {name: averages[name].clone() for name in state.ema.averages}
        content["ema_steps"] = state.ema.steps
    return content


def read_resumable(path: Path | str, config: dict[str, Any], text_fingerprint: str) -> dict[str, Any]:
    """A checkpoint that a run with these options can go on from.

    Args:
        path: of a file, or a URL.
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
    _check_same(path, checkpoint["config"], config)
    return checkpoint


def load_weights(model: torch.nn.Module, checkpoint: dict[str, Any], path: Path | str) -> None:
    """Put a checkpoint's weights into a model, before an engine divides it.

    Raises:
        UserError: the model is another one.
    """
    own, saved = model.encoder_state(), checkpoint["model"]
    if own.keys() != saved.keys() or any(own[key].shape != value.shape for key, value in saved.items()):
        raise UserError(f"{path} holds another model than these options describe; its own are in its run's config.yaml")
    model.load_state_dict(saved, strict=False)  # the text tower is not in it


def restore(
    path: Path | str,
    checkpoint: dict[str, Any],
    state: TrainState,
    rank: int,
    config: dict[str, Any],
    shards_digest: str,
) -> None:
    """Put all but the weights into `state`. Where the options differ from the checkpoint's, the new ones hold."""
    before = checkpoint["config"]
    if before["optim"]["optimizer"] == config["optim"]["optimizer"]:
        state.engine.load_optimizer_state(checkpoint["optimizer"])
    elif rank == 0:
        log.warning("--optimizer changed since %s: its averages begin anew", path)
    state.engine.scaler.load_state_dict(checkpoint["scaler"])
    if state.ema is not None and "ema" in checkpoint:
        state.ema.load(checkpoint["ema"], checkpoint["ema_steps"])
    elif rank == 0 and "ema" in checkpoint:
        log.warning("%s holds a moving average of the weights, which ends here: there is no --ema-decay", path)
    elif rank == 0 and state.ema is not None:
        log.warning("%s holds no moving average of the weights: it begins here", path)
    state.step = checkpoint["step"]
    # The sum goes on with the first rank: there may be another number of ranks now.
    state.skipped = sum(own["skipped"] for own in checkpoint["ranks"]) if rank == 0 else 0
    differing = {name for name in before["data"] if before["data"][name] != config["data"].get(name)}
    changed = sorted(differing.difference(SAME_SAMPLES))
    changed += [] if checkpoint.get("shards", shards_digest) == shards_digest else ["what the shards hold"]
    changed += [] if before["seed"] == config["seed"] else ["seed"]
    changed += [] if before["optim"]["accum_freq"] == config["optim"]["accum_freq"] else ["accum_freq"]
    changed += [] if len(checkpoint["ranks"]) == world_size() else ["number of ranks"]
    if not changed:
        state.drawn = dict(checkpoint["ranks"][rank]["drawn"])
        set_rng_state(checkpoint["ranks"][rank]["rng"])
    elif rank == 0:
        log.warning(
            "%s changed since %s: this epoch begins anew, so some of its samples come twice and others not at all,"
            " and patches are dropped by other draws",
            ", ".join(changed), path,
        )  # fmt: skip


def check_progress(checkpoint: dict[str, Any], config: dict[str, Any], steps_per_epoch: int) -> str | None:
    """What another global batch makes of the steps that are done, which are counted in place of samples.

    Raises:
        UserError: they are as many as the run now has: it would end before all of its epochs are done.
    """
    before = _global_batch(checkpoint["config"], len(checkpoint["ranks"]))
    now, step, epochs = _global_batch(config, world_size()), checkpoint["step"], config["optim"]["epochs"]
    if before == now:
        return None
    counted, done = step / steps_per_epoch, step * before / (steps_per_epoch * now)
    message = (
        f"the global batch was {before} and is {now}: the {step} steps that are done, {done:.2f} epochs of samples,"
        f" count as {counted:.2f} of {epochs} epochs. --epochs {math.ceil(counted + max(0, epochs - done))} ends after"
        f" {epochs} epochs of samples"
    )
    if done < epochs <= counted:
        raise UserError(message)
    return message


def _global_batch(config: dict[str, Any], ranks: int) -> int:
    return config["data"]["batch_size"] * config["optim"]["accum_freq"] * ranks


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


def rank_state(state: TrainState) -> dict[str, Any]:
    """What is this rank's own: random generators, places in the shards, samples left out."""
    return {"rng": rng_state(), "drawn": dict(state.drawn), "skipped": state.skipped}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
