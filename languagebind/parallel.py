"""Run many tasks in order: in processes of this machine, or in the actors of a Ray cluster."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, TypeVar

from .config import UserError, package

Engine = Literal["processes", "ray"]
Task = TypeVar("Task")
Result = TypeVar("Result")

_work: Callable[[Any], Any]  # what this worker process does


def run_in_order(
    make: Callable[[], Callable[[Task], Result]],
    tasks: Iterable[Task],
    workers: int,
    engine: Engine = "processes",
    num_gpus: float = 0.0,
    start: str | None = None,
) -> Iterator[Result]:
    """Yield the result of each task, in order. Each worker calls `make` once for the function that does its tasks.

    Without workers, this process does them. Tasks are read little faster than they are done, by Ray 1,024 at once;
    `num_gpus` is for each of its actors. `start` is multiprocessing's start method.
    """
    if engine == "ray":
        package("ray", "--engine ray", "'languagebind[ray]'")
        from .ray_tasks import run_on_ray

        yield from run_on_ray(make, tasks, max(1, workers), num_gpus)
    elif not workers:
        yield from map(make(), tasks)
    else:
        context = multiprocessing.get_context(start)
        waiting: deque[Future[Result]] = deque()
        try:
            with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(make,)) as pool:
                for task in tasks:
                    waiting.append(pool.submit(_call, task))
                    if len(waiting) >= 2 * workers:
                        yield waiting.popleft().result()
                yield from (future.result() for future in waiting)
        except BrokenProcessPool as error:
            raise UserError("a worker was killed or could not start: use fewer --workers if memory is short") from error


def _begin(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the parent, too, which says so
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = make()


def _end_with_parent() -> None:
    """End this worker when its parent is killed. Otherwise it would wait for work forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _call(task: Any) -> Any:
    return _work(task)
