"""Measure the decoding of files to tensors, in milliseconds per sample.

For clips, the table has a row per decoder (or its error), and a row for the same frames packed as JPEG files.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torchvision.io import encode_jpeg

from languagebind.config import UserError, first_line
from languagebind.modalities import DecodeError, modality_class, modality_names
from languagebind.modalities._video_backends import BACKENDS

from .rows import Row, measure_rows, measure_steps


def add_options(add: Callable[..., object]) -> None:
    add("--modality", choices=modality_names(), default="video", help="modality of the files (default %(default)s)")
    add("--files", nargs="+", type=Path, required=True)
    add("--num-frames", type=int, default=8, help="frames sampled from a clip")
    add("--rounds", type=int, default=3, help="timed passes over the files, after a warm-up pass")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    clips = hasattr(modality_class(options.modality), "video_backend")
    options.decoder = [*BACKENDS, "packed"] if clips else [options.modality]
    return measure_rows(options, ["decoder"], measure_row)


def measure_row(options: argparse.Namespace) -> Row:
    """Return the time per sample of one decoder."""
    kind: Any = modality_class(options.modality)
    data: list[Any] = [path.read_bytes() for path in options.files]
    if options.decoder in BACKENDS:
        reader = kind(num_frames=options.num_frames, video_backend=options.decoder)
    elif options.decoder == "packed":
        reader = kind(num_frames=options.num_frames)
        data = [[encode_jpeg(frame, quality=90).numpy().tobytes() for frame in reader.decode(x)] for x in data]
    else:
        reader = kind()

    def read() -> None:
        for source in data:
            reader.preprocess(source)

    try:
        figures = measure_steps(read, torch.device("cpu"), options.rounds, warmup_steps=1)
    except (UserError, DecodeError) as error:  # not installed, or cannot read this file
        return {"error": first_line(error)}
    return {
        "samples": len(data),
        "input_shape": "x".join(map(str, reader.input_shape)),
        "sample_ms": figures["step_ms"] / len(data),
        "sample_cpu_ms": figures["step_cpu_ms"] / len(data),
        "spread_percent": figures["step_spread_percent"],
    }
