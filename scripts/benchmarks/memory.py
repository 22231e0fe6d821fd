"""Memory of processes, as Linux counts it, and measuring in a process of its own."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch


class PeakMemory:
    """The most memory in use from here on, and what was in use before, in bytes.

    On a GPU PyTorch's own count of tensors; on a CPU the resident memory of the process, which only a process of its
    own (`in_fresh_process`) says anything with.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
        self.before = _status("self", "VmRSS")

    def peak(self) -> int:
        """In bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("self", "VmHWM")


class Held(NamedTuple):
    """Memory of a process, in bytes."""

    uss: int
    """what it alone holds"""
    pss: int
    """with its part of what it shares"""
    anonymous: int
    """neither of files nor of batches that go from one process to another. A page that a worker copies because it
    touched it was counted before, and is no growth"""


def held_by(pid: int) -> Held:
    """The memory of a process."""
    fields = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return Held(fields["Private_Clean"] + fields["Private_Dirty"], fields["Pss"], fields["Anonymous"])


def in_fresh_process(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What a function gives in a new process; `{"error": ...}` where memory does not suffice."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            return {"error": "killed, most likely for want of memory"}
        except RuntimeError as error:  # torch.OutOfMemoryError, or the CPU allocator's plain RuntimeError
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                return {"error": "out of memory"}
            raise


def _status(pid: str, field: str) -> int:
    return _fields(Path(f"/proc/{pid}/status").read_text())[field]


def _fields(text: str) -> dict[str, int]:
    """`Name: 12 kB` lines, in bytes."""
    words = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in words}
