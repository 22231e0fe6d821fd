"""Trainings in forked children of a process that has imported everything once: their start costs next to nothing.

Reads a JSON list of arguments from each line of its input, answers with the child's process number, and with its exit
status when it has ended.
"""

import json
import os
import sys

from languagebind.config import run
from training.main import main


def serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout = sys.stderr
            sys.argv = ["train", *json.loads(line)]
            run(main)
            sys.stderr.flush()
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
