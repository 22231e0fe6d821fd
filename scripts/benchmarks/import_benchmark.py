"""The cost of `import languagebind` after `import torch`: seconds in new processes, the statements in turn.

`import_seconds` is wall time; `import_cpu_seconds` is processor time, which other work on the machine hardly lengthens.
"""

import argparse
import json
import statistics
import subprocess
import sys

from languagebind.config import UserError

from .report import Row, spread

CODE = """
import time
{base}
wall, cpu = time.perf_counter(), time.process_time()
{statement}
print([time.perf_counter() - wall, time.process_time() - cpu])
"""
STATEMENTS = ["import languagebind", "from languagebind import contrastive_loss", "from languagebind import load"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--statement", nargs="+", default=STATEMENTS, help="statements to time")
    parser.add_argument("--base", default="import torch", help="what is imported before (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each statement")


def measure(options: argparse.Namespace) -> list[Row]:
    """Return the medians of each statement; the first row is the base itself."""
    pairs = [("pass", options.base), *((options.base, statement) for statement in options.statement)]
    times: dict[tuple[str, str], list[list[float]]] = {pair: [] for pair in pairs}
    for _ in range(options.rounds):
        for pair in pairs:
            times[pair].append(time_statement(*pair))
    rows = []
    for (base, statement), found in times.items():
        wall, cpu = zip(*found, strict=True)
        row = {"after": base.replace("pass", "-"), "statement": statement}
        row |= {"import_seconds": statistics.median(wall), "import_cpu_seconds": statistics.median(cpu)}
        rows.append(row | {"cpu_spread_share": spread(cpu), "rounds": found})
    return rows


def time_statement(base: str, statement: str) -> list[float]:
    """Return the wall and processor seconds that a statement takes in a new process, after the base.

    Raises:
        UserError: the statement fails.
    """
    command = [sys.executable, "-c", CODE.format(base=base, statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{base!r}, {statement!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)
