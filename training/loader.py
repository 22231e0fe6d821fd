"""Load batches from webdataset shards, in an order that depends only on the seed, the epoch and the rank.

    shards of the epoch -> share of this rank and worker -> shuffle -> input and caption -> batch

If the number of samples is known, an epoch is one pass: each worker reads as many samples as its batches need. With bad
samples or uncounted shards, a worker may run out; it then repeats its share, so that no rank waits for another.
A sample that cannot be used is skipped, counted, and replaced by the next one.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Generator, Iterator
from functools import partial
from multiprocessing.sharedctypes import RawValue
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from languagebind.config import UserError

if TYPE_CHECKING:  # copying needs only PyTorch, no data readers
    from .batch import Batch
    from .worker import ShardBatches


def train_batches(batches: ShardBatches) -> Generator[Batch]:
    """Yield the batches of the plan's steps, prepared by loader processes."""
    closing = RawValue("b", 0)
    close = partial(setattr, closing, "value", 1)
    atexit.register(close)  # in case the caller fails and never closes this generator
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=batches.config.workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_outlive_signals, closing),
        # The loader draws a seed that our workers do not use. Leave the trainer's generator untouched.
        generator=torch.Generator(),
    )
    try:
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch
    except (ConnectionError, EOFError) as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the worker once more, in the exit
        raise RuntimeError("DataLoader worker was killed while it sent a batch.") from error
    finally:
        close()
        atexit.unregister(close)


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield each batch on the GPU, copied while the GPU computes the step before; on a CPU, as it is."""
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device)
        stream = torch.cuda.current_stream(device)
        stream.wait_stream(copying)
        for tensor in moved.tensors():
            tensor.record_stream(stream)  # keeps its memory until the step ends
        yield moved


def _outlive_signals(closing: Any, worker: int) -> None:
    """Ignore a scheduler's signals, which all processes of a job receive, because the trainer still needs batches."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.value else None)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
