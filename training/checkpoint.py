"""Collect the content of a checkpoint, and resume from it. Loading never runs pickled code."""

import logging
import math
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from languagebind import __version__
from languagebind.config import UserError, at_least, to_dict
from languagebind.distributed import gather_objects, world_size
from languagebind.hub.checkpoint import options_of
from languagebind.modalities import LIMITS, Modality, with_options
from languagebind.partner import Partner

from .engines.base import Engine
from .engines.ema import Ema
from .rng import rng_state

log = logging.getLogger(__name__)

# Options of the model and its inputs that may change on resume, because the weights keep their meaning.
MAY_CHANGE = ("grad_checkpointing", "grad_checkpointing_blocks", "patch_dropout", "lora_dropout", "fast_resize",
              *LIMITS)  # fmt: skip

# Packages whose versions are recorded, because they may change the output of the text tower.
PACKAGES = ("torch", "open_clip_torch", "transformers")

# Data options that do not affect the order of the samples.
SAME_SAMPLES = ("text_features", "max_bad_share", "positives", "negatives")


@dataclass(frozen=True)
class CheckpointConfig:
    """Options for saving, keeping and resuming checkpoints."""

    logs: Path = Path("logs")
    """parent folder of the runs; each run gets a subfolder"""
    name: str | None = None
    """name of the run; by default the time, the modality and the tuning"""
    save_every_n_steps: int = 1000
    """save a checkpoint every N steps and at the end; 0: save only at the end"""
    save_every_minutes: float = 0.0
    """also save every N minutes; 0: never"""
    keep_last: int | None = None
    """number of newest checkpoints to keep, besides the best one; by default all"""
    keep_best: str | None = None
    """metric, e.g. nyu_v2/top1, whose best checkpoint is kept as checkpoints/best.pt"""
    resume: str | None = None
    """path or URL of the checkpoint to resume from, or `latest` for the last one of the run --name"""

    def __post_init__(self):
        at_least(0, save_every_n_steps=self.save_every_n_steps, save_every_minutes=self.save_every_minutes)
        at_least(1, keep_last=self.keep_last)
        if self.name is not None and (not self.name or "/" in self.name or self.name in (".", "..")):
            raise UserError(f"--name {self.name!r} cannot be used as a folder name: use another --name")


@dataclass
class TrainState:
    """What the steps of a run need and change, and what its checkpoint records."""

    engine: Engine
    steps_per_epoch: int
    text_fingerprint: str  # hash of the text tower
    shards_digest: str
    ema: Ema | None = None
    partner: Partner | None = None
    former: dict[str, Any] | None = None  # the partner in the checkpoint that the run resumed from
    step: int = 0  # number of optimizer steps taken
    skipped: int = 0  # number of samples that this rank has skipped
    drawn: dict[int, int] = field(default_factory=dict)  # samples that each of this rank's workers has drawn this epoch
    lengths: dict[int, dict[int, int]] | None = field(default_factory=dict)  # see `Plan`
    rng: dict[str, Any] = field(default_factory=rng_state)  # random numbers of the next step


def checkpoint_content(state: TrainState, config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint. All ranks must call this function."""
    partner = state.partner and vars(state.partner.store) | {"weight": state.partner.weight}
    content = {
        "model": state.engine.model_state(),
        "optimizer": state.engine.optimizer_state(),
        "scaler": state.engine.scaler.state_dict(),
        "step": state.step,
        "config": config,
        "text_fingerprint": state.text_fingerprint,
        "partner": partner if partner and partner["weight"] else state.former or partner,
        "shards": state.shards_digest,
        "ranks": gather_objects({name: getattr(state, name) for name in ("rng", "drawn", "lengths", "skipped")}),
        "versions": {"languagebind": __version__} | {name: version(name) for name in PACKAGES},
    }
    if state.ema is not None:
        with state.ema.applied():  # cloned: after this block the tensors hold the weights again
            averages = state.engine.model_state()
            content["ema"] = {name: averages[name].clone() for name in state.ema.averages}
        content["ema_steps"] = state.ema.steps
    return content


def check_resumable(checkpoint: dict[str, Any], path: Path | str, config: dict[str, Any], fingerprint: str) -> None:
    """Raise a `UserError` unless a run with these options can resume from a checkpoint, which `path` names."""
    if "optimizer" not in checkpoint:
        raise UserError(f"cannot resume from {path}: the checkpoint has no optimizer state")
    if checkpoint["text_fingerprint"] != fingerprint:
        raise UserError(f"the text tower of {path} differs from --text-tower: use the same text tower")
    model, inputs = options_of(checkpoint, path)  # with the defaults of options that are newer than the checkpoint
    before = _fixed_options(checkpoint["config"] | {"model": to_dict(model), "inputs": to_dict(inputs)})
    now = _fixed_options(config)
    for name, old in before.items():
        if old != (new := now.get(name)):
            raise UserError(f"{path} was trained with --{name.replace('_', '-')} {old}, not {new}: keep the old value")


def keep_resizing(modality: Modality, checkpoint: dict[str, Any]) -> Modality:
    """Return the modality with the `fast_resize` of a checkpoint: its run may have begun under another default."""
    before = checkpoint["config"]["inputs"].get("fast_resize", False)
    if getattr(modality, "fast_resize", before) != before:
        log.info("the run continues %s --fast-resize, as it began", "with" if before else "without")
    return with_options(modality, {"fast_resize": before})


def _fixed_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options that must not change on resume."""
    options = {"modality": config["modality"], "precision": config["optim"]["precision"], **config["inputs"]}
    options |= config["model"]["encoder"] | config["model"]["tuning"]
    return {name: value for name, value in options.items() if name not in MAY_CHANGE}


def _sample_order(config: dict[str, Any], shards_digest: str, ranks: int) -> dict[str, Any]:
    """Return the options and facts that determine the order of the samples."""
    options = {name: value for name, value in config["data"].items() if name not in SAME_SAMPLES}
    options |= {"seed": config["seed"], "accum_freq": config["optim"]["accum_freq"]}
    return options | {"what the shards hold": shards_digest, "number of ranks": ranks}


def restore(path: Path | str, checkpoint: dict[str, Any], state: TrainState, config: dict[str, Any]) -> None:
    """Restore everything except the weights. Options keep their new values where they differ from the checkpoint."""
    before, rank = checkpoint["config"], state.engine.process.rank
    warn = log.warning if rank == 0 else log.debug
    known = checkpoint.get("partner")
    if known and state.partner and known["fingerprint"] != state.partner.store.fingerprint:
        raise UserError(f"the partner of {path} differs from --anchor: use the same partner, or none")
    if note := _check_progress(checkpoint, config, state.steps_per_epoch):
        warn(note)
    if before["optim"]["optimizer"] == config["optim"]["optimizer"]:
        state.engine.load_optimizer_state(checkpoint["optimizer"])
    else:
        warn("--optimizer changed since %s: the optimizer starts without state", path)
    state.engine.scaler.load_state_dict(checkpoint["scaler"])
    if state.ema is not None and "ema" in checkpoint:
        state.ema.load(checkpoint["ema"], checkpoint["ema_steps"])
    elif "ema" in checkpoint:
        warn("%s has a moving average of the weights, which is dropped: pass --ema-decay to keep it", path)
    elif state.ema is not None:
        warn("%s has no moving average of the weights: the average starts now", path)
    state.step, state.former = checkpoint["step"], checkpoint.get("partner")
    # Rank 0 takes the total, because the number of ranks may have changed.
    state.skipped = sum(own["skipped"] for own in checkpoint["ranks"]) if rank == 0 else 0
    order = _sample_order(before, checkpoint.get("shards", state.shards_digest), len(checkpoint["ranks"]))
    now = _sample_order(config, state.shards_digest, world_size())
    if changed := [name for name in order if order[name] != now.get(name)]:
        what = ", ".join(changed)
        warn("%s changed since %s: the epoch restarts, so some samples come twice and others not at all", what, path)
        return
    state.drawn = dict(checkpoint["ranks"][rank]["drawn"])
    state.lengths = checkpoint["ranks"][rank].get("lengths")
    if state.lengths is None and state.drawn:
        warn(
            "%s is of an earlier version: the samples that this epoch has used are read once more, to pass over them",
            path,
        )
    state.rng = checkpoint["ranks"][rank]["rng"]


def _check_progress(checkpoint: dict[str, Any], config: dict[str, Any], steps_per_epoch: int) -> str | None:
    """Return a warning if the global batch size changed, because progress is counted in steps, not in samples."""
    before = _global_batch(checkpoint["config"], len(checkpoint["ranks"]))
    now, step, epochs = _global_batch(config, world_size()), checkpoint["step"], config["optim"]["epochs"]
    if before == now:
        return None
    counted, done = step / steps_per_epoch, step * before / (steps_per_epoch * now)
    used = f"{step} steps have used {done:.2f} epochs of samples, but count as {counted:.2f} of {epochs} epochs"
    advice = f"To use {epochs} epochs of samples, pass --epochs {math.ceil(counted + max(0, epochs - done))}"
    message = f"the global batch size changed from {before} to {now}: {used}. {advice}"
    if done < epochs <= counted:
        raise UserError(message)
    return message


def _global_batch(config: dict[str, Any], ranks: int) -> int:
    return config["data"]["batch_size"] * config["optim"]["accum_freq"] * ranks
