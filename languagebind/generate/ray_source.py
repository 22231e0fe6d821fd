"""What Ray Data needs of a step: a source of batches, and a worker in an actor. Imported only with Ray."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from .steps import Entry


class Batches(Datasource):
    """Batches as rows, read by one task while actors work."""

    def __init__(self, share: Iterable[tuple[int, list[Entry]]]):
        super().__init__()
        self.share = share

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[ReadTask]:
        return [ReadTask(self._rows, BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None))]

    def _rows(self) -> Iterator[Any]:
        for end, batch in self.share:
            yield pyarrow.table({"end": [end], "batch": [json.dumps(batch)]})


class RayWorker:
    """A worker in an actor."""

    def __init__(self, make: Callable[[], Callable[[Sequence[Entry]], Any]]):
        self.worker = make()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        batch = [Entry(*entry) for entry in json.loads(row["batch"])]
        return {"end": row["end"], "rows": json.dumps(self.worker(batch))}
