"""What a benchmark prints and writes."""

import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

UNITS = {  # the end of a key: what its figure is divided by, and how it is printed
    "bytes": (2**20, "MiB"),
    "seconds": (1, "s"),
    "ms": (1, "ms"),
    "flops": (1e9, "GFLOP"),
    "share": (0.01, "%"),
}


def show(name: str, argv: Sequence[str], rows: list[Row], output: Path | None) -> None:
    """Print the rows as a table; write them to `output` with what they were measured on."""
    print(table(rows))
    if output is not None:
        content = {"benchmark": name, "command": shlex.join(["benchmark.py", *argv]), **environment(), "rows": rows}
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(rows: list[Row]) -> str:
    """Aligned columns, one for each key that a row has; a dictionary inside a row is left to the JSON file."""
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (dict, list))))
    lines = [[_heading(key) for key in keys], *([_cell(key, row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def environment() -> Row:
    """When and on what the figures were measured."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def spread(values: Sequence[float]) -> float:
    """Distance of the quartiles, as a share of the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def progress(what: str) -> None:
    """A line for whoever waits; the table is on standard output alone."""
    print(what, file=sys.stderr, flush=True)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


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
