"""The step loop."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from languagebind.config import UserError
from languagebind.distributed import Process, autocast, gather_objects, mean_over_ranks, on_every_rank
from languagebind.loss import contrastive_loss

from .optim import set_lr

if TYPE_CHECKING:  # a step needs PyTorch alone: none of what reads data or writes logs
    from .checkpoint import TrainState
    from .data import Batch, Skipped
    from .logger import Logger

log = logging.getLogger(__name__)

MAX_LOG_SCALE = math.log(100)  # as in CLIP
# Below this many samples a share of bad ones says little.
BUDGET_FROM = 100


@dataclass(frozen=True)
class StepOptions:
    """What a step needs beside state and batch."""

    schedule: Callable[[int], float]
    precision: str
    grad_clip_norm: float | None
    steps_per_epoch: int
    total_steps: int
    log_every_n_steps: int
    max_bad_share: float
    loss_chunk_size: int | None = None


def train(
    state: TrainState,
    forward: nn.Module,
    batches: Iterator[Batch],
    options: StepOptions,
    process: Process,
    logger: Logger,
) -> Iterator[int]:
    """Take the steps; yields the number of steps done after each, for what happens between them.

    Args:
        forward: the model, or DDP around it.

    Raises:
        UserError: the loss or a gradient is not finite, or the data cannot be used. The step was not taken.
    """
    meter = Meter(options, process, logger)
    forward.train()
    for batch in _together(batches, meter, process.device):
        set_lr(state.optimizer, options.schedule(state.step))
        loss = train_step(state, forward, batch, options, process.device)
        state.step += 1
        state.skipped += len(batch.skipped)
        state.drawn = {**state.drawn, batch.worker: batch.drawn}
        if state.step % options.steps_per_epoch == 0:
            state.drawn = {}  # the workers begin the next epoch
        meter.update(state, batch, loss)
        yield state.step
        meter.resume()


def train_step(
    state: TrainState, forward: nn.Module, batch: Batch, options: StepOptions, device: torch.device
) -> Tensor:
    """One update; the loss, mean over ranks."""
    inputs = batch.inputs.to(device, non_blocking=True)  # (B, C, T, H, W)
    text = {key: value.to(device, non_blocking=True) for key, value in batch.text.items()}  # (B, L) or (B, D)
    with autocast(device, options.precision):
        features, text_features, logit_scale = forward(inputs, text)
    loss = contrastive_loss(features, text_features, logit_scale, options.loss_chunk_size)
    mean_loss = mean_over_ranks(loss.detach())
    _check_finite(mean_loss, loss, "loss", state.step, batch)

    optimizer, scaler = state.optimizer, state.scaler
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, options.grad_clip_norm or math.inf)
    if not scaler.is_enabled():  # with a scaler, overflow is expected: it skips the step and lowers the scale
        _check_finite(norm, norm, "gradient", state.step, batch)
    scaler.step(optimizer)
    scaler.update()
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise UserError(f"float16 gradients overflow at step {state.step} at any scale: use --precision amp_bf16")
    with torch.no_grad():
        state.model.logit_scale.clamp_(0, MAX_LOG_SCALE)
    return mean_loss


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

    def update(self, state: TrainState, batch: Batch, loss: Tensor) -> None:
        self.paused_at = time.perf_counter()
        self.steps += 1
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
            "train/lr": state.optimizer.param_groups[0]["lr"],
            "train/logit_scale": state.model.logit_scale.exp().item(),
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


def _together(batches: Iterator[Batch], meter: Meter, device: torch.device) -> Iterator[Batch]:
    """The batches, timed; when one rank's data fails, every rank stops and says why."""
    while True:
        begin, failure, batch = time.perf_counter(), None, None
        try:
            batch = next(batches, None)
        except UserError as error:
            failure = str(error)
        meter.got_batch(begin)
        if failure := on_every_rank(failure, device):
            raise UserError(failure)
        if batch is None:
            return
        yield batch


def _check_finite(everywhere: Tensor, here: Tensor, what: str, step: int, batch: Batch) -> None:
    if torch.isfinite(everywhere).item():
        return
    keys = ", ".join(batch.keys) if not torch.isfinite(here).item() else ""
    reports = [f"rank {rank}: {keys}" for rank, keys in enumerate(gather_objects(keys)) if keys]
    raise UserError(
        f"the {what} of step {step} is {everywhere.item()}; the step was not taken. Samples: {'; '.join(reports)}"
    )
