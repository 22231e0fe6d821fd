"""Run tasks with Ray Data. Imported only with `--engine ray`."""

import gc
import itertools
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ray.data import ActorPoolStrategy, DataContext, from_items

from .config import UserError

WINDOW = 1024  # tasks of one Ray dataset: Ray's driver keeps some KB of statistics on each until the dataset's end


def run_on_ray(
    make: Callable[[], Callable[[Any], Any]], tasks: Iterable[Any], workers: int, num_gpus: float
) -> Iterator[Any]:
    """Yield the results of tasks in order. New actors start for each window of tasks.

    The nodes of the cluster share the folders.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it would announce every window
    actors, tasks = ActorPoolStrategy(size=workers), iter(tasks)
    while window := [{"task": pickle.dumps(task)} for task in itertools.islice(tasks, WINDOW)]:
        rows: Any = from_items(window, override_num_blocks=len(window))  # an actor takes a block at once
        for row in rows.map(Actor, fn_constructor_args=(make,), compute=actors, num_gpus=num_gpus).iter_rows():
            result = pickle.loads(row["result"])  # noqa: S301, our own actor wrote it
            if isinstance(result, UserError):
                raise result
            yield result
        gc.collect()  # of the dataset's cycles, which Python would free much later


class Actor:
    """A worker of the cluster."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]):
        self.work = make()

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        try:
            result = self.work(pickle.loads(row["task"]))  # noqa: S301, our own driver wrote it
        except UserError as error:  # Ray would wrap it in a traceback
            result = error
        return {"result": pickle.dumps(result)}
