"""Runs of a generation step by each runner, and kills of all their processes."""

from collections.abc import Callable
from contextlib import suppress
from subprocess import Popen

import psutil
from forker import Forked
from helpers import start, start_ranks, wait_for

RUNNERS = ("processes", "ranks", "ray")
MORE = {"processes": ["--workers=2"], "ranks": ["--workers=0"], "ray": ["--engine=ray", "--workers=2"]}


def start_step(runner: str, *words: str) -> list[Popen | Forked]:
    """Start a step in two processes, two ranks or two actors of Ray."""
    command = ["-m", "languagebind.generate", *words, *MORE[runner]]
    return start_ranks(2, *command) if runner == "ranks" else [start(*command, fresh=runner == "ray")]


def end_step(runner: str, *words: str, status: int = 0) -> str:
    """Run a step to its end; return its output. Fails unless it exits with `status`."""
    processes = start_step(runner, *words)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert {process.returncode for process in processes} == {status}, "\n".join(outputs)
    return "\n".join(outputs)


def kill_step(runner: str, *words: str, when: Callable[[], bool]) -> bool:
    """Start a step, and send SIGKILL to all its processes once a condition holds; return whether it was running."""
    processes = start_step(runner, *words)
    wait_for(lambda: when() or all(process.poll() is not None for process in processes), 120)
    running = any(process.poll() is None for process in processes)
    family = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            family += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    for process in processes:
        process.communicate()
    return running
