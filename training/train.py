"""The step loop."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from languagebind.config import UserError
from languagebind.distributed import Precision, Process, autocast, fail_together, gather_objects, mean_over_ranks
from languagebind.loss import contrastive_loss, sigmoid_loss
from languagebind.model import DualEncoder

from .optim import set_lr
from .rng import rng_state, set_rng_state

if TYPE_CHECKING:  # a step needs PyTorch alone: none of what reads data or writes logs
    from .checkpoint import TrainState
    from .engines.base import Engine
    from .logger import Logger
    from .stream import Batch, Skipped

log = logging.getLogger(__name__)

MAX_LOG_SCALE = math.log(100)  # as in CLIP
# Below this many samples a share of bad ones says little.
BUDGET_FROM = 100


@dataclass(frozen=True)
class StepOptions:
    """What a step needs beside state and batch."""

    schedule: Callable[[int], float]
    precision: Precision
    accum_freq: int
    loss: Literal["clip", "siglip"]
    steps_per_epoch: int
    total_steps: int
    log_every_n_steps: int
    max_bad_share: float


def train(
    state: TrainState, batches: Iterator[Batch], options: StepOptions, process: Process, logger: Logger
) -> Iterator[int]:
    """Take the steps; yields the number of steps done after each, for what happens between them.

    Raises:
        UserError: the loss or a gradient is not finite, or the data cannot be used.
    """
    meter = Meter(options, process, logger)
    state.engine.side.train()
    for micro_batches in _together(batches, options.accum_freq, meter, process.device):
        set_lr(state.engine.optimizers, options.schedule(state.step))
        loss = train_step(state, micro_batches, options, process.device)
        state.step += 1
        for batch in micro_batches:
            state.skipped += len(batch.skipped)
            state.drawn = {**state.drawn, batch.worker: batch.drawn}
        if state.step % options.steps_per_epoch == 0:
            state.drawn = {}  # the workers begin the next epoch
        meter.update(state, micro_batches, loss)
        yield state.step
        meter.resume()


def train_step(state: TrainState, batches: list[Batch], options: StepOptions, device: torch.device) -> Tensor:
    """One update, of one batch or of several as if they were one; the loss, mean over ranks.

    Raises:
        UserError: the loss or a gradient is not finite.
    """
    engine = state.engine
    targets = _targets(engine.model, batches, options.precision, device)

    def score(features: Tensor) -> Tensor:
        """The loss, mean over ranks; leaves gradients in the features and in the logit scale."""
        loss = _loss(engine.model, features, *targets, options.loss)
        mean_loss = mean_over_ranks(loss.detach())
        _check_finite(mean_loss, loss, "loss", state.step, batches)
        engine.scaler.scale(loss).backward()
        return mean_loss

    if len(batches) == 1:
        with engine.accumulate(last=True):
            features = engine.forward(_inputs(batches[0], device))
            leaf = features.detach().requires_grad_()
            mean_loss = score(leaf)
            engine.backward((features * leaf.grad).sum())
    else:
        mean_loss = _accumulate(engine, batches, score, device)
    stepped = engine.update(lambda norm: _check_finite(norm, norm, "gradient", state.step, batches))
    if engine.scaler.is_enabled() and engine.scaler.get_scale() < 1:
        raise UserError(f"float16 gradients overflow at step {state.step} at any scale: use --precision amp_bf16")
    with torch.no_grad():
        engine.model.logit_scale.clamp_(0, MAX_LOG_SCALE)
    if stepped and state.ema is not None:
        state.ema.update()
    return mean_loss


def _accumulate(
    engine: Engine, batches: list[Batch], score: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """Features of all batches first, without their graphs; then each batch again, with the gradient of its features.

    Patches are dropped alike both times. (Gao et al. 2021, arXiv 2101.06983.)
    """
    features, generators = [], []
    with torch.no_grad():
        for batch in batches:
            generators.append(rng_state())
            features.append(engine.forward(_inputs(batch, device)))
    leaf = torch.cat(features).requires_grad_()
    mean_loss = score(leaf)
    grads = leaf.grad.split([len(x) for x in features])
    for number, (batch, grad, generator) in enumerate(zip(batches, grads, generators, strict=True)):
        set_rng_state(generator)
        with engine.accumulate(last=number == len(batches) - 1):
            engine.backward((engine.forward(_inputs(batch, device)) * grad).sum())
    return mean_loss


def _inputs(batch: Batch, device: torch.device) -> Tensor:
    return batch.inputs.to(device, non_blocking=True)  # (B, C, T, H, W)


@torch.no_grad()
def _targets(
    model: DualEncoder, batches: list[Batch], precision: Precision, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Unit-norm features of the captions (B, D), and which samples match (B,); each caption is encoded once a batch."""
    features = []
    for batch in batches:
        text = {key: value.to(device, non_blocking=True) for key, value in batch.text.items()}
        if "features" in text:
            features.append(F.normalize(text["features"].float(), dim=-1))
            continue
        which = text.pop("caption")
        with autocast(device, precision):
            features.append(model.encode_text(text)[which])
    groups = [batch.groups for batch in batches if batch.groups is not None]
    return torch.cat(features), torch.cat(groups).to(device, non_blocking=True) if groups else None


def _loss(model: DualEncoder, features: Tensor, text_features: Tensor, groups: Tensor | None, kind: str) -> Tensor:
    scale = model.logit_scale.exp()
    if kind == "siglip":
        return sigmoid_loss(features, text_features, scale, model.logit_bias, groups)
    return contrastive_loss(features, text_features, scale, groups)


class Meter:
    """Collects what happened between two log lines."""

    def __init__(self, options: StepOptions, process: Process, logger: Logger):
        self.options, self.process, self.logger = options, process, logger
        self.loss = 0.0  # running mean, for the console
        self.used, self.bad = 0, 0  # samples of all ranks
        self.reset()

    def reset(self) -> None:
        self.started = time.perf_counter()
        self.waited, self.paused, self.samples, self.steps = 0.0, 0.0, 0, 0
        self.skipped: list[Skipped] = []

    def got_batch(self, since: float) -> None:
        self.waited += time.perf_counter() - since

    def update(self, state: TrainState, batches: list[Batch], loss: Tensor) -> None:
        self.paused_at = time.perf_counter()
        self.steps += 1
        for batch in batches:
            self.samples += len(batch.keys) * self.process.world_size
            self.skipped += batch.skipped
        last = state.step == self.options.total_steps
        if state.step % self.options.log_every_n_steps == 0 or last or state.step == 1:
            self.report(state, loss.item())

    def resume(self) -> None:
        """Evaluation and checkpoints between steps do not count as training time."""
        self.paused += time.perf_counter() - max(self.paused_at, self.started)

    def report(self, state: TrainState, loss: float) -> None:
        ranks = gather_objects((self.skipped, state.skipped))
        skipped, total = [sample for samples, _ in ranks for sample in samples], sum(count for _, count in ranks)
        self.logger.skipped(state.step, skipped)
        if skipped and self.process.is_main:
            common = Counter((sample.shard, sample.reason) for sample in skipped).most_common(3)
            lines = "; ".join(f"{number} of {shard}: {reason}" for (shard, reason), number in common)
            log.warning("left out %d samples since the last line (%d in all): %s", len(skipped), total, lines)
        seconds = time.perf_counter() - self.started - self.paused
        self.loss = loss if not self.loss else 0.9 * self.loss + 0.1 * loss
        values = {
            "train/loss": loss,
            "train/lr": state.engine.optimizers[0].param_groups[0]["lr"],
            "train/logit_scale": state.engine.model.logit_scale.exp().item(),
            **_state_figures(state.engine),
            "train/samples_per_second": self.samples / seconds,
            "train/batch_time": seconds / self.steps,
            "train/data_time": self.waited / self.steps,
            "train/data_wait": self.waited / seconds,
            "train/skipped": total,
            "train/epoch": state.step / self.options.steps_per_epoch,
        }
        log.info(self.line(state.step, values))
        self.logger.metrics(state.step, values)
        self.used += self.samples
        self.bad += len(skipped)
        if self.used + self.bad >= BUDGET_FROM and self.bad > self.options.max_bad_share * (self.used + self.bad):
            raise UserError(
                f"{self.bad} of {self.used + self.bad} samples cannot be used, more than --max-bad-share"
                f" {self.options.max_bad_share:.0%}; skipped.jsonl of the run has each with its reason"
            )
        self.reset()

    def line(self, step: int, values: dict[str, float]) -> str:
        """OpenCLIP's line, with the share of time that the step waited for data and the time left."""
        per_epoch, batch = self.options.steps_per_epoch, self.samples // self.steps
        epoch, in_epoch = divmod(step - 1, per_epoch)
        left = (self.options.total_steps - step) * values["train/batch_time"]
        rate = values["train/samples_per_second"]
        return (
            f"Train Epoch: {epoch} [{(in_epoch + 1) * batch}/{per_epoch * batch} ({(in_epoch + 1) / per_epoch:.0%})]"
            f" Data (t): {values['train/data_time']:.3f}"
            f" Batch (t): {values['train/batch_time']:.3f}, {rate:.1f}/s, {rate / self.process.world_size:.1f}/s/gpu"
            f" LR: {values['train/lr']:.6f} Logit Scale: {values['train/logit_scale']:.3f}"
            f" Contrastive_loss: {values['train/loss']:.4f} ({self.loss:.4f})"
            f" | step {step} data wait {values['train/data_wait']:.0%} ETA {timedelta(seconds=round(left))}"
        )


def _state_figures(engine: Engine) -> dict[str, float]:
    """What is worth watching, where there is such a thing."""
    figures = {"train/grad_norm": engine.grad_norm.item()}
    if engine.model.logit_bias is not None:
        figures["train/logit_bias"] = engine.model.logit_bias.item()
    if engine.scaler.is_enabled():
        figures["train/loss_scale"] = engine.scaler.get_scale()
    if engine.process.device.type == "cuda":
        figures["train/max_memory_mib"] = torch.cuda.max_memory_allocated(engine.process.device) / 2**20
    return figures


def _together(batches: Iterator[Batch], accum_freq: int, meter: Meter, device: torch.device) -> Iterator[list[Batch]]:
    """The batches of each step, timed; when one rank's data fails, every rank stops and says why."""
    while True:
        begin, failure, found = time.perf_counter(), None, []
        try:
            found = list(islice(batches, accum_freq))
        except UserError as error:
            failure = str(error)
        meter.got_batch(begin)
        fail_together(failure, device)
        if not found:
            return
        yield found


def _check_finite(everywhere: Tensor, here: Tensor, what: str, step: int, batches: list[Batch]) -> None:
    if torch.isfinite(everywhere).item():
        return
    keys = ", ".join(key for batch in batches for key in batch.keys) if not torch.isfinite(here).item() else ""
    reports = [f"rank {rank}: {keys}" for rank, keys in enumerate(gather_objects(keys)) if keys]
    raise UserError(
        f"the {what} of step {step} is {everywhere.item()}: nothing of this step is kept. Samples: {'; '.join(reports)}"
    )
