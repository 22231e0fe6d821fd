"""Train as training.main does, on ranks; print the collectives of each step.

python step_faults.py FAULT FLAGS...

FAULT strikes where rank 1 fetches its fifth batch: "signal" sends SIGUSR1, "data" raises an error, "nan" spoils the
batch.
"""

import json
import os
import signal
import sys
from collections import Counter

import torch.distributed as dist

import training.main
from languagebind.config import UserError, run
from training.run import Runs


def faulty(batches, fault):
    for number, batch in enumerate(batches, 1):
        if number == 5 and fault == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        elif number == 5 and fault == "data":
            raise UserError("the fifth batch is lost")
        elif number == 5 and fault == "nan":
            batch.inputs.fill_(float("nan"))
        yield batch


def count(steps, name):
    before = getattr(dist, name)

    def counted(*arguments, **options):
        steps[-1][name] += 1
        return before(*arguments, **options)

    setattr(dist, name, counted)


if __name__ == "__main__":
    steps, fault = [Counter()], sys.argv.pop(1)
    for name in ("all_reduce", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor"):
        count(steps, name)
    train_batches, after_step = training.main.train_batches, Runs.after_step
    if os.environ["RANK"] == "1":
        training.main.train_batches = lambda plan: faulty(train_batches(plan), fault)
    Runs.after_step = lambda *arguments: after_step(*arguments) or steps.append(Counter())
    try:
        run(training.main.main)
    finally:
        print("COLLECTIVES", json.dumps(steps), flush=True)
