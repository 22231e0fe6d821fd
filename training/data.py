"""Batches from webdataset shards, in an order that the seed, the epoch and the rank decide alone.

    shards of the epoch -> this rank's and worker's part -> shuffle -> input and caption -> batch

Where the samples of the shards are counted, each worker reads as many as its batches of the epoch hold: an epoch is one
pass. Bad samples, or shards that nobody counted, may leave a worker short; it then begins its part again, so that no
rank ever waits for another that has run out. A sample that cannot be used is left out, replaced by the next one, and
counted.
"""

import atexit
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from multiprocessing.sharedctypes import RawValue
from typing import Literal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from languagebind.config import UserError, at_least
from languagebind.data.text_features import TextFeatures, TextFeaturesMode
from languagebind.modalities import Modality

from .stream import Batch, WorkerStream


@dataclass(frozen=True)
class DataConfig:
    """Training data."""

    train_data: str | None = None
    """shards: a brace pattern, a glob or a folder, on the disk or a URL (s3://...); several joined by `::`"""
    train_num_samples: int | None = None
    """samples of an epoch; by default those in the index beside the shards"""
    batch_size: int = 64
    """samples a step on each rank"""
    workers: int = 1
    """processes that decode, on each rank; 0: the training process itself"""
    dataset_resampled: bool = False
    """draw shards with replacement, in place of passing through all of them"""
    caption_source: str = "mix"
    """raw, mplug, polish_mplug, sound_mplug, ofa, another key of the samples' captions, or `mix` of VIDAL's"""
    text_features: TextFeaturesMode = "auto"
    """`cached`: those that scripts/embed_text.py wrote beside the shards; `live`: the tower encodes the captions of
    each batch; `auto`: cached where they are"""
    shuffle_buffer: int = 1000
    """samples that wait in each worker to be drawn at random; 0: the order of the shards"""
    positives: Literal["pair", "caption", "id"] = "pair"
    """what matches in the loss: a sample and its own caption, or also others of the same caption (which changes siglip
    alone: a softmax gives equal captions equal shares anyway), or of the same id"""
    max_bad_share: float = 0.1
    """stop when more than this share of the samples cannot be used"""

    def __post_init__(self):
        at_least(1, batch_size=self.batch_size, train_num_samples=self.train_num_samples)
        at_least(0, workers=self.workers, shuffle_buffer=self.shuffle_buffer)
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"max_bad_share is a share in [0, 1], got {self.max_bad_share}")


@dataclass(frozen=True)
class Plan:
    """Which part of which steps this rank's loader is to fill. A step is one batch: micro-batches count singly."""

    seed: int
    rank: int
    world_size: int
    steps_per_epoch: int
    total_steps: int
    first_step: int = 0
    drawn: dict[int, int] = field(default_factory=dict)
    """samples that each worker has drawn already in the epoch of `first_step`"""


def train_batches(
    shards, modality: Modality, tokenizer, config: DataConfig, plan: Plan, features: TextFeatures | None = None
) -> Iterator[Batch]:
    """The batches of steps `plan.first_step` to `plan.total_steps`.

    Args:
        shards: with the number of samples in each; None where it is not known.
        features: of the captions; without them, the batches hold what the tokenizer gives.

    Raises:
        UserError: too many samples cannot be used.
    """
    closing = RawValue("b", 0)
    close = partial(setattr, closing, "value", 1)
    atexit.register(close)  # should the caller fail and never close this generator
    loader = DataLoader(
        ShardBatches(shards, modality, tokenizer, config, plan, features),
        batch_size=None,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_outlive_signals, closing),
        # The loader draws a seed for its workers; ours do not use it, and the trainer's generator stays untouched.
        generator=torch.Generator(),
    )
    try:
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch
    finally:
        close()
        atexit.unregister(close)


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Each batch on the GPU, copied from pinned memory while the step before it runs; on a CPU the batches as they are.

    Two batches lie on the GPU at once.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copying):
            following = batch.to(device), copying.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = following
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The step waits for the copy; and its memory is free again only when the step is done with it."""
    stream = torch.cuda.current_stream(batch.inputs.device)
    stream.wait_event(copied)
    for tensor in batch.tensors():
        tensor.record_stream(stream)
    return batch


def _outlive_signals(closing, worker: int) -> None:
    """A scheduler that stops a job tells all of its processes; the trainer needs its batches until it has saved."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.value else None)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ShardBatches(IterableDataset):
    """The batches of one worker of one rank. A data set that cannot be used comes as a message in place of a batch."""

    def __init__(self, shards: dict[str, int | None], modality: Modality, tokenizer, config, plan, features=None):
        self.shards, self.modality, self.tokenizer, self.features = shards, modality, tokenizer, features
        self.config, self.plan = config, plan

    def __iter__(self) -> Iterator[Batch | str]:
        plan, info = self.plan, get_worker_info()
        workers = info.num_workers if info else 1
        # The loader asks its workers in turn: step k is worker k modulo workers, in a resumed run as well.
        first = plan.first_step + (info.id if info else 0)
        steps = range(first, plan.total_steps, workers)
        for epoch, steps_of_epoch in groupby(steps, key=lambda step: step // plan.steps_per_epoch):
            resumed = epoch == plan.first_step // plan.steps_per_epoch
            drawn = plan.drawn.get(first % workers, 0) if resumed else 0
            stream = WorkerStream(self, epoch, first % workers, workers, drawn)
            try:
                for _ in steps_of_epoch:
                    yield stream.next_batch()
            except UserError as error:  # as a value: an exception would arrive with the worker's traceback in it
                yield str(error)
                return
