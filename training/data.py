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
from functools import partial
from multiprocessing.sharedctypes import RawValue

import torch
from torch.utils.data import DataLoader

from languagebind.config import UserError
from languagebind.data.text_features import TextFeatures
from languagebind.modalities import Modality

from .stream import Batch, DataConfig, Plan, ShardBatches


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
