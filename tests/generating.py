"""Runs of a generation step by each runner, kills of all their processes, and a disk that fills up."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from forker import Forked
from helpers import start, start_ranks, wait_for

STEP = ("-m", "languagebind.generate")
RUNNERS = {"processes": ["--workers=2"], "ranks": ["--workers=0"], "ray": ["--engine=ray", "--workers=2"]}


def start_step(runner: str, *words: str) -> list[subprocess.Popen | Forked]:
    """Start a step in two processes, two ranks or two actors of Ray."""
    if runner == "ray":
        pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")
    command = [*STEP, *words, *RUNNERS[runner]]
    return start_ranks(2, *command) if runner == "ranks" else [start(*command, fresh=runner == "ray")]


def finish(processes: list[subprocess.Popen | Forked], status: int = 0) -> str:
    """Wait for the end of programs; return what they print. Fails unless each exits with `status`."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert {process.returncode for process in processes} == {status}, "\n".join(outputs)
    return "\n".join(outputs)


def end_step(runner: str, *words: str, status: int = 0) -> str:
    """Run a step to its end; return what it prints."""
    return finish(start_step(runner, *words), status)


def kill(processes: list[subprocess.Popen | Forked]) -> None:
    """Kill programs, and then what they leave behind."""
    trees = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            trees += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for process in trees:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        process.communicate(timeout=60)


def kill_step(runner: str, *words: str, when: Callable[[], bool]) -> bool:
    """Start a step, and kill all its processes once a condition holds; return whether it was still running."""
    processes = start_step(runner, *words)
    wait_for(lambda: when() or all(process.poll() is not None for process in processes), 120)
    running = any(process.poll() is None for process in processes)
    kill(processes)
    return running


def report(root: Path, step: str) -> dict:
    return json.loads((root / "generate" / step / "report.json").read_bytes())


@contextmanager
def disk(path: Path, size: int) -> Iterator[Callable[[int], object]]:
    """Mount a disk of a size in bytes; yield a function that changes the size."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", path]
    if subprocess.run([*mount, "-o", f"size={size}"]).returncode:
        pytest.skip("only the administrator can mount a disk")
    try:
        yield lambda size: subprocess.run([*mount, "-o", f"remount,size={size}"], check=True)
    finally:
        subprocess.run(["umount", path], check=True)
