"""The cost of `import languagebind` after `import torch`: seconds in new processes, the statements in turn.

`import_seconds` is wall time; `import_cpu_seconds` is CPU time, which other work on the machine hardly lengthens.
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
    add("--rounds", type=int, default=5, help="processes for each statement")


def measure(options: argparse.Namespace) -> list[Row]:
    """Return the medians of each statement; the first row is `import torch` itself."""
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
    """Return the wall and CPU seconds that a statement takes in a new process."""
    code = CODE.format(base="" if statement == BASE else BASE, statement=statement)
    return json.loads(subprocess.check_output([sys.executable, "-c", code]))
