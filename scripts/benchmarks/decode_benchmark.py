"""One file to one tensor: milliseconds a sample of every modality, and of video by every decoder.

Video is read as H.264 and as the frames of the same clips packed as JPEG files. Without --files, the sample world's
scenes are rendered; they are small and simple, so compare rows with each other and give your own files for the rest.
"""

import argparse
import dataclasses
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from languagebind.config import UserError, at_least, first_line
from languagebind.data.vidal import media_paths, read_annotation
from languagebind.data.world.files import WorldOptions, make_world
from languagebind.modalities import DecodeError, Modality, modality_class, modality_names
from languagebind.modalities._video_backends import BACKENDS

from .report import Row, progress, spread


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--modality", nargs="+", choices=modality_names(), help="by default all that can be rendered")
    add("--files", nargs="+", type=Path, help="files of --modality, in place of rendered ones")
    add("--num-frames", type=int, default=8, help="taken from a clip")
    add("--size", type=int, default=256, help="pixels a side of what is rendered")
    add("--samples", type=int, default=8, help="files rendered of each modality")
    add("--rounds", type=int, default=3, help="passes over the files, in turn over the rows")


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each modality, backend and packing; one that cannot be used says why.

    Raises:
        UserError: --files without one --modality, or a file that is not there.
    """
    at_least(1, rounds=options.rounds, samples=options.samples, num_frames=options.num_frames)
    if options.files and len(options.modality or ()) != 1:
        raise UserError("--files are of one --modality: name it")
    with tempfile.TemporaryDirectory() as folder:
        sources = {options.modality[0]: options.files} if options.files else render(options, Path(folder))
        rows = [row for name, paths in sources.items() for row in make_rows(name, paths, options.num_frames)]
        for number in range(options.rounds):
            progress(f"round {number + 1} of {options.rounds}")
            for row in rows:
                if "error" not in row:
                    take_round(row)
    return [finish(row) for row in rows]


def render(options: argparse.Namespace, folder: Path) -> dict[str, list[Path]]:
    """Files of the sample world by modality; of a scene's frames the first."""
    default = WorldOptions(folder)
    names = options.modality or default.modalities
    make_world(dataclasses.replace(default, num_train=options.samples, num_test=8, size=options.size, modalities=names))
    root, found = folder / "train", {name: [] for name in names}
    for key, entry in read_annotation(root / "vidal.json", options.samples):
        for name in names:
            places = media_paths(root, key, entry["folder"], name)
            found[name].append(next(paths[0] for paths in places if paths[0].exists()))
    return found


def make_rows(name: str, paths: list[Path], num_frames: int) -> list[Row]:
    """What is measured of one modality: the modality as it is set, and what it is given."""
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"no file {missing[0]}")
    kind, data = modality_class(name), [path.read_bytes() for path in paths]
    row = {"modality": name, "samples": len(data), "times": []}
    if not any(field.name == "video_backend" for field in dataclasses.fields(kind)):
        return [row | {"packed": paths[0].suffix[1:], "reader": kind(), "data": data, "times": []}]
    rows = [
        row | {"packed": paths[0].suffix[1:], "backend": backend, "data": data, "times": []}
        | {"reader": kind(num_frames=num_frames, video_backend=backend)}
        for backend in BACKENDS
    ]  # fmt: skip
    reader = kind(num_frames=num_frames)
    pictures = [[jpeg(frame) for frame in reader.decode(clip)] for clip in data]
    return [*rows, row | {"packed": f"{num_frames} jpg", "reader": reader, "data": pictures, "times": []}]


def take_round(row: Row) -> None:
    """One pass over the files of a row; its milliseconds a sample."""
    begin = time.perf_counter()
    try:
        for source in row["data"]:
            row["reader"].preprocess(source)
    except (UserError, DecodeError) as error:  # a backend that is not installed, or cannot read this file
        row["error"] = first_line(error)
        return
    row["times"].append((time.perf_counter() - begin) / len(row["data"]) * 1e3)


def finish(row: Row) -> Row:
    """The figures of a row. The first round opens libraries, so that it counts only where it is the only one."""
    reader: Modality = row.pop("reader")
    data, times = row.pop("data"), row.pop("times")
    row["input_shape"] = "x".join(map(str, reader.input_shape))
    row["file_bytes"] = statistics.mean(size(source) for source in data)
    if times:
        times = times[1:] or times
        row |= {"sample_ms": statistics.median(times), "spread_share": spread(times)}
    return row


def size(source: bytes | list[bytes]) -> int:
    return len(source) if isinstance(source, bytes) else sum(map(len, source))


def jpeg(frame: Any) -> bytes:
    """(3, H, W) bytes as a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()
