"""What `import languagebind` costs: seconds of new processes, in turn with ones that import torch, or nothing.

`extra_seconds` is the time over the base. With the default base, `import torch`, the library is imported after it, so
that the figure is the library's own.
"""

import argparse
import statistics
import subprocess
import sys

from languagebind.config import UserError, at_least

from .report import Row, spread

CODE = "import time; begin = time.perf_counter(); {}; print(time.perf_counter() - begin)"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument(
        "--statement", nargs="+", help="measured beside `import languagebind`",
        default=["from languagebind import load", "from languagebind import contrastive_loss"],
    )  # fmt: skip
    parser.add_argument("--base", default="import torch", help="what is imported before (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each statement")


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each statement, medians over the rounds."""
    at_least(1, rounds=options.rounds)
    statements = [options.base, *(f"{options.base}; {s}" for s in ("import languagebind", *options.statement))]
    times = {statement: [] for statement in statements}
    for _ in range(options.rounds):
        for statement in statements:
            times[statement].append(seconds(statement))
    base = statistics.median(times[options.base])
    return [
        {
            "statement": statement,
            "total_seconds": statistics.median(found),
            "extra_seconds": statistics.median(found) - base,
            "spread_share": spread(found),
            "all": found,
        }
        for statement, found in times.items()
    ]


def seconds(statement: str) -> float:
    """How long a new process takes over a statement, without its own start. Raises `UserError` where it fails."""
    command = [sys.executable, "-c", CODE.format(statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{statement!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)
