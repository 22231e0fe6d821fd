"""Batches from shards, as training reads them: samples a second, waiting, and the memory of every process.

    python scripts/benchmark.py loader --workers 1 4 -- --config configs/depth.yaml --train-data /data/depth

What follows `--` are training's own flags; the model is not built. A step of the model is a pause of --step-seconds.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator

from languagebind.config import UserError, at_least
from languagebind.text import Tokenizer, text_tokens
from training.data import train_batches
from training.params import TrainConfig, parse_args
from training.preflight import check_data
from training.stream import Batch, DataConfig, Plan

from .memory import Held, held_by
from .report import Row, progress


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--samples", type=int, default=2000, help="measured in each row, after --warmup-batches")
    add("--warmup-batches", type=int, default=2)
    add("--workers", type=int, nargs="+", help="a row each; by default training's")
    add("--step-seconds", type=float, nargs="+", default=[0.0], help="time of the model's step; a row each")
    add("training", nargs="+", metavar="-- FLAG", help="training's flags, after `--`")


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each number of workers and step time.

    Raises:
        UserError: shards that cannot be read, or too few of them for the workers.
    """
    at_least(1, samples=options.samples)
    at_least(0, warmup_batches=options.warmup_batches)
    config, rows = parse_args(options.training), []
    for workers in options.workers or [config.data.workers]:
        for pause in options.step_seconds:
            at_least(0, step_seconds=pause)
            progress(f"{workers} workers, steps of {pause} s")
            data = dataclasses.replace(config.data, workers=workers)
            row = {
                "modality": config.modality,
                "workers": workers,
                "batch_size": data.batch_size,
                "pause_seconds": pause,
            }
            rows.append(row | measure_loader(config, data, pause, options))
    return rows


def measure_loader(config: TrainConfig, data: DataConfig, pause: float, options: argparse.Namespace) -> Row:
    """Read batches; what a step waited for, and what the processes held at the beginning and at the end."""
    steps = options.warmup_batches + max(2, -(-options.samples // data.batch_size))
    batches, waited, seconds, memory, skipped = open_loader(config, data, steps), [], 0.0, [], 0
    for number in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        if number < options.warmup_batches:
            continue
        waited.append(time.perf_counter() - asked)
        skipped += len(batch.skipped)
        time.sleep(pause)
        seconds += time.perf_counter() - asked  # without reading the memory
        if number == steps - 1 or (number - options.warmup_batches) % max(1, steps // 20) == 0:
            memory.append(all_memory())
    batches.close()
    samples = len(waited) * data.batch_size
    return {
        "samples": samples,
        "samples_per_second": samples / seconds,
        "data_wait_share": sum(waited) / seconds,
        "longest_wait_ms": max(waited) * 1e3,
        "skipped": skipped,
        **memory_figures(memory),
    }


def open_loader(config: TrainConfig, data: DataConfig, steps: int) -> Iterator[Batch]:
    """Training's batches, with captions as token ids; epochs follow each other until there are `steps`."""
    shards, steps_per_epoch = check_data(data, config.inputs, world_size=1)
    plan = Plan(config.seed, 0, 1, steps_per_epoch, steps)
    try:
        tokenizer = Tokenizer(text_tokens(config.model.text))
    except (ImportError, OSError) as error:
        raise UserError(f"the tokenizer of {config.model.text.text_tower} cannot be made: {error}") from error
    return train_batches(shards, config.inputs, tokenizer, data, plan)


def all_memory() -> dict[int, Held]:
    """Of this process and its children."""
    found = {}
    for pid in [os.getpid(), *children(os.getpid())]:
        try:
            found[pid] = held_by(pid)
        except (OSError, KeyError):  # a worker that has just ended
            continue
    return found


def children(pid: int) -> list[int]:
    """Processes below one, at any depth."""
    direct = []
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/children") as file:
                direct += map(int, file.read().split())
        except FileNotFoundError:  # the thread has just ended
            continue
    return [found for child in direct for found in (child, *children(child))]


def memory_figures(memory: list[dict[int, Held]]) -> Row:
    """Sums over processes, and how the second half of the run compares with the first; every reading in the JSON."""
    main, half = os.getpid(), max(1, len(memory) // 2)
    own = [reading[main].uss for reading in memory]
    workers = [sum(held.uss for pid, held in reading.items() if pid != main) for reading in memory]
    everything = [sum(held.pss for held in reading.values()) for reading in memory]
    anonymous = [sum(held.anonymous for held in reading.values()) for reading in memory]
    return {
        "main_uss_bytes": own[-1],
        "workers_uss_bytes": workers[-1],
        "all_pss_bytes": everything[-1],
        "peak_pss_bytes": max(everything),
        "growth_bytes": statistics.median(anonymous[half:] or anonymous) - statistics.median(anonymous[:half]),
        "readings": [{str(pid): list(pair) for pid, pair in reading.items()} for reading in memory],
    }
