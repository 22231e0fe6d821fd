"""Measure the time of import statements in new processes that have imported PyTorch, with the statements in turn.

`import_seconds` is wall-clock time. `import_cpu_seconds` is CPU time, which other processes hardly affect.
"""

import argparse
import statistics
from collections.abc import Callable

from .rows import Row, measure_rows, spread, timed

STATEMENTS = ["import languagebind", "from languagebind import contrastive_loss", "from languagebind import load"]


def add_options(add: Callable[..., object]) -> None:
    add("--statement", nargs="+", default=STATEMENTS, help="statements to time")
    add("--rounds", type=int, default=5, help="processes per statement")


def measure(options: argparse.Namespace) -> list[Row]:
    options.round = range(options.rounds)
    found, rows = measure_rows(options, ["round", "statement"], measure_row), []
    for statement in options.statement:
        wall, cpu = zip(*(row["times"] for row in found if row["statement"] == statement), strict=True)
        row = {"import_seconds": statistics.median(wall), "import_cpu_seconds": statistics.median(cpu)}
        rows.append({"statement": statement, **row, "cpu_spread_percent": spread(cpu), "rounds": [*wall]})
    return rows


def measure_row(options: argparse.Namespace) -> Row:
    """Return the wall-clock and CPU seconds of a statement in this process."""
    return {"times": timed(lambda: exec(options.statement))}
