"""Make webdataset shards from VIDAL's annotation, a table, JSON lines or class folders.

    languagebind make-shards vidal --annotation vidal.json --root /data/vidal --modality depth --output shards/
    languagebind make-shards csv --manifest m.csv --root DIR --modality audio --output shards/
    languagebind make-shards jsonl --manifest m.jsonl --root DIR --modality depth infrared --output shards/
    languagebind make-shards folder --root DIR --modality depth --output shards/

`--frames 8` stores a video as eight pictures, which are much faster to read.
Run the command again to resume a stopped run. `SOURCE --help` lists the options.
The order of the input alone decides the shard of each sample, so the bytes do not depend on workers or interruptions.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import UserError, expand_config, parse, refuse_changes, to_dict
from ..files import as_on_disk, printable, write_atomic
from ..modalities import modality_class
from ..parallel import Engine, run_in_order
from .packing import LeftOut, PackOptions, has_frames, pack
from .shards import INDEX_NAME, ShardInfo, ShardWriter, as_key, file_sha256, write_index
from .sources import SOURCES, Sample
from .tally import Tally, count
from .vidal import caption_faults

# This folder has one file per finished shard. It is kept, so that a second run has nothing to do.
STATE_FOLDER = ".make_shards"

Entries = list[Sample | LeftOut]  # the input of a shard; a `LeftOut` is a sample with a duplicate key


@dataclasses.dataclass(frozen=True)
class MakeOptions:
    """Options for making shards from samples."""

    output: Path
    """Output folder for the shards, `index.json` and `report.json`."""
    samples_per_shard: int = 1000
    """Number of input entries per shard. Samples that are left out are not replaced."""
    shard_size: int | None = None
    """Maximum bytes of media per shard. The size of every media file is looked up first."""
    workers: int = min(8, os.cpu_count() or 1)
    """Number of processes or actors, each of which writes whole shards. 0: this process alone."""
    engine: Engine = "processes"
    """Processes of this machine, or actors of a Ray cluster whose nodes share the folders."""
    overwrite: bool = False
    """Delete the shards in the output folder and start again."""
    split: tuple[str, ...] = ()
    """Parts and their shares of the samples, such as train=0.8 val=0.1 test=0.1; each gets a folder in the output."""
    packing: PackOptions = dataclasses.field(default_factory=PackOptions)

    def __post_init__(self):
        if self.shard_size and self.packing.frames:
            raise UserError("--shard-size cannot be combined with --frames; use --samples-per-shard")


def make_shards(samples: Iterable[Sample], source: dict[str, Any], options: MakeOptions) -> dict[str, Any]:
    """Write the shards of `samples`, their index and a report. Return the report.

    `source` holds the options used to read the samples. Shards that an earlier run finished are kept. Raises
    `UserError` if the output folder holds other shards, or the input or the options have changed since an earlier run.
    """
    _prepare(options, source)
    states = []
    tasks = ((options.output / f"{number:05d}.tar", own) for number, own in enumerate(_cut(samples, options)))
    # Outside a terminal, print the progress only every 30 seconds.
    with tqdm(unit=" samples", unit_scale=True, mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        make = partial(partial, _make_shard, options.packing)
        for state in run_in_order(make, tasks, options.workers, options.engine):
            states.append(state)
            bar.update(state["shard"]["samples"])
    unexpected = {path.name for path in options.output.glob("*.tar")} - {state["shard"]["name"] for state in states}
    if unexpected:
        raise UserError(f"{options.output} also holds {min(unexpected)} from a longer input; use --overwrite")
    report = _report(states)
    if report["samples"]:
        write_index(options.output, (ShardInfo(**state["shard"]) for state in states))
    else:
        _clear(options.output)
    write_atomic(options.output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    return report


def _prepare(options: MakeOptions, source: dict[str, Any]) -> None:
    """Create the output folder, or check that an existing one has the same source and options."""
    state_folder = options.output / STATE_FOLDER
    earlier = (json.loads(path.read_bytes()) for path in state_folder.glob("[0-9]*.json"))
    if options.overwrite or (state_folder.exists() and not any(state["shard"]["samples"] for state in earlier)):
        _clear(options.output)  # shards without samples are those of a wrong --root
    if not state_folder.exists() and any(options.output.glob("*.tar")):
        raise UserError(f"{options.output} holds shards that were made by other means; use --overwrite to replace them")
    state_folder.mkdir(parents=True, exist_ok=True)
    for path in itertools.chain(options.output.glob(".*.tmp"), state_folder.glob(".*.tmp")):
        path.unlink()  # an incomplete file of a killed run
    cut = {"samples_per_shard": options.samples_per_shard, "shard_size": options.shard_size}
    used = {name: value or None for name, value in {**source, **to_dict(options.packing), **cut}.items()}
    fixed = json.loads(json.dumps(used, default=str))
    record = state_folder / "options.json"
    # An option that is newer than the record had its default value.
    before = to_dict(PackOptions()) | json.loads(record.read_bytes()) if record.exists() else fixed
    refuse_changes(options.output, dict.fromkeys(fixed) | before, fixed, "use --overwrite to start again")
    write_atomic(record, json.dumps(fixed).encode())


def _clear(output: Path) -> None:
    shutil.rmtree(output / STATE_FOLDER, ignore_errors=True)
    for path in [*output.glob("*.tar"), output / INDEX_NAME]:
        path.unlink(missing_ok=True)


def _cut(samples: Iterable[Sample], options: MakeOptions) -> Iterator[Entries]:
    """Yield the entries of each shard."""
    entries: Entries = []
    seen: set[str] = set()
    limit, size = options.shard_size or sys.maxsize, 0
    for sample in samples:
        files = [path for locations in sample.media.values() for path in locations[0]] if options.shard_size else []
        added = sum(path.stat().st_size for path in files if path.is_file())
        if len(entries) == options.samples_per_shard or (entries and size + added > limit):
            yield entries
            entries, size = [], 0
        size += added
        key = as_key(sample.id)
        entries.append(LeftOut(sample.id, "duplicate key", key) if key in seen else sample)
        seen.add(key)
    if entries:
        yield entries


def _make_shard(packing: PackOptions, task: tuple[Path, Entries]) -> dict[str, Any]:
    """Write one shard, unless an earlier run has, and return its state for the index and the report."""
    path, entries = task
    samples = [entry for entry in entries if isinstance(entry, Sample)]
    left_out = [entry for entry in entries if isinstance(entry, LeftOut)]
    record = path.parent / STATE_FOLDER / f"{path.stem}.json"
    fingerprint = _fingerprint(samples, left_out)
    if record.exists():
        state = json.loads(record.read_bytes())
        if state["input"] != fingerprint:
            raise UserError(f"the input of {path} has changed since it was made; use --overwrite to start again")
        if path.exists() and file_sha256(path) == state["shard"]["sha256"]:
            return state
    try:
        with ShardWriter(path) as writer:
            for sample in samples:
                packed = pack(sample, packing)
                if isinstance(packed, LeftOut):
                    left_out.append(packed)
                else:
                    writer.add(*packed)
        shard, left = dataclasses.asdict(writer.info), list(map(dataclasses.asdict, left_out))
        faults = sum((caption_faults(sample.captions) for sample in samples), Counter())
        state = {"input": fingerprint, "shard": shard, "left_out": left, "captions_left_out": faults}
        write_atomic(record, json.dumps(state).encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return state


def _fingerprint(samples: list[Sample], duplicates: list[LeftOut]) -> str:
    """Return a hash of a shard's samples and of the sizes and modification times of their media files."""
    digest = hashlib.sha256(repr(duplicates).encode())
    for sample in samples:
        paths = [path for locations in sample.media.values() for files in locations for path in files]
        found = [path.stat() if path.exists() else None for path in map(as_on_disk, paths)]
        stats = [stat and [stat.st_size, stat.st_mtime_ns] for stat in found]
        digest.update(json.dumps([dataclasses.astuple(sample)[:4], stats], default=str).encode())  # not the group
    return digest.hexdigest()


def _report(states: list[dict[str, Any]]) -> dict[str, Any]:
    reasons: Tally = {}
    for item in itertools.chain.from_iterable(state["left_out"] for state in states):
        count(reasons, item["reason"], {key: item[key] for key in ("id", "detail")})
    counts = {name: sum(state["shard"][name] for state in states) for name in ("samples", "bytes")}
    captions: Counter[str] = sum((Counter(state.get("captions_left_out")) for state in states), Counter())
    left_out = dict(sorted(reasons.items()))
    return {**counts, "shards": len(states), "left_out": left_out, "captions_left_out": dict(captions)}


def main(argv: Sequence[str] | None = None) -> None:
    kind, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if kind in ("-h", "--help"):
        print(__doc__)
        return
    if kind not in SOURCES:
        raise UserError(f"the first argument should be one of {', '.join(SOURCES)}, got {kind!r}")
    options = dataclasses.make_dataclass("Options", [("source", SOURCES[kind]), ("making", MakeOptions)])
    config: Any = parse(options, expand_config(rest), f"languagebind make-shards {kind}")
    kinds = [modality_class(name) for name in config.source.modality]
    if config.making.packing.frames and not any(map(has_frames, kinds)):
        raise UserError("--frames needs a modality with frames, such as video")
    facts = {"kind": kind, **to_dict(config.source), "split": config.making.split}
    if not config.making.split and getattr(config.source, "by", None):
        raise UserError("--by needs --split, such as --split train=0.8 val=0.1 test=0.1")
    shares = parse_shares(config.making.split)
    parts = assign(config.source.samples(), shares) if shares else {}
    for part in shares or [""]:
        samples = (x for x in config.source.samples() if not part or parts[x.group or x.id] == part)
        print(f"{part}: " if part else "", end="")
        print_report(make_shards(samples, facts, replace(config.making, output=config.making.output / part)))


def parse_shares(split: Sequence[str]) -> dict[str, float]:
    """Return the share of each part, from texts such as `train=0.8`, or raise `UserError`."""
    found = [re.fullmatch(r"(\w+)=(\d*\.?\d+)", text) for text in split]
    shares = {share[1]: float(share[2]) for share in found if share}
    if len(shares) < len(split) or (split and abs(sum(shares.values()) - 1) > 1e-6):
        raise UserError(f"--split {' '.join(split)}: write shares that add up to 1, as in train=0.8 val=0.1 test=0.1")
    return shares


def assign(samples: Iterable[Sample], shares: Mapping[str, float]) -> dict[str, str]:
    """Return the part of each group, or raise `UserError` if a part would be empty.

    Groups with the names of parts are the split. Else the largest groups come first, groups of equal size by a hash of
    their names, and each goes where most is lacking.
    """
    # Rows that repeat a caption of their file come as samples of the same id
    sizes = Counter(group for group, _ in {(sample.group or sample.id, sample.id) for sample in samples})
    lacking = {part: share * sizes.total() for part, share in shares.items()}
    parts = {group: group for group in sizes} if sizes.keys() <= shares.keys() else {}
    for group in sorted(
        sizes.keys() - parts.keys(), key=lambda name: (-sizes[name], hashlib.sha256(printable(name).encode()).digest())
    ):
        parts[group] = max(lacking, key=lambda part: lacking[part])
        lacking[parts[group]] -= sizes[group]
    if empty := shares.keys() - parts.values():
        raise UserError(f"--split leaves {min(empty)} empty: there are only {len(sizes)} groups of samples")
    return parts


def print_report(report: dict[str, Any]) -> None:
    """Print the number of packed samples, and the samples left out with the reasons."""
    made = f"{report['samples']} samples in {report['shards']} shards, {report['bytes'] / 1e6:.1f} MB"
    print(f"{made}; {sum(reason['count'] for reason in report['left_out'].values())} left out")
    for name, reason in report["left_out"].items():
        print(f"  {name}: {reason['count']}")
        for example in reason["examples"]:
            print(f"    {example['id']}: {example['detail']}")
    if faults := ", ".join(f"{number} {fault}" for fault, number in report["captions_left_out"].items()):
        print("captions left out:", faults)
    if not report["samples"]:
        raise UserError("no sample was packed, for the reasons above")
