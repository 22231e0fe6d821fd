"""Measure the time of `import languagebind` after `import torch`, in new processes and with the statements in turn.

`import_seconds` is wall-clock time. `import_cpu_seconds` is CPU time, which other processes hardly affect.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

from .rows import Row, spread

BASE = "import torch"
CODE = """
import time
{base}
wall, cpu = time.perf_counter(), time.process_time()
{statement}
print([time.perf_counter() - wall, time.process_time() - cpu])
"""
STATEMENTS = ["import languagebind", "from languagebind import contrastive_loss", "from languagebind import load"]


def add_options(add: Callable[..., object]) -> None:
    """Add the flags of this benchmark."""
    add("--statement", nargs="+", default=STATEMENTS, help="statements to time")
    add("--rounds", type=int, default=5, help="processes per statement")


def measure(options: argparse.Namespace) -> list[Row]:
    """Return a row with the median times per statement. The first row is `import torch` itself."""
    statements = [BASE, *options.statement]
    rounds = [[time_statement(statement) for statement in statements] for _ in range(options.rounds)]
    rows = []
    for statement, found in zip(statements, zip(*rounds, strict=True), strict=True):
        wall, cpu = zip(*found, strict=True)
        row = {"statement": statement, "import_seconds": statistics.median(wall)}
        row |= {"import_cpu_seconds": statistics.median(cpu), "cpu_spread_percent": spread(cpu)}
        rows.append(row | {"rounds": found})
    return rows


def time_statement(statement: str) -> list[float]:
    """Return the wall-clock and CPU seconds of a statement in a new process."""
    code = CODE.format(base="" if statement == BASE else BASE, statement=statement)
    return json.loads(subprocess.check_output([sys.executable, "-c", code]))
