"""From a file to a tensor: milliseconds per sample of every modality, and of video by every decoder.

Video is read as H.264, and as the frames of the same clips packed as JPEG files. Without --files, scenes of the sample
world are rendered. They are small and simple: compare rows with each other, and use --files for everything else.
"""

import argparse
import dataclasses
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from languagebind.config import UserError, first_line
from languagebind.data.vidal import media_paths, read_annotation
from languagebind.data.world.make import WorldOptions, make_world
from languagebind.modalities import DecodeError, modality_class, modality_names
from languagebind.modalities._video_backends import BACKENDS

from .report import Row, progress, spread


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    add("--modality", nargs="+", choices=modality_names(), help="default: all that can be rendered")
    add("--files", nargs="+", type=Path, help="files of the one --modality, instead of rendered ones")
    add("--num-frames", type=int, default=8, help="frames sampled from a clip")
    add("--size", type=int, default=256, help="pixels a side of rendered files")
    add("--samples", type=int, default=8, help="rendered files of each modality")
    add("--rounds", type=int, default=3, help="passes over the files; the rows take turns")


def measure(options: argparse.Namespace) -> list[Row]:
    """Measure a row for each modality, decoder and packing; a decoder that cannot be used gives its error.

    Raises:
        UserError: --files without exactly one --modality.
    """
    if options.files and len(options.modality or ()) != 1:
        raise UserError("--files needs one --modality, the one that the files are of")
    with tempfile.TemporaryDirectory() as folder:
        files = {options.modality[0]: options.files} if options.files else render(options, Path(folder))
        rows = [row for name, paths in files.items() for row in make_rows(name, paths, options.num_frames)]
    for number in range(options.rounds):
        progress(f"round {number + 1} of {options.rounds}")
        for row in rows:
            if "error" not in row:
                run_round(row)
    return [finish(row) for row in rows]


def render(options: argparse.Namespace, folder: Path) -> dict[str, list[Path]]:
    """Render files of the sample world; return them by modality, the first frame where a sample has several."""
    default = WorldOptions(folder)
    names = options.modality or default.modalities
    make_world(dataclasses.replace(default, num_train=options.samples, num_test=8, size=options.size, modalities=names))
    root, found = folder / "train", dict[str, list[Path]]()
    for key, entry in read_annotation(root / "vidal.json", options.samples):
        for name in names:
            places = media_paths(root, key, entry["folder"], name)
            found.setdefault(name, []).append(next(paths[0] for paths in places if paths[0].exists()))
    return found


def make_rows(name: str, paths: list[Path], num_frames: int) -> list[Row]:
    """Return the rows of a modality, each with its reader and the files' contents."""
    kind: Any = modality_class(name)
    data = [path.read_bytes() for path in paths]

    def row(packed: str, data: list[Any], **options: Any) -> Row:
        return {"modality": name, "samples": len(data), "packed": packed, "data": data, "times": [], **options}

    packed = paths[0].suffix[1:]
    if not any(field.name == "video_backend" for field in dataclasses.fields(kind)):
        return [row(packed, data, reader=kind())]
    reader = kind(num_frames=num_frames)
    pictures = [[jpeg(frame) for frame in reader.decode(clip)] for clip in data]
    readers = {backend: kind(num_frames=num_frames, video_backend=backend) for backend in BACKENDS}
    rows = [row(packed, data, backend=backend, reader=own) for backend, own in readers.items()]
    return [*rows, row(f"{num_frames} jpg", pictures, reader=reader)]


def run_round(row: Row) -> None:
    """Read the row's files once, and add the milliseconds per sample to its times."""
    begin = time.perf_counter()
    try:
        for source in row["data"]:
            row["reader"].preprocess(source)
    except (UserError, DecodeError) as error:  # a decoder that is not installed, or cannot read this file
        row["error"] = first_line(error)
        return
    row["times"].append((time.perf_counter() - begin) / len(row["data"]) * 1e3)


def finish(row: Row) -> Row:
    """Return a row's figures. Its first round opens libraries, so it counts only if it is the only one."""
    reader, data, times = (row.pop(key) for key in ("reader", "data", "times"))
    row["input_shape"] = "x".join(map(str, reader.input_shape))
    sizes = (len(source) if isinstance(source, bytes) else sum(map(len, source)) for source in data)
    row["file_bytes"] = statistics.mean(sizes)
    if times:
        times = times[1:] or times
        row |= {"sample_ms": statistics.median(times), "spread_share": spread(times)}
    return row


def jpeg(frame: Tensor) -> bytes:
    """Encode a (3, H, W) picture of bytes as JPEG."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()
