"""Measure the rows of a benchmark in separate processes, print them as a table, and write them as JSON.

The interpreter of the original LanguageBind code imports this file for `compare_worker.py`, so it needs only PyTorch.
"""

import itertools
import json
import multiprocessing
import platform
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
MIB = 2**20


def measure_rows(options: Namespace, names: list[str], measure_row: Callable[[Namespace], Row]) -> list[Row]:
    """Return a row per combination of the options in `names`, which are lists. Measure each in a new process."""
    rows = []
    for values in itertools.product(*(getattr(options, name) for name in names)):
        row: Row = dict(zip(names, values, strict=True))
        print(", ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                row |= pool.submit(measure_row, Namespace(**vars(options) | row)).result()
            except (BrokenProcessPool, torch.OutOfMemoryError):  # the system killed the process, or the GPU is full
                row["error"] = "out of memory"
        rows.append(row)
    return rows


def measure_steps(step: Callable[[], object], device: torch.device, steps: int, warmup_steps: int = 0) -> Row:
    """Return the time of a step, the memory before the first step and the peak memory. `step` waits for the device.

    On a GPU, memory is PyTorch's tensors. On a CPU, it is the resident memory of the process, so use a new process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    start = _peak_memory(device)
    times = [timed(step) for _ in range(warmup_steps + steps)]
    peak = _peak_memory(device)
    wall, cpu = zip(*times[warmup_steps:], strict=True)
    return {
        "step_ms": statistics.median(wall) * 1e3,
        "step_spread_percent": spread(wall),
        "step_cpu_ms": statistics.median(cpu) * 1e3,
        "start_mib": start,
        "peak_mib": peak,
        "above_start_mib": peak - start,
    }


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return the wall-clock and CPU seconds of a call. Other processes hardly affect the CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range in percent of the median, or 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return 100 * (high - low) / middle


def show(name: str, argv: Sequence[str], rows: list[Row], output: Path | None) -> None:
    """Print the rows as a table, and write them to `output` with the date, the machine and the versions."""
    print(format_rows(rows))
    if output is not None:
        content = {
            "benchmark": name,
            "command": shlex.join(["benchmark.py", *argv]),
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "processor": Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0],
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "rows": rows,
        }
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def format_rows(rows: list[Row]) -> str:
    """Return the rows as text with a column per key. Lists and dictionaries appear only in the JSON file."""
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (dict, list))))
    lines = [[key.replace("_", " ") for key in keys], *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)
