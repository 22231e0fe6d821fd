"""What the host learns of the steps. It reads a step's values after it started the next one, so no device waits."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from languagebind.config import UserError
from languagebind.distributed import gather_objects

if TYPE_CHECKING:
    from .batch import Batch
    from .engines.base import Engine

# First the means over ranks, of which three are flags; then this rank's own values.
VALUES = ("loss", "anchor_loss", "failed", "stop", "save", "own_loss", "grad_norm", "logit_scale", "logit_bias")


class Report(NamedTuple):
    """A step and its `VALUES` on their way to the host."""

    step: int
    values: Tensor
    copied: torch.cuda.Event | None
    batches: list[Batch]


class Reports:
    """The reports of a run's steps. Ranks read each at the same point, so they stop, save and fail together.

    `wishes` tells whether this rank wants to stop, and whether it wants a checkpoint.
    """

    def __init__(self, engine: Engine, wishes: Callable[[], list[bool]]):
        self.engine, self.wishes = engine, wishes
        self.unread: deque[Report] = deque()
        self.last: dict[str, float] = {}  # values of the last step that was read
        self.failure: str | None = None  # of this rank's data
        self.failed = self.stop = self.save = False  # on any rank, in the steps that were read

    def flags(self) -> list[bool]:
        """Return this rank's flags for the step that ends."""
        return [self.failure is not None, *self.wishes()]

    def add(self, step: int, values: Tensor, batches: list[Batch]) -> None:
        """Start to copy a step's `VALUES` to the host."""
        copy = values.to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None
        self.unread.append(Report(step, copy, copied, batches))

    def read(self, leave: int = 0) -> None:
        """Wait for the steps but the `leave` newest. Raises on all ranks if a loss or gradient is not finite."""
        while len(self.unread) > leave:
            step, values, copied, batches = self.unread.popleft()
            if copied:
                copied.synchronize()
            self.last = dict(zip(VALUES, values.tolist(), strict=True))
            self.failed |= self.last["failed"] > 0
            self.stop |= self.last["stop"] > 0
            self.save |= self.last["save"] > 0
            self._check("loss", self.last["loss"], self.last["own_loss"], step, batches)
            if not self.engine.scaler.is_enabled():  # float16 gradients may overflow
                self._check("gradient", self.last["grad_norm"], self.last["grad_norm"], step, batches)

    def raise_failure(self) -> None:
        """Raise the same `UserError` on all ranks if the data of any rank has failed, as far as all ranks know."""
        if self.failed:
            raise UserError(next(message for message in gather_objects(self.failure) if message))

    def _check(self, what: str, everywhere: float, here: float, step: int, batches: list[Batch]) -> None:
        if math.isfinite(everywhere):
            return
        keys = "" if math.isfinite(here) else ", ".join(key for batch in batches for key in batch.keys)
        ranks = "; ".join(f"rank {rank}: {keys}" for rank, keys in enumerate(gather_objects(keys)) if keys)
        raise UserError(f"the {what} of step {step} is {everywhere}: the step was not saved. Samples: {ranks}")


class Waits:
    """The time that a device waits for blocks on the host; a GPU does not wait while it still has work."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []  # beginnings and ends in turn

    @contextmanager
    def timed(self) -> Iterator[None]:
        self.marks.append(self._mark())
        try:
            yield
        finally:
            self.marks.append(self._mark())

    def pop_seconds(self) -> float:
        """Return the sum since the last call. The device must have finished the blocks."""
        marks, self.marks = self.marks, []
        pairs = zip(marks[::2], marks[1::2], strict=True)
        if self.device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3
        return sum(end - begin for begin, end in pairs)

    def _mark(self) -> Any:
        if self.device.type == "cuda":
            return torch.cuda.current_stream(self.device).record_event(torch.cuda.Event(enable_timing=True))
        return time.perf_counter()
