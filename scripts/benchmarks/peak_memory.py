"""The most memory that a process needs; `compare_worker.py` imports this file in the original's interpreter too."""

import re
from pathlib import Path

import torch


class PeakMemory:
    """Memory in bytes: `before`, in use when this object was made, and the most in use since.

    On a GPU PyTorch counts its tensors. On a CPU it is the resident memory of the process, so measure in a new one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
        self.before = self.peak()

    def peak(self) -> int:
        """Return the most memory in use since this object was made."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0
