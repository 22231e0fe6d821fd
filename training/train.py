"""Take the training steps and log their metrics."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from languagebind.config import UserError
from languagebind.distributed import Precision, autocast, fail_together, gather_objects
from languagebind.loss import contrastive_loss, over_prefixes, sigmoid_loss
from languagebind.model import DualEncoder

from .optim import OptimConfig, set_lr
from .reports import Reports, Waits
from .rng import rng_state, set_rng_state

if TYPE_CHECKING:  # a step needs only PyTorch, no data readers or loggers
    from .batch import Batch, Skipped
    from .checkpoint import TrainState
    from .engines.base import Engine
    from .logger import Logger
    from .params import TrainConfig

log = logging.getLogger(__name__)

MAX_LOG_SCALE = math.log(100)  # as in CLIP
# --max-bad-share applies after this number of samples.
BUDGET_FROM = 100
Targets = tuple[Tensor | None, Tensor | None, Tensor | None]  # see `_targets`
WORTH_SAYING = 0.1  # lowest possible loss above which repeated captions are reported


def train(
    state: TrainState, batches: Iterator[Batch], config: TrainConfig, logger: Logger, reports: Reports
) -> Iterator[int]:
    """Take the training steps, and yield the step count after each, so that the caller can save and evaluate.

    Each step tells the other ranks whether this rank has data for the next one. They learn it only after the next one
    has begun. Therefore a rank without data takes that step with the data of the last one, and then all ranks raise.
    """
    engine, optim, meter = state.engine, config.optim, Meter(state, config, logger, reports)
    engine.side.train()
    upcoming = _fetch(batches, optim.accum_freq, meter)
    fail_together(reports.failure, engine.process.device)
    while upcoming:
        micro_batches = upcoming
        set_lr(engine.optimizers, optim, state.step, meter.total_steps)
        set_rng_state(state.rng)  # other modalities may have trained in between

        def prepare_next() -> list[bool]:
            nonlocal upcoming
            state.rng = rng_state()
            upcoming = _fetch(batches, optim.accum_freq, meter)
            return reports.flags()

        reports.add(state.step, train_step(state, micro_batches, optim, prepare_next), micro_batches)
        upcoming = micro_batches if reports.failure else upcoming
        reports.read(leave=1)
        reports.raise_failure()
        state.step += 1
        for batch in micro_batches:
            state.skipped += len(batch.skipped)
            state.drawn = {**state.drawn, batch.worker: batch.drawn}
            known = state.lengths or {}
            state.lengths = known | {batch.worker: known.get(batch.worker, {}) | batch.lengths}
        if state.step % state.steps_per_epoch == 0:
            state.drawn, state.lengths = {}, {}  # the workers start the next epoch
        meter.update(micro_batches)
        yield state.step
        meter.resumed = time.perf_counter()


def train_step(
    state: TrainState,
    batches: list[Batch],
    optim: OptimConfig,
    meanwhile: Callable[[], Sequence[bool]] = lambda: [False] * 3,
) -> Tensor:
    """Update the weights with one batch, or with micro-batches as one; return `VALUES`, the mean loss first.

    `meanwhile` returns this rank's flags. It is called when the device has the gradients to compute.
    """
    engine, partner = state.engine, state.partner
    device = engine.process.device
    anchors = [partner.encode(cast(Tensor, x.anchor).to(device), engine.side.precision) for x in batches if partner]
    targets = _targets(engine.model, batches, engine.side.precision, device)
    anchor_loss = torch.zeros((), device=device)

    def score(features: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's loss and the features' gradient; add to the logit scale's gradient."""
        nonlocal anchor_loss
        loss = _loss(engine.model, features, targets, optim)
        if partner:
            own = features[:, : anchors[0].shape[1]]  # without the captions' that may follow
            anchor_loss = _loss(engine.model, own, (torch.cat(anchors), targets[1], None), optim)
            loss = loss + partner.weight * anchor_loss
        engine.scaler.scale(loss).backward()
        return loss.detach(), cast(Tensor, features.grad)

    if len(batches) == 1:
        with engine.accumulate(last=True):
            features = _features(engine, batches[0])
            loss, grad = score(features.detach().requires_grad_())
            engine.backward((features * grad).sum())
    else:
        loss = _accumulate(engine, batches, score)
    flags = [loss.new_full((), flag) for flag in meanwhile()]  # unlike a copy, this does not wait for the device
    shared = engine.average(torch.stack([loss, anchor_loss.detach(), *flags]))
    stepped = engine.update()
    if engine.scaler.is_enabled() and engine.scaler.get_scale() < 1:
        raise UserError(f"float16 gradients overflow at step {state.step} with any scale: use --precision amp_bf16")
    with torch.no_grad():
        engine.model.logit_scale.clamp_(0, MAX_LOG_SCALE)
    if stepped and state.ema is not None:
        state.ema.update()
    scale, bias = engine.model.logit_scale.detach().exp(), engine.model.logit_bias
    own = [loss, engine.grad_norm, scale, torch.zeros_like(scale) if bias is None else bias.detach()]
    return torch.cat([shared, torch.stack([x.float().reshape(()) for x in own])])


def _accumulate(engine: Engine, batches: list[Batch], score: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Accumulate the gradients of all micro-batches with GradCache, and return this rank's loss (arXiv 2101.06983).

    The first pass computes all features without graphs, the second one their gradients, with the same dropped patches.
    """
    features, generators = [], []
    with torch.no_grad():
        for batch in batches:
            generators.append(rng_state())
            features.append(_features(engine, batch))
    loss, grad_of_all = score(torch.cat(features).requires_grad_())
    grads = grad_of_all.split([len(x) for x in features])
    for number, (batch, grad, generator) in enumerate(zip(batches, grads, generators, strict=True)):
        set_rng_state(generator)
        with engine.accumulate(last=number == len(batches) - 1):
            engine.backward((_features(engine, batch) * grad).sum())
    return loss


def _features(engine: Engine, batch: Batch) -> Tensor:
    """Return unit-norm features (B, D); if the text tower trains, the captions' follow in each row, (B, 2 * D)."""
    device, trains_text = engine.process.device, engine.model.trains_text
    batch = batch.to(device) if trains_text else batch  # with a frozen tower, `_targets` moves the texts, once a step
    return engine.forward(batch.inputs.to(device, non_blocking=True), batch.text if trains_text else None)


@torch.no_grad()
def _targets(model: DualEncoder, batches: list[Batch], precision: Precision, device: torch.device) -> Targets:
    """Return unit-norm features of captions (B, D), groups (B,), and features of hard negatives (B * K, D).

    Repeated texts are encoded once. A negative that a sample lacks is a row of zeros. If the text tower trains, only
    the groups are returned.
    """
    features, negatives = [], []
    for batch in [] if model.trains_text else batches:
        text = {key: value.to(device, non_blocking=True) for key, value in batch.text.items()}
        if "features" in text:
            features.append(F.normalize(text["features"].float(), dim=-1))
            negatives += [F.normalize(text["negatives"].float(), dim=-1)] if "negatives" in text else []
            continue
        which, others = text.pop("caption"), text.pop("negatives", None)
        with autocast(device, precision):
            encoded = model.encode_text(text)
        features.append(encoded[which])
        negatives += [] if others is None else [F.pad(encoded, (0, 0, 0, 1))[others]]  # -1 is the row of zeros
    groups = [batch.groups for batch in batches if batch.groups is not None]
    everywhere = torch.cat(groups).to(device, non_blocking=True) if groups else None
    others = torch.cat(negatives).flatten(0, 1) if negatives else None
    return (torch.cat(features) if features else None), everywhere, others


def _loss(model: DualEncoder, features: Tensor, targets: Targets, optim: OptimConfig) -> Tensor:
    text_features, groups, negatives = targets
    if text_features is None:  # the text tower trains
        features, text_features = features.chunk(2, dim=1)
    scale = model.logit_scale.exp()

    def loss(features: Tensor, text_features: Tensor, negatives: Tensor | None = None) -> Tensor:
        if optim.loss == "siglip":
            return sigmoid_loss(features, text_features, scale, cast(Tensor, model.logit_bias), groups)
        return contrastive_loss(features, text_features, scale, groups, negatives=negatives)

    compared = [features, text_features, *([] if negatives is None else [negatives])]
    return over_prefixes(loss, optim.matryoshka, *compared) if optim.matryoshka else loss(*compared)


class Meter:
    """Collects statistics between two log lines. The time excludes evaluation and checkpoints between steps."""

    def __init__(self, state: TrainState, config: TrainConfig, logger: Logger, reports: Reports):
        self.state, self.config, self.logger, self.reports = state, config, logger, reports
        self.waits = Waits(state.engine.process.device)
        self.total_steps = state.steps_per_epoch * config.optim.epochs
        self.world_size = state.engine.process.world_size
        self.loss = 0.0  # running mean, for the console
        self.used, self.bad = 0, 0  # numbers of samples, over all ranks
        self.resumed = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        self.seconds, self.samples, self.steps = 0.0, 0, 0
        self.skipped: list[Skipped] = []

    def update(self, batches: list[Batch]) -> None:
        step = self.state.step
        self.steps += 1
        for batch in batches:
            self.samples += len(batch.keys) * self.world_size
            self.skipped += batch.skipped
        due = step % self.config.log.log_every_n_steps == 0 or step in (1, self.total_steps)
        if due:
            self.reports.read()  # waits for the device
        self.seconds += time.perf_counter() - self.resumed
        if due:
            matched = self.config.optim.loss == "siglip" and self.config.data.positives != "pair"
            if not self.used and not matched:
                self.warn_of_repeats([caption for batch in batches for caption in batch.captions])
            self.report(self.reports.last)
            self.reset()

    def warn_of_repeats(self, captions: list[str]) -> None:
        """Warn if the captions of a step repeat so much that the loss cannot come near 0, however good the model."""
        copies = Counter(caption for part in gather_objects(captions) for caption in part)
        repeated = sum(count for count in copies.values() if count > 1)
        floor = sum(count * math.log(count) for count in copies.values()) / copies.total()
        if floor > WORTH_SAYING and self.state.engine.process.is_main:
            message = "%d of the %d captions of this batch repeat, so the loss cannot fall below %.2f: %s"
            advice = "add captions that tell samples apart, or use a smaller batch"
            log.warning(message, repeated, copies.total(), floor, advice)

    def report(self, read: dict[str, float]) -> None:
        state, engine, seconds, waited = self.state, self.state.engine, self.seconds, self.waits.pop_seconds()
        skips, totals = zip(*gather_objects((self.skipped, state.skipped)), strict=True)
        skipped, total = [sample for samples in skips for sample in samples], sum(totals)
        self.logger.skipped(state.step, skipped)
        if skipped and engine.process.is_main:
            common = Counter((sample.shard, sample.reason) for sample in skipped).most_common(3)
            lines = "; ".join(f"{number} of {shard}: {reason}" for (shard, reason), number in common)
            log.warning("skipped %d samples since the last line (%d in total): %s", len(skipped), total, lines)
        self.loss = 0.9 * self.loss + 0.1 * read["loss"] if self.loss else read["loss"]
        values = {
            "train/loss": read["loss"],
            "train/lr": engine.optimizers[0].param_groups[0]["lr"],
            "train/logit_scale": read["logit_scale"],
            "train/grad_norm": read["grad_norm"],
            "train/samples_per_second": self.samples / seconds,
            "train/batch_time": seconds / self.steps,
            "train/data_time": waited / self.steps,
            "train/data_wait": waited / seconds,
            "train/skipped": total,
            "train/epoch": state.step / state.steps_per_epoch,
        }
        if engine.model.logit_bias is not None:
            values["train/logit_bias"] = read["logit_bias"]
        if state.partner:
            values["train/anchor_loss"] = read["anchor_loss"]
        if engine.scaler.is_enabled():
            values["train/loss_scale"] = engine.scaler.get_scale()
        if engine.process.device.type == "cuda":
            values["train/max_memory_mib"] = torch.cuda.max_memory_allocated(engine.process.device) / 2**20
        log.info("%s%s", self.logger.label, self.line(state.step, values))
        self.logger.metrics(state.step, values)
        self.used += self.samples
        self.bad += len(skipped)
        tried, share = self.used + self.bad, self.config.data.max_bad_share
        if tried >= BUDGET_FROM and self.bad > share * tried:
            found = f"{self.bad} of {tried} samples cannot be used, more than --max-bad-share {share:.0%}"
            raise UserError(f"{found}: see the reasons in the run's skipped.jsonl")

    def line(self, step: int, values: dict[str, float]) -> str:
        """Return OpenCLIP's log line, with the share of time spent waiting for data and the remaining time."""
        per_epoch, batch = self.state.steps_per_epoch, self.samples // self.steps
        epoch, in_epoch = divmod(step - 1, per_epoch)
        left = timedelta(seconds=round((self.total_steps - step) * values["train/batch_time"]))
        eta = "" if self.logger.label else f" ETA {left}"  # other modalities take time, too
        rate = values["train/samples_per_second"]
        return (
            f"Train Epoch: {epoch} [{(in_epoch + 1) * batch}/{per_epoch * batch} ({(in_epoch + 1) / per_epoch:.0%})]"
            f" Data (t): {values['train/data_time']:.3f}"
            f" Batch (t): {values['train/batch_time']:.3f}, {rate:.1f}/s, {rate / self.world_size:.1f}/s/gpu"
            f" LR: {values['train/lr']:.6f} Logit Scale: {values['train/logit_scale']:.3f}"
            f" Contrastive_loss: {values['train/loss']:.4f} ({self.loss:.4f})"
            f" | step {step} data wait {values['train/data_wait']:.0%}{eta}"
        )


def _fetch(batches: Iterator[Batch], accum_freq: int, meter: Meter) -> list[Batch]:
    """Return the next step's micro-batches, none after the last step; note a failure for the other ranks."""
    with meter.waits.timed():
        try:
            return list(islice(batches, accum_freq))
        except UserError as error:
            meter.reports.failure = str(error)
            return []
