"""Measure batches from shards, as training reads them: samples per second, waiting times and memory.

    python scripts/benchmark.py loader --workers 1 4 -- --config configs/depth.yaml --train-data /data/depth

Training's own flags follow `--`. No model is built; a pause of --step-seconds replaces its step.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator

import psutil

from languagebind.text import Tokenizer, text_tokens
from training.batch import Plan
from training.loader import train_batches
from training.params import parse_args
from training.preflight import check_data
from training.worker import ShardBatches

from .rows import MIB, Row, measure_rows


def add_options(add: Callable[..., object]) -> None:
    add("--samples", type=int, default=2000, help="samples to measure per row, after --warmup-batches")
    add("--warmup-batches", type=int, default=2)
    add("--workers", type=int, nargs="+", help="loader processes, one row per value (default: training's)")
    add("--step-seconds", type=float, nargs="+", default=[0.0], help="seconds per training step, one row per value")
    add("--at", type=float, nargs="+", default=[0.0], help="share of the epoch after which a run resumes, one row each")
    add("training", nargs="+", metavar="-- FLAG", help="training's flags, after `--`")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    options.config = parse_args(options.training)
    options.workers = options.workers or [options.config.data.workers]
    return measure_rows(options, ["workers", "step_seconds", "at"], measure_row)


def measure_row(options: argparse.Namespace) -> Row:
    """Read batches with tokenized captions. Return the speed, the waiting times and the memory."""
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in training; this process was spawned
    config, data = options.config, dataclasses.replace(options.config.data, workers=options.workers)
    shards, steps_per_epoch = check_data(data, config.inputs, world_size=1)
    first, steps = max(1, options.warmup_batches), max(2, -(-options.samples // data.batch_size))
    done, readers = int(options.at * steps_per_epoch), max(1, data.workers)
    drawn = {worker: data.batch_size * len(range(worker, done, readers)) for worker in range(readers)}  # none was bad
    plan = Plan(config.seed, 0, 1, steps_per_epoch, done + first + steps, done, drawn, {})
    tokenizer = Tokenizer(text_tokens(config.model.text))
    read, start = bytes_read(), time.perf_counter()
    batches = train_batches(ShardBatches(shards, config.inputs, tokenizer, data, plan))
    next(batches)
    start, read = time.perf_counter() - start, bytes_read() - read
    for _ in range(first - 1):
        next(batches)
    waited, readings, seconds, skipped = [], [], 0.0, 0
    for number in range(steps):
        begin = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - begin)
        skipped += len(batch.skipped)
        time.sleep(options.step_seconds)
        seconds += time.perf_counter() - begin  # excludes reading the memory
        if number == steps - 1 or number % max(1, steps // 20) == 0:
            readings.append(read_memory())
    batches.close()  # ends the workers
    return {
        "batch_size": data.batch_size,
        "first_batch_seconds": start,
        "first_batch_read_mib": read / MIB,
        "samples": steps * data.batch_size,
        "samples_per_second": steps * data.batch_size / seconds,
        "data_wait_percent": 100 * sum(waited) / seconds,
        "longest_wait_ms": max(waited) * 1e3,
        "skipped": skipped,
        **memory_figures(readings),
    }


def bytes_read() -> int:
    """Return the bytes that this process and its descendants have read from files (`rchar` of /proc/PID/io)."""
    main = psutil.Process()
    return sum(process.io_counters().read_chars for process in (main, *main.children(recursive=True)))


def read_memory(main: psutil.Process | None = None) -> Row:
    """Return the memory of this process or another and its descendants; `anonymous_mib` is not of files nor shared."""
    held = []
    for process in (main := main or psutil.Process(), *main.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker that has just ended
            held.append(process.memory_full_info())
    anonymous = sum(info.rss - info.shared for info in held)
    return {"all_pss_mib": sum(info.pss for info in held) / MIB, "anonymous_mib": anonymous / MIB}


def memory_figures(readings: list[Row]) -> Row:
    """Return the last reading, the peak, the growth between the halves, and all readings."""
    anonymous, half = [reading["anonymous_mib"] for reading in readings], len(readings) // 2
    return {
        **readings[-1],
        "peak_pss_mib": max(reading["all_pss_mib"] for reading in readings),
        "growth_mib": statistics.median(anonymous[half:]) - statistics.median(anonymous[:half]),
        "readings": readings,
    }
