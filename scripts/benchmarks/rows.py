"""Measure the rows of a benchmark in separate processes, print each at once and all as a table, and write JSON.

The interpreter of the original LanguageBind code imports this file for `compare_worker.py`, so it needs only PyTorch.
"""

import importlib
import itertools
import json
import multiprocessing
import platform
import shlex
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Row = dict[str, Any]
MIB = 2**20


def measure_rows(
    options: Namespace, names: list[str], measure_row: Callable[[Namespace], Row], start_method: str = "spawn"
) -> Iterator[Row]:
    """Yield a row per combination of the options in `names`, which are lists. Measure each in a new process.

    Raises `TimeoutError` when all rows together take longer than `options.limit` seconds, unless it is None.
    """
    end = None if options.limit is None else time.monotonic() + options.limit
    for values in itertools.product(*(getattr(options, name) for name in names)):
        row: Row = dict(zip(names, values, strict=True))
        print(", ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr, flush=True)
        others = multiprocessing.active_children()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start_method)) as pool:
            measured = pool.submit(measure_row, Namespace(**vars(options) | row))
            try:
                row |= measured.result(None if end is None else max(0, end - time.monotonic()))
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            except BrokenProcessPool:  # the system ends processes that use too much memory
                row["error"] = "the process was killed"
            except TimeoutError as error:
                for process in {*multiprocessing.active_children()} - {*others}:
                    process.kill()
                raise TimeoutError(f"not done after {options.limit:.0f} seconds") from error
        yield row


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


def parse(name: str, argv: Sequence[str]) -> tuple[ModuleType, Namespace]:
    """Return the module of a benchmark and its options."""
    benchmark = importlib.import_module(f"scripts.benchmarks.{name}_benchmark")
    style = RawDescriptionHelpFormatter
    parser = ArgumentParser(f"benchmark.py {name}", description=benchmark.__doc__, formatter_class=style)
    benchmark.add_options(parser.add_argument)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file, after each row")
    parser.set_defaults(limit=None)
    return benchmark, parser.parse_args(argv)


def show(name: str, argv: Sequence[str], rows: Iterable[Row], output: Path | None) -> None:
    """Print each row when it is measured, and at the end a table for each `part`; write JSON with what was used.

    `output` is written again after each row, so that it has what a run measured before it was cut short.
    """
    content = {
        "benchmark": name,
        "command": shlex.join(["benchmark.py", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "rows": (found := []),
    }
    try:
        for row in rows:
            found.append(row)
            print(", ".join(f"{key} {_cell(row[key])}" for key in _columns([row])), file=sys.stderr, flush=True)
            if "kernels" in row:
                print(format_rows(row["kernels"]), flush=True)
            if output is not None:
                output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    finally:
        for _, part in itertools.groupby(found, key=lambda row: row.get("part")):
            print(format_rows(list(part)), flush=True)


def format_rows(rows: list[Row]) -> str:
    """Return the rows as text with a column per key. Lists and dictionaries appear only in the JSON file."""
    keys = _columns(rows)
    lines = [[key.replace("_", " ") for key in keys], *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def _columns(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (dict, list))))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)
