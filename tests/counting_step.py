"""Run a step that costs nothing, or sleeps, on every entry; print its report, its time and the peak of its memory.

python counting_step.py ANNOTATION ROOT ENGINE WORKERS SECONDS
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

from languagebind.generate.runners import RunOptions, run_step
from languagebind.generate.steps import Entry, Made, Step


def peak() -> float:
    """Return the peak of this process's memory in MB. That of getrusage may be of the process that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3


class Count(Step):
    """Write the time and the peak of memory as the caption of each entry."""

    name = "count"

    def __init__(self, seconds: float):
        self.seconds = seconds

    def record(self):
        return {}

    def is_done(self, entry: Entry) -> bool:
        return "mplug" in entry.fields

    def make(self, entry: Entry) -> Made:
        time.sleep(self.seconds)
        return Made(texts={"mplug": f"{time.time():.3f} {peak():.0f}"})


if __name__ == "__main__":
    annotation, root, engine, workers, seconds = sys.argv[1:]
    options = RunOptions(Path(annotation), Path(root), engine, int(workers))
    begin = time.monotonic()
    report = run_step(partial(Count, float(seconds)), options)
    print(json.dumps({"made": report["made"], "seconds": time.monotonic() - begin, "MB": peak()}))
