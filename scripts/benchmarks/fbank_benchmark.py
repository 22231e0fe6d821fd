"""Measure the filter bank of audio on random sound that is already on the device, a row per device and --rows."""

import argparse
from collections.abc import Callable, Iterator

import torch

from languagebind.distributed import own_device
from languagebind.modalities import _fbank

from .rows import Row, measure_rows, measure_steps

RATE, BANDS = 16_000, 112


def add_options(add: Callable[..., object]) -> None:
    add("--clips", type=int, default=64)
    add("--seconds", type=float, default=10.0, help="length of a clip")
    add("--device", nargs="+", default=["cpu"], help="cpu (one thread) or cuda, one row per value")
    add("--rows", type=int, nargs="+", default=[_fbank.ROWS], help="frames computed at a time, one row per value")
    add("--steps", type=int, default=5)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    return measure_rows(options, ["device", "rows"], measure_row, "forkserver")


def measure_row(options: argparse.Namespace) -> Row:
    """Return the time of the filter bank, and the largest difference from the CPU's values."""
    torch.set_num_threads(1)  # as in a loader's worker
    torch.manual_seed(0)
    device, _fbank.ROWS = own_device(options.device), options.rows
    sound = torch.rand(options.clips, int(options.seconds * RATE)) - 0.5
    frames = _fbank.split_frames(sound, RATE).flatten(0, 1)
    there = frames.to(device)
    figures = measure_steps(lambda: _fbank.log_mel(there, RATE, BANDS)[-1, -1].item(), device, options.steps, 1)
    difference = _fbank.log_mel(there, RATE, BANDS).cpu() - _fbank.log_mel(frames, RATE, BANDS)
    rate = options.clips / figures["step_ms"] * 1e3
    return {"clips_per_second": rate, "difference": difference.abs().max().item(), **figures}
