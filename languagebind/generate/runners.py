"""Run a step over an annotation: in processes, under torchrun, or on a Ray cluster.

The order of the annotation alone cuts it into batches, so every engine makes the same calls. Work is done when its
result exists: a second run makes what is missing, and tries again what failed.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import UserError, at_least, refuse_changes
from ..data.tally import Tally, count
from ..data.vidal import read_annotation
from ..distributed import fail_together, gather_objects, joined, on_main
from ..files import locked, write_atomic
from ..parallel import Engine, run_in_order
from .annotation import append, merge
from .steps import Entry, Failed, Made, Step, write

FOLDER = "generate"  # below the root, with a folder for each step's record, report and journals
PATIENCE = timedelta(days=30)  # for slower ranks; torchrun ends all ranks when one dies
JUDGED_FROM = 100  # entries from which --max-bad-share applies

MakeStep = Callable[[], Step]  # pickled, and called once in each worker
Batch = tuple[int, list[Entry]]  # its end as a place in the annotation, and the entries to work on


@dataclass(frozen=True)
class RunOptions:
    """Where the entries are, and what does the work. Under torchrun, each rank does its share."""

    annotation: Path
    """VIDAL's annotation of the videos; `generate annotate` makes a first one"""
    root: Path
    """folder of the media, in VIDAL's layout"""
    engine: Engine = "processes"
    """processes of this machine, or actors of a Ray cluster"""
    workers: int = 1
    """number of processes or actors; 0: this process alone"""
    num_gpus_per_worker: float = 0.0
    """GPUs of each Ray actor"""
    batch_size: int = 16
    """entries that a worker takes at once"""
    max_bad_share: float = 0.1
    """share of failed entries above which the step stops, judged from the 100th on"""

    def __post_init__(self):
        at_least(0, workers=self.workers, num_gpus_per_worker=self.num_gpus_per_worker)
        at_least(1, batch_size=self.batch_size)


class Worker:
    """A step in one process or actor."""

    def __init__(self, make_step: MakeStep):
        self.step = make_step()

    def __call__(self, batch: Batch) -> tuple[int, list[tuple[str, Made | Failed]]]:
        """Write the files of a batch; return its end, and the result of each entry without its files."""
        end, entries = batch
        light: list[tuple[str, Made | Failed]] = []
        for entry, result in zip(entries, self.step(entries), strict=True):  # the step makes more meanwhile
            if isinstance(result, Made):
                write(result)
                result = replace(result, files={})
            light.append((entry.id, result))
        return end, light


def run_step(make_step: MakeStep, options: RunOptions) -> dict[str, Any]:
    """Run a step on all entries that lack its result; return the report, which `report.json` keeps.

    Raises `UserError` if earlier results depend on another record, too many entries fail, or a file cannot be written.
    """
    step = make_step()
    with joined("cpu", PATIENCE) as process, ExitStack() as stack:
        share = Share(step, options, process.rank, process.world_size)
        entries, left_out = on_main(process, partial(_prepare, share, stack))
        part: dict[str, Any] = {"made": 0, "failed": 0, "failures": {}, "notes": {}}
        failure = None
        try:
            with tqdm(total=entries, unit=" entries", disable=not process.is_main) as bar:
                _work(make_step, share, part, bar)
        except UserError as error:
            failure = str(error)
        total, stopped = _total(gather_objects(part)), any(gather_objects(failure))
        rest = "there before or not reached" if stopped else "there before"
        others = entries - left_out - total["made"] - total["failed"]
        if 0 < total["failed"] == entries - left_out:
            failure = failure or "all entries failed, for the reasons above"
        report = {"entries": entries, "left out": left_out, rest: others, **total}
        try:
            on_main(process, partial(_finish, share, report))
        finally:  # on a full disk, why the step stopped says more
            fail_together(failure, process.device)
        return report


def _prepare(share: "Share", stack: ExitStack) -> tuple[int, int]:
    """Lock the step; check its record; merge what killed runs left; count the entries, and those that are left out."""
    step, options, folder = share.step, share.options, share.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(locked(folder / ".lock"))
    except BlockingIOError as error:
        raise UserError(f"another process makes {step.name} in {options.root}: wait for its end") from error
    path, now = folder / "record.json", json.loads(json.dumps(step.record(), default=str))
    before = json.loads(path.read_bytes()) if path.exists() else now
    refuse_changes(step.name, before, now, f"keep it, or remove {folder} and its results to start again")
    write_atomic(path, json.dumps(before | now, indent=1).encode() + b"\n")
    merge(options.annotation, sorted(folder.glob("*.jsonl")))  # of killed runs
    skipped = Counter(step.skips(fields) for _, fields in read_annotation(options.annotation))
    return skipped.total(), skipped[True]


def _work(make_step: MakeStep, share: "Share", part: dict[str, Any], bar: tqdm) -> None:
    """Let workers make what a rank's share lacks, and count it in the rank's part of the report."""
    options, make = share.options, partial(Worker, make_step)
    run = run_in_order(make, share, options.workers, options.engine, options.num_gpus_per_worker, start="spawn")
    journal = share.folder / f"{time.time_ns()}.{share.rank}.jsonl"
    for end, results in run:
        lines = b""
        for entry_id, result in results:
            if isinstance(result, Failed):
                part["failed"] += 1
                count(part["failures"], result.reason, {"id": entry_id, "detail": result.detail})
                continue
            part["made"] += 1
            for note in result.notes:
                count(part["notes"], note, {"id": entry_id})
            if result.texts:
                lines += json.dumps({"id": entry_id, "texts": dict(result.texts)}).encode() + b"\n"
        if lines:
            append(journal, lines)
        bar.update(end - bar.n)
        failed, done = part["failed"], part["made"] + part["failed"]
        if done >= JUDGED_FROM and failed > options.max_bad_share * done:
            problem = f"{failed} of {done} entries failed, more than --max-bad-share {options.max_bad_share:.0%}"
            raise UserError(f"{problem}: see {share.folder}/report.json")


@dataclass
class Share:
    """A rank's batches, without the entries that have a result or are left out."""

    step: Step
    options: RunOptions
    rank: int
    world_size: int

    @property
    def folder(self) -> Path:
        return self.options.root / FOLDER / self.step.name

    def __iter__(self) -> Iterator[Batch]:
        entries, size = itertools.starmap(Entry, read_annotation(self.options.annotation)), self.options.batch_size
        for number, batch in enumerate(iter(lambda: list(itertools.islice(entries, size)), [])):
            if number % self.world_size != self.rank:
                continue
            if lacking := [x for x in batch if not (self.step.skips(x.fields) or self.step.is_done(x))]:
                yield number * size + len(batch), lacking


def _finish(share: Share, report: dict[str, Any]) -> None:
    """Merge the journals; write and print the report."""
    annotation = share.options.annotation
    merge(annotation, sorted(share.folder.glob("*.jsonl")))
    report |= share.step.finish(annotation)
    write_atomic(share.folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    print_report(share.step.name, report)
    if not report["made"] and report.get("there before") == 0:
        (share.folder / "record.json").unlink()  # so that the next run may have another model


def _total(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of all ranks."""
    numbers = {name: sum(part[name] for part in parts) for name in ("made", "failed")}
    tallies: dict[str, Tally] = {"failures": {}, "notes": {}}
    for (name, tally), part in itertools.product(tallies.items(), parts):
        for reason, found in part[name].items():
            count(tally, reason, *found["examples"], number=found["count"])
    return numbers | tallies


def print_report(name: str, report: dict[str, Any]) -> None:
    """Print what a step made, and what it noted or why it failed for some entries, with an example of each."""
    print(f"{name}: " + ", ".join(f"{value} {key}" for key, value in report.items() if isinstance(value, int)))
    for reason, found in (report["failures"] | report["notes"]).items():
        example = found["examples"][0]
        print(f"  {reason}: {found['count']}, such as {example.get('detail') or example['id']}")
