"""What `import languagebind` costs after `import torch`: seconds in new processes, the statements in turn.

`import_seconds` is the clock's, `import_cpu_seconds` the processor's: other work on the machine does not lengthen it.
"""

import argparse
import json
import statistics
import subprocess
import sys

from languagebind.config import UserError, at_least

from .report import Row, spread

CODE = """
import time
{base}
wall, cpu = time.perf_counter(), time.process_time()
{statement}
print([time.perf_counter() - wall, time.process_time() - cpu])
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument(
        "--statement", nargs="+",
        default=["import languagebind", "from languagebind import contrastive_loss", "from languagebind import load"],
    )  # fmt: skip
    parser.add_argument("--base", default="import torch", help="what is imported before (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each statement")


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each statement, medians over the rounds; the base itself is the first."""
    at_least(1, rounds=options.rounds)
    pairs = [("pass", options.base), *((options.base, statement) for statement in options.statement)]
    times = {pair: [] for pair in pairs}
    for _ in range(options.rounds):
        for pair in pairs:
            times[pair].append(seconds(*pair))
    rows = []
    for (base, statement), found in times.items():
        wall, cpu = zip(*found, strict=True)
        row = {"after": base.replace("pass", "-"), "statement": statement}
        row |= {"import_seconds": statistics.median(wall), "import_cpu_seconds": statistics.median(cpu)}
        rows.append(row | {"cpu_spread_share": spread(cpu), "rounds": found})
    return rows


def seconds(base: str, statement: str) -> list[float]:
    """How long a new process takes over a statement, by the clock and by the processor.

    Raises:
        UserError: the statement fails.
    """
    command = [sys.executable, "-c", CODE.format(base=base, statement=statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{base!r}, {statement!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)
