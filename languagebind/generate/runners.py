"""Run a step over an annotation: in processes, under torchrun, or on a Ray cluster.

The order of the annotation alone cuts it into batches, so every engine makes the same calls. Work is done when its
result exists: a second run makes what is missing, and tries again what failed.
"""

import itertools
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from ..config import UserError, at_least, first_line
from ..data.making import EXAMPLES, end_with_parent
from ..data.vidal import read_annotation
from ..distributed import Process, fail_together, gather_objects, joined, on_main
from ..files import locked, printable, write_atomic
from .annotation import Journals, count_entries, merge
from .steps import Entry, Failed, Made, Passing, Step, write

FOLDER = "generate"  # below the root: of each step, what its results depend on, its report and its journals
MakeStep = Callable[[], Step]  # called once in each worker, which it is pickled for
Rows = list[dict[str, Any]]  # of a batch: the id of each entry with its texts, notes, or failure
JUDGED_FROM = 100  # entries from which --max-bad-share applies


@dataclass(frozen=True)
class RunOptions:
    """Where the entries are, and who does the work. Under torchrun, each rank does its share."""

    annotation: Path
    """VIDAL's annotation of the videos; `generate annotate` makes a first one"""
    root: Path
    """folder of the media, in VIDAL's layout"""
    engine: Literal["processes", "ray"] = "processes"
    """processes of this machine, or actors of a Ray cluster"""
    workers: int = 1
    """number of processes or actors; 0: this process alone"""
    num_gpus_per_worker: float = 0.0
    """GPUs of each Ray actor"""
    batch_size: int = 16
    """entries that a worker takes at once"""
    retries: int = 5
    """times that a batch is tried again after a failure that passes, such as a busy server, after 1, 2, 4, ... s"""
    max_bad_share: float = 0.1
    """share of failed entries above which the step stops"""

    def __post_init__(self):
        at_least(0, workers=self.workers, retries=self.retries, num_gpus_per_worker=self.num_gpus_per_worker)
        at_least(1, batch_size=self.batch_size)


class Worker:
    """A step and its retries, in one process or actor."""

    def __init__(self, make_step: MakeStep, retries: int):
        self.step, self.retries = make_step(), retries

    def __call__(self, entries: Sequence[Entry]) -> Rows:
        """Write the files of a batch; return a row for each entry."""
        return [self._row(entry, result) for entry, result in zip(entries, self._results(entries), strict=True)]

    def _results(self, entries: Sequence[Entry]) -> Sequence[Made | Failed]:
        for attempt in itertools.count():
            try:
                return self.step(entries)
            except Passing as error:
                if attempt == self.retries:
                    return [Failed("no answer", first_line(error))] * len(entries)
                time.sleep(2**attempt)
        raise AssertionError

    def _row(self, entry: Entry, result: Made | Failed) -> dict[str, Any]:
        if isinstance(result, Failed):
            return {"id": entry.id, "reason": result.reason, "detail": result.detail}
        write(result)
        return {"id": entry.id, "texts": dict(result.texts), "notes": list(result.notes)}


def run_step(make_step: MakeStep, options: RunOptions) -> dict[str, Any]:
    """Run a step on all entries that lack its result; return the report, which `report.json` keeps.

    Raises `UserError` if earlier results depend on another record, too many entries fail, or a file cannot be written.
    """
    step = make_step()
    folder = options.root / FOLDER / step.name
    with joined("cpu") as process:
        on_main(process, partial(_check_record, folder, step.record()))
        try:
            with locked(folder / f".lock{process.rank}"):
                found, failure = _work(step, make_step, options, process, folder)
                fail_together(failure, process.device)
        except BlockingIOError as error:
            raise UserError(f"another process makes {step.name} in {options.root}: wait for its end") from error
        report = _joined(gather_objects(found), count_entries(options.annotation))
        if process.is_main:
            if journals := sorted(folder.glob("*.jsonl")):
                merge(options.annotation, journals)
            write_atomic(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
        return report


def _work(
    step: Step, make_step: MakeStep, options: RunOptions, process: Process, folder: Path
) -> tuple[dict[str, Any], str | None]:
    """Let workers make what this rank's share lacks. Return its part of the report, and why it stopped early, if so."""
    counts: Counter[str] = Counter()
    failures: dict[str, list[dict[str, str]]] = {}
    share = Share(step, options, sorted(folder.glob("*.jsonl")), process.rank, process.world_size)
    run = {"processes": run_processes, "ray": run_ray}[options.engine]
    journal = folder / f"{time.time_ns()}.{process.rank}.jsonl"
    bar = tqdm(total=count_entries(options.annotation), unit=" entries", disable=not process.is_main)
    with bar, open(journal, "w", encoding="utf-8") as file:
        for end, rows in run(partial(Worker, make_step, options.retries), share, options):
            for row in rows:
                if "reason" in row:
                    examples = failures.setdefault(row["reason"], [])
                    examples += [{"id": printable(row["id"]), "detail": row["detail"]}] * (len(examples) < EXAMPLES)
                    counts.update(("failed", f"failed: {row['reason']}"))
                else:
                    counts.update(("made", *row["notes"]))
                    file.write(json.dumps({"id": row["id"], "texts": row["texts"]}) + "\n" if row["texts"] else "")
            file.flush()
            os.fsync(file.fileno())
            bar.update(end - bar.n)
            done = counts["made"] + counts["failed"]
            if done >= JUDGED_FROM and counts["failed"] > options.max_bad_share * done:
                problem = f"{counts['failed']} of {done} entries failed, more than --max-bad-share"
                return _part(counts, failures), f"{problem} {options.max_bad_share:.0%}: see {folder}/report.json"
    return _part(counts, failures), None


@dataclass
class Share:
    """A rank's batches, without the entries whose result exists: (number of entries up to its end, batch) each."""

    step: Step
    options: RunOptions
    journals: list[Path]  # of killed runs
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[tuple[int, list[Entry]]]:
        texts = Journals(self.journals)
        annotation, size = self.options.annotation, self.options.batch_size
        entries = (Entry(key, fields | texts.take(key)) for key, fields in read_annotation(annotation))
        for number, batch in enumerate(batched(entries, size)):
            missing = [entry for entry in batch if not self.step.is_done(entry)]
            if missing and number % self.world_size == self.rank:
                yield number * size + len(batch), missing


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` items, the last one maybe shorter."""
    iterator = iter(items)
    while part := list(itertools.islice(iterator, size)):
        yield part


def run_processes(make: Callable[[], Worker], share: Share, options: RunOptions) -> Iterator[tuple[int, Rows]]:
    """Yield the rows of each batch, in order, from processes of this machine. Few batches wait at any time."""
    if not options.workers:
        worker = make()
        yield from ((end, worker(batch)) for end, batch in share)
        return
    context = get_context("spawn")  # a fork cannot use a GPU
    with ProcessPoolExecutor(options.workers, context, initializer=_begin, initargs=(make,)) as pool:
        waiting: deque[tuple[int, Future[Rows]]] = deque()
        for end, batch in share:
            waiting.append((end, pool.submit(_call, batch)))
            if len(waiting) >= 2 * options.workers:
                first, future = waiting.popleft()
                yield first, future.result()
        yield from ((end, future.result()) for end, future in waiting)


_worker: Worker  # of this process


def _begin(make: Callable[[], Worker]) -> None:
    global _worker
    end_with_parent()
    _worker = make()


def _call(batch: list[Entry]) -> Rows:
    return _worker(batch)


def run_ray(make: Callable[[], Worker], share: "Share", options: RunOptions) -> Iterator[tuple[int, Rows]]:
    """Yield the rows of each batch, in order, from actors of a Ray cluster, whose nodes share the folders.

    Ray Data reads few batches ahead of those that the actors take.
    """
    try:
        from ray.data import ActorPoolStrategy, DataContext, read_datasource
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'languagebind[ray]'") from error
    from .ray_source import Batches, RayWorker

    context = DataContext.get_current()
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    context.target_max_block_size = 1  # bytes: each batch is a block, which an actor takes
    actors = ActorPoolStrategy(size=max(1, options.workers))
    batches = read_datasource(Batches(share), override_num_blocks=1, num_cpus=0)
    made = batches.map(RayWorker, fn_constructor_args=(make,), compute=actors, num_gpus=options.num_gpus_per_worker)
    for row in made.iter_rows():
        yield row["end"], json.loads(row["rows"])


def _check_record(folder: Path, record: dict[str, Any]) -> None:
    """Write what the results depend on, or check that an earlier run's results depend on the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path, now = folder / "record.json", json.loads(json.dumps(record, default=str))
    before = json.loads(path.read_bytes()) if path.exists() else now
    if changed := [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]:
        was, new = before.get(changed[0]), now.get(changed[0])
        advice = f"keep it, or remove {folder} and its results to start again"
        raise UserError(f"{folder.name} was made with {changed[0]} {was}, not {new}: {advice}")
    write_atomic(path, json.dumps(now, indent=1).encode() + b"\n")


def _part(counts: Counter[str], failures: dict[str, list[dict[str, str]]]) -> dict[str, Any]:
    return {"counts": dict(counts), "failures": failures}


def _joined(parts: Sequence[dict[str, Any]], entries: int) -> dict[str, Any]:
    """Return the report of all ranks."""
    counts: Counter[str] = sum((Counter(part["counts"]) for part in parts), Counter())
    failures = {
        reason: {
            "count": counts.pop(f"failed: {reason}"),
            "examples": [x for part in parts for x in part["failures"].get(reason, ())][:EXAMPLES],
        }
        for reason in sorted({reason for part in parts for reason in part["failures"]})
    }
    done = {"made": counts.pop("made", 0), "failed": counts.pop("failed", 0)}
    return {"entries": entries, "there before": entries - sum(done.values()), **done, **counts, "failures": failures}
