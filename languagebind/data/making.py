"""Making shards from samples: in parallel, resumable, and with an account of every sample left out.

The input's order fixes which sample goes into which shard, so that any number of workers, and any number of
interruptions, give the same bytes.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import UserError, to_dict
from ..files import write_atomic
from .packing import LeftOut, PackOptions, pack
from .shards import ShardInfo, ShardWriter, as_key, file_sha256, write_index
from .sources import Sample

STATE_FOLDER = ".make_shards"  # what is done so far, one file a shard; kept, so that a second run has nothing to do
EXAMPLES = 5  # samples that the report names for each reason
_SECONDS_BETWEEN_LINES = 10


@dataclasses.dataclass(frozen=True)
class MakeOptions:
    """How shards are cut, checked and written."""

    output: Path
    """The folder for the shards, `index.json` and `report.json`."""
    samples_per_shard: int = 1000
    """Entries of the input that make one shard; those left out make it smaller."""
    shard_size: int | None = None
    """Most bytes of media in a shard; needs a look at every file before the work starts on it."""
    workers: int = min(8, os.cpu_count() or 1)
    """Processes; each writes whole shards."""
    overwrite: bool = False
    """Throw away what is in the output folder."""
    packing: PackOptions = dataclasses.field(default_factory=PackOptions)

    def __post_init__(self):
        if self.shard_size and self.packing.frames:
            raise UserError("--shard-size counts the bytes of files as they are, not of --frames: use one of the two")


@dataclasses.dataclass(frozen=True)
class _Job:
    """One shard to make; what a worker is sent."""

    path: Path
    samples: list[Sample]
    duplicates: list[LeftOut]
    packing: PackOptions


def make_shards(samples: Iterable[Sample], source: dict[str, Any], options: MakeOptions) -> dict[str, Any]:
    """Write shards with their index and report; returns the report. `source` describes where `samples` come from.

    What an earlier run finished is kept, if it was made with the same options from an input that is still the same.

    Raises:
        UserError: the output folder holds something else, or the input or the options have changed.
    """
    _prepare(options, source)
    jobs = (
        _Job(options.output / f"{number:05d}.tar", chunk, duplicates, options.packing)
        for number, (chunk, duplicates) in enumerate(_cut(samples, options))
    )
    states = sorted(_progress(_run(jobs, options.workers)), key=lambda state: state["shard"]["name"])
    if not states:
        raise UserError("the input holds no samples")
    unexpected = {path.name for path in options.output.glob("*.tar")} - {state["shard"]["name"] for state in states}
    if unexpected:
        raise UserError(f"{options.output} also holds {min(unexpected)}: the input has become shorter; use --overwrite")
    write_index(options.output, (ShardInfo(**state["shard"]) for state in states))
    report = _report(states)
    write_atomic(options.output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    return report


def _prepare(options: MakeOptions, source: dict[str, Any]) -> None:
    """Make the output folder ours, or refuse."""
    state_folder = options.output / STATE_FOLDER
    if options.overwrite and options.output.exists():
        shutil.rmtree(state_folder, ignore_errors=True)
        for path in options.output.glob("*.tar"):
            path.unlink()
    if not state_folder.exists() and any(options.output.glob("*.tar")):
        raise UserError(f"{options.output} holds shards that were not made here; use --overwrite to replace them")
    state_folder.mkdir(parents=True, exist_ok=True)
    for path in itertools.chain(options.output.glob(".*.tmp"), state_folder.glob(".*.tmp")):
        path.unlink()  # half-written by a run that was killed
    fixed = {**source, **to_dict(options.packing), "samples_per_shard": options.samples_per_shard}
    fixed = json.loads(json.dumps({**fixed, "shard_size": options.shard_size}, default=str))
    record = state_folder / "options.json"
    # Options that a record does not have yet were as they are by default
    before = to_dict(PackOptions()) | json.loads(record.read_bytes()) if record.exists() else fixed
    changed = [key for key in sorted(before.keys() | fixed.keys()) if before.get(key) != fixed.get(key)]
    if changed:
        was, now = before.get(changed[0]), fixed.get(changed[0])
        raise UserError(f"{options.output} was begun with {changed[0]} {was}, not {now}; use --overwrite to start anew")
    write_atomic(record, json.dumps(fixed).encode())


def _cut(samples: Iterable[Sample], options: MakeOptions) -> Iterator[tuple[list[Sample], list[LeftOut]]]:
    """The samples of each shard, and the ones among them whose key was there before."""
    chunk, duplicates, entries, size, seen = [], [], 0, 0, set()
    for sample in samples:
        added = _size(sample) if options.shard_size else 0
        full = entries == options.samples_per_shard or (entries and size + added > (options.shard_size or sys.maxsize))
        if full:
            yield chunk, duplicates
            chunk, duplicates, entries, size = [], [], 0, 0
        entries, size = entries + 1, size + added
        key = as_key(sample.id)
        if key in seen:
            duplicates.append(LeftOut(sample.id, "duplicate key", key))
        else:
            seen.add(key)
            chunk.append(sample)
    if entries:
        yield chunk, duplicates


def _size(sample: Sample) -> int:
    """Bytes of the sample's media, as far as they are there."""
    return sum(p.stat().st_size for places in sample.media.values() for p in places[0] if p.is_file())


def _run(jobs: Iterator[_Job], workers: int) -> Iterator[dict[str, Any]]:
    """The state of each shard as it is finished; the input is read only as fast as it is worked off."""
    with ProcessPoolExecutor(max(1, workers), initializer=_end_with_parent) as pool:
        running = set()
        for job in jobs:
            running.add(pool.submit(_make_shard, job))
            if len(running) >= 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def _end_with_parent() -> None:
    """Let a worker end when the run is killed, or it would wait for work for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_shard(job: _Job) -> dict[str, Any]:
    """Write one shard, unless an earlier run did: what the index and the report need to know of it."""
    record = job.path.parent / STATE_FOLDER / f"{job.path.stem}.json"
    fingerprint = _fingerprint(job)
    if record.exists():
        state = json.loads(record.read_bytes())
        if state["input"] != fingerprint:
            raise UserError(f"the input of {job.path} has changed since it was made; use --overwrite to start anew")
        if job.path.exists() and file_sha256(job.path) == state["shard"]["sha256"]:
            return state
    left_out = list(job.duplicates)
    try:
        with ShardWriter(job.path) as writer:
            for sample in job.samples:
                packed = pack(sample, job.packing)
                if isinstance(packed, LeftOut):
                    left_out.append(packed)
                else:
                    writer.add(*packed)
        state = {
            "input": fingerprint,
            "shard": dataclasses.asdict(writer.info),
            "left_out": [dataclasses.asdict(item) for item in left_out],
        }
        write_atomic(record, json.dumps(state).encode())
    except OSError as error:
        raise UserError(f"cannot write {job.path}: {error.strerror}") from error
    return state


def _fingerprint(job: _Job) -> str:
    """A hash of all that the shard is made from; of the media, their sizes and times."""
    digest = hashlib.sha256(repr(job.duplicates).encode())
    for sample in job.samples:
        stats = [_stat(path) for places in sample.media.values() for place in places for path in place]
        digest.update(json.dumps([dataclasses.astuple(sample), stats], default=str).encode())
    return digest.hexdigest()


def _stat(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _progress(states: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The states as they come: a bar on a terminal, lines in a log."""
    bar = tqdm(unit=" samples", unit_scale=True, disable=None)
    told, shards, samples = time.monotonic(), 0, 0
    for state in states:
        shards, samples = shards + 1, samples + state["shard"]["samples"]
        bar.update(state["shard"]["samples"])
        if bar.disable and time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            logging.info("%d shards with %d samples so far", shards, samples)
        yield state
    bar.close()


def _report(states: list[dict[str, Any]]) -> dict[str, Any]:
    reasons: dict[str, dict[str, Any]] = {}
    for item in itertools.chain.from_iterable(state["left_out"] for state in states):
        reason = reasons.setdefault(item["reason"], {"count": 0, "examples": []})
        reason["count"] += 1
        if len(reason["examples"]) < EXAMPLES:
            reason["examples"].append({"id": item["id"], "detail": item["detail"]})
    return {
        "samples": sum(state["shard"]["samples"] for state in states),
        "bytes": sum(state["shard"]["bytes"] for state in states),
        "shards": len(states),
        "left_out": dict(sorted(reasons.items())),
    }
