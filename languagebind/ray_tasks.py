"""Run tasks with Ray Data. Imported only with `--engine ray`."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow
from ray.data import ActorPoolStrategy, DataContext, read_datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from .config import UserError


def run_on_ray(
    make: Callable[[], Callable[[Any], Any]], tasks: Iterable[Any], workers: int, num_gpus: float
) -> Iterator[Any]:
    """Yield the results of tasks in order. One task of the cluster reads them, while actors do those that it has read.

    The nodes of the cluster share the folders.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    context.target_max_block_size = 1  # bytes: each row is a block, which an actor takes
    rows = read_datasource(Tasks(tasks), override_num_blocks=1, num_cpus=0)
    actors = ActorPoolStrategy(size=workers)
    for row in rows.map(Actor, fn_constructor_args=(make,), compute=actors, num_gpus=num_gpus).iter_rows():
        result = pickle.loads(row["result"])  # noqa: S301, our own actor wrote it
        if isinstance(result, UserError):
            raise result
        yield result


class Tasks(Datasource):
    """Tasks as rows of one block each."""

    def __init__(self, tasks: Iterable[Any]):
        super().__init__()
        self.tasks = tasks

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[ReadTask]:
        return [ReadTask(self._rows, BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None))]

    def _rows(self) -> Iterator[Any]:
        for task in self.tasks:
            yield pyarrow.table({"task": [pickle.dumps(task)]})


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
