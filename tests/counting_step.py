"""Run a step that costs nothing, or sleeps, on every entry; print its report, its time and the peak of its memory.

python counting_step.py ANNOTATION ROOT ENGINE WORKERS SECONDS
"""

import json
import resource
import sys
import time
from functools import partial
from pathlib import Path

from languagebind.generate.runners import RunOptions, run_step
from languagebind.generate.steps import Entry, Made, Step


class Count(Step):
    """Write the time of each entry as its caption."""

    name = "count"

    def __init__(self, seconds: float):
        self.seconds = seconds

    def record(self):
        return {}

    def is_done(self, entry: Entry) -> bool:
        return "mplug" in entry.fields

    def one(self, entry: Entry) -> Made:
        time.sleep(self.seconds)
        return Made(texts={"mplug": f"{time.time():.3f} {entry.id}"})


if __name__ == "__main__":
    annotation, root, engine, workers, seconds = sys.argv[1:]
    options = RunOptions(Path(annotation), Path(root), engine, int(workers), batch_size=16 if seconds == "0" else 1)
    begin = time.monotonic()
    report = run_step(partial(Count, float(seconds)), options)
    seconds = time.monotonic() - begin
    own, children = (
        resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(json.dumps({"made": report["made"], "seconds": seconds, "MB": own, "MB of a worker": children}))
