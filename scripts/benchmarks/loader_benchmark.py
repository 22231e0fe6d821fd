"""Batches from shards, as training reads them: samples per second, waiting, and the memory of every process.

    python scripts/benchmark.py loader --workers 1 4 -- --config configs/depth.yaml --train-data /data/depth

Training's own flags follow `--`. No model is built: a pause of --step-seconds stands for its step.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import psutil

from languagebind.text import Tokenizer, text_tokens
from training.batch import Batch, Plan
from training.loader import train_batches
from training.params import TrainConfig, parse_args
from training.preflight import check_data
from training.worker import ShardBatches

from .report import Row, progress


class Memory(NamedTuple):
    """Memory of a process, in bytes."""

    uss: int
    """memory of this process alone"""
    pss: int
    """`uss` and this process's share of the memory that it shares"""
    anonymous: int
    """resident memory that is neither a file's nor shared: a page that a worker copies on writing does not add to it"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    add("--samples", type=int, default=2000, help="measured in each row, after --warmup-batches")
    add("--warmup-batches", type=int, default=2)
    add("--workers", type=int, nargs="+", help="one table row each (default: training's)")
    add("--step-seconds", type=float, nargs="+", default=[0.0], help="time of the model's step; one table row each")
    add("training", nargs="+", metavar="-- FLAG", help="training's flags, after `--`")


def measure(options: argparse.Namespace) -> list[Row]:
    """Measure a row for each number of workers and step time."""
    config, rows = parse_args(options.training), []
    for workers in options.workers or [config.data.workers]:
        for pause in options.step_seconds:
            progress(f"{workers} workers, steps of {pause} s")
            data = dataclasses.replace(config.data, workers=workers)
            row = {"modality": config.modality, "workers": workers, "batch_size": data.batch_size}
            row |= {"pause_seconds": pause}
            rows.append(row | measure_row(dataclasses.replace(config, data=data), pause, options))
    return rows


def measure_row(config: TrainConfig, pause: float, options: argparse.Namespace) -> Row:
    """Read batches; return the waiting times and the memory of the processes."""
    batch_size, first = config.data.batch_size, options.warmup_batches
    steps = first + max(2, -(-options.samples // batch_size))
    batches, waited, memory = open_loader(config, steps), [], []
    seconds, skipped = 0.0, 0
    for number in range(steps):
        begin = time.perf_counter()
        batch = next(batches)
        if number < first:
            continue
        waited.append(time.perf_counter() - begin)
        skipped += len(batch.skipped)
        time.sleep(pause)
        seconds += time.perf_counter() - begin  # without reading the memory
        if number == steps - 1 or (number - first) % max(1, steps // 20) == 0:
            memory.append(read_memory())
    del batches  # ends the workers
    samples = len(waited) * batch_size
    return {
        "samples": samples,
        "samples_per_second": samples / seconds,
        "data_wait_share": sum(waited) / seconds,
        "longest_wait_ms": max(waited) * 1e3,
        "skipped": skipped,
        **memory_figures(memory),
    }


def open_loader(config: TrainConfig, steps: int) -> Iterator[Batch]:
    """Return training's batches, with captions as token ids, over as many epochs as `steps` need."""
    shards, steps_per_epoch = check_data(config.data, config.inputs, world_size=1)
    plan = Plan(config.seed, 0, 1, steps_per_epoch, steps)
    tokenizer = Tokenizer(text_tokens(config.model.text))
    return train_batches(ShardBatches(shards, config.inputs, tokenizer, config.data, plan))


def read_memory() -> dict[int, Memory]:
    """Return the memory of this process and all processes below it, by process number."""
    main, found = psutil.Process(), {}
    for process in [main, *main.children(recursive=True)]:
        try:
            full = process.memory_full_info()
        except psutil.NoSuchProcess:  # a worker that has just ended
            continue
        found[process.pid] = Memory(full.uss, full.pss, full.rss - full.shared)
    return found


def memory_figures(memory: list[dict[int, Memory]]) -> Row:
    """Return sums over processes, the growth from the first to the second half of the readings, and all readings."""
    main, half = os.getpid(), max(1, len(memory) // 2)
    everything = [sum(held.pss for held in reading.values()) for reading in memory]
    anonymous = [sum(held.anonymous for held in reading.values()) for reading in memory]
    return {
        "main_uss_bytes": memory[-1][main].uss,
        "workers_uss_bytes": sum(held.uss for pid, held in memory[-1].items() if pid != main),
        "all_pss_bytes": everything[-1],
        "peak_pss_bytes": max(everything),
        "growth_bytes": statistics.median(anonymous[half:] or anonymous) - statistics.median(anonymous[:half]),
        "readings": [{str(pid): list(held) for pid, held in reading.items()} for reading in memory],
    }
