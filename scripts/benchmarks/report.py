"""The rows of a benchmark, their table and their JSON file."""

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

# The last word of a key is its unit: the figure is divided by the first and printed with the second.
UNITS = {"bytes": (2**20, "MiB"), "seconds": (1, "s"), "ms": (1, "ms"), "flops": (1e9, "GFLOP"), "share": (0.01, "%")}


def measure_rows(options: Namespace, names: list[str], measure_row: Callable[[Namespace], Row]) -> list[Row]:
    """Measure a row for each combination of the options in `names`, which are lists, each in a new process."""
    rows = []
    for values in itertools.product(*(getattr(options, name) for name in names)):
        row = dict(zip(names, values, strict=True))
        progress(", ".join(f"{name} {value}" for name, value in row.items()))
        rows.append(row | _in_new_process(measure_row, Namespace(**vars(options) | row)))
    return rows


def _in_new_process(function: Callable[[Namespace], Row], options: Namespace) -> Row:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, options).result()
        except (BrokenProcessPool, RuntimeError) as error:
            # A kill, torch.OutOfMemoryError, or a plain RuntimeError of the CPU allocator
            if isinstance(error, BrokenProcessPool | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                return {"error": "out of memory"}
            raise


def show(name: str, argv: Sequence[str], rows: list[Row], output: Path | None) -> None:
    """Print the rows as a table; also write them to `output`, with the machine and the versions."""
    print(table(rows))
    if output is not None:
        content = {"benchmark": name, "command": shlex.join(["benchmark.py", *argv]), **environment(), "rows": rows}
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(rows: list[Row]) -> str:
    """Return aligned columns, one for each key; lists and dictionaries appear only in the JSON file."""
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (dict, list))))
    lines = [[_heading(key) for key in keys], *([_cell(key, row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def environment() -> Row:
    """Return the date, the machine and the versions."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range divided by the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def progress(message: str) -> None:
    """Print a message to standard error; standard output holds only the table."""
    print(message, file=sys.stderr, flush=True)


def _heading(key: str) -> str:
    stem, _, end = key.rpartition("_")
    return f"{stem.replace('_', ' ')} {UNITS[end][1]}".strip() if end in UNITS else key.replace("_", " ")


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float) and key.rpartition("_")[2] not in UNITS:
        return str(value)
    value = value / UNITS.get(key.rpartition("_")[2], (1, ""))[0]
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
