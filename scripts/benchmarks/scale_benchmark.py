"""Measure what grows with ranks, shards, captions and entries of an annotation, a row per size.

    python scripts/benchmark.py scale --ranks 1 2 4 8 -- --config demo/depth --train-data SHARDS
    python scripts/benchmark.py scale --shards 400 4000 40000 --captions 100000 1000000 --entries 10000 100000

`--ranks` runs training itself, with gloo and the flags that follow `--`. docs/scaling.md explains the figures.
"""

import argparse
import dataclasses
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from languagebind.data.feature_store import FeatureStore
from languagebind.data.making import MakeOptions, _cut
from languagebind.data.shards import ShardWriter, write_index
from languagebind.data.sources import Jsonl, Vidal
from languagebind.modalities import modality_class
from training.batch import DataConfig, Plan
from training.preflight import check_data
from training.worker import ShardBatches

from .rows import MIB, Row, measure_rows, measure_steps, timed

CPU = torch.device("cpu")


def add_options(add: Callable[..., object]) -> None:
    for part in ("ranks", "shards", "captions", "entries"):
        add(f"--{part}", type=int, nargs="+", default=[], help="sizes to measure, one row per value")
    add("--source", choices=("vidal", "jsonl"), nargs="+", default=["vidal"], help="form of the --entries")
    add("--batch-size", type=int, default=128, help="samples per step of all --ranks together")
    add("--per-file", type=int, default=10_000, help="captions in each file of features (default %(default)s)")
    add("--embed-dim", type=int, default=768, help="size of a feature (default %(default)s)")
    add("--folder", type=Path, help="where files are written and deleted (default: the system's temporary folder)")
    add("training", nargs="*", metavar="-- FLAG", help="training's flags, for --ranks")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    parts = {"ranks": measure_ranks, "shards": measure_shards, "captions": measure_captions, "entries": measure_entries}
    for part, measure_row in parts.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            given = argparse.Namespace(**vars(options), work=Path(folder))
            names = [part, *(["source"] if part == "entries" else [])]
            yield from ({"part": part, **row} for row in measure_rows(given, names, measure_row))


def measure_ranks(options: argparse.Namespace) -> Row:
    """Train on ranks of this machine. The memory is the peak of all processes' shares, divided by the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks, logs, begin, peak = options.ranks, options.work / str(options.ranks), time.monotonic(), 0.0
    command = [sys.executable, "-m", "training.main", *options.training, f"--logs={logs}", "--name=run",
               f"--batch-size={options.batch_size // ranks}", "--workers=1", "--log-every-n-steps=5"]  # fmt: skip
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    started = [subprocess.Popen(command, env=os.environ | group | x, stdout=subprocess.DEVNULL) for x in own]
    before_steps = None
    while any(process.poll() is None for process in started):
        held, cpu = 0, 0.0
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                held += process.memory_full_info().pss
                cpu += sum(process.cpu_times()[:4])
        peak = max(peak, held / MIB)
        if before_steps is None and (logs / "run/metrics.jsonl").exists():
            before_steps = cpu
        time.sleep(0.5)
    if any(process.returncode for process in started):
        raise RuntimeError(f"training on {ranks} ranks failed")
    rows = [json.loads(line) for line in (logs / "run/metrics.jsonl").read_text().splitlines()]
    return {
        "samples_per_second": statistics.median(row["train/samples_per_second"] for row in rows[1:]),
        "data_wait_percent": 100 * statistics.median(row["train/data_wait"] for row in rows[1:]),
        "first_step_seconds": rows[0]["train/batch_time"],
        "all_seconds": time.monotonic() - begin,
        "start_cpu_s": before_steps,
        "steps_cpu_ms_per_sample": 1e3 * (sum(os.times()[2:4]) - before_steps) / rows[-1]["step"] / options.batch_size,
        "rank_mib": peak / ranks,
        "last_loss": rows[-1]["train/loss"],
    }


def measure_shards(options: argparse.Namespace) -> Row:
    """Start training on shards of one sample, each a link to the same file. Seconds of CPU time, with cached files."""
    count, folder, store = options.shards, options.work / str(options.shards), FeatureStore("0" * 64)
    folder.mkdir()
    png, depth = io.BytesIO(), modality_class("depth")()
    Image.fromarray(np.ones((8, 8), np.uint16)).save(png, "PNG")
    with ShardWriter(folder / "00000.tar") as writer:
        writer.add("a", {"depth.png": png.getvalue()}, {"id": "a", "captions": {"raw": "a wall"}})
    names = [f"{number:05d}.tar" for number in range(count)]
    write_index(folder, [dataclasses.replace(writer.info, name=name) for name in names])
    data = DataConfig(str(folder), caption_source="raw", batch_size=1, shuffle_buffer=0)
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    (shards, _), row = check_data(data, depth, 1), {}
    row["check_data_s"] = timed(lambda: check_data(data, depth, 1))[1]
    row["no_features_s"] = timed(lambda: store.serves("auto", shards, ["raw"]))[1]
    store.write(str(folder / names[0]), ["a wall"], torch.ones(1, options.embed_dim).half(), ["raw"])
    for name in names[1:]:
        os.link(store.path(str(folder / names[0])), store.path(str(folder / name)))
    row["features_s"] = timed(lambda: store.serves("cached", shards, ["raw"]))[1]
    batches = ShardBatches(shards, depth, lambda texts: {}, data, Plan(0, 0, 1, count, count))
    return row | {"first_batch_s": timed(lambda: next(iter(batches)))[1]}


def measure_captions(options: argparse.Namespace) -> Row:
    """Look up features of captions in files of --per-file: in five files, as a loader's buffer does, and in all."""
    count, size, store = options.captions, options.per_file, FeatureStore("0" * 64)
    features, shards = torch.randn(size, options.embed_dim).half(), []
    for first in range(0, count, size):
        shards.append(str(options.work / f"{count}-{first // size:05d}.tar"))
        store.write(shards[-1], map("caption {}".format, range(first, first + size)), features, ["raw"])
    row: Row = {"files_mib": sum(Path(store.path(shard)).stat().st_size for shard in shards) / MIB}
    row["start_s"] = timed(lambda: store.serves("cached", shards, ["raw"]))[1]

    def look_up(numbers: list[int]) -> None:
        for n in numbers:
            store.find(shards[n // size], f"caption {n}")

    for name, end in {"near": min(count, 5 * size), "anywhere": count}.items():
        drawn = random.Random(0).choices(range(end), k=20_000)
        found = measure_steps(partial(look_up, drawn), CPU, 1, 1)
        row |= {f"{name}_lookup_us": found["step_cpu_ms"] / 20, f"{name}_mib": found["above_start_mib"]}
    return row


def measure_entries(options: argparse.Namespace) -> Row:
    """Read an annotation, or a table, up to the entries of each shard, without their media."""
    path, count = options.work / f"{options.entries}.json", options.entries
    with open(path, "w", encoding="utf-8") as file:
        for n in range(count):
            texts = {"raw": f"number {n} of the clips #shorts", "polish_mplug": f"a person shows {n} things in a room"}
            vidal, row = {"folder": f"{n // 1000:05d}", **texts}, {"path": f"{n}.png", "caption": texts["raw"]}
            start = f'{",{"[not n]}"{n:011d}": ' if options.source == "vidal" else ""
            file.write(f"{start}{json.dumps(vidal if start else row)}\n")
        file.write("}" if options.source == "vidal" else "")
    kind = {"vidal": Vidal, "jsonl": Jsonl}[options.source]
    source, shards = kind(path, options.work, ("depth",)), MakeOptions(options.work)
    found = measure_steps(lambda: sum(1 for _ in _cut(source.samples(), shards)), CPU, 1)
    figures = {
        "file_mib": path.stat().st_size / MIB,
        "cpu_s": found["step_cpu_ms"] / 1e3,
        "mib": found["above_start_mib"],
    }
    path.unlink()
    return figures
