"""SUN RGB-D's depth maps with their scene classes: the test split, and of it the 19 classes of the benchmark.

A row comes from one path of `alltest` in `allsplit.mat`. These are paths on the disk of the authors; what follows
`SUNRGBD/` is looked for below --source, where `scene.txt` holds the class and `depth_bfx` (`depth`) one PNG. Scenes of
other classes are left out, as the protocol says, and counted.

The release's PNGs hold millimetres with the bits turned by 3 to the left. With `files: millimetres` each is written as
plain millimetres, `<class>/<path of the scene with __ for />.png`, and nothing else about it is changed. With
`files: original` the rows are the release's own files, which only a modality with `sun_rgbd` reads as they are meant:
read as millimetres, everything is eight times as far.
"""

from collections import Counter
from collections.abc import Generator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ...config import UserError, first_line
from ._common import check_options, load_mat, log_counts, write_png

CLASSES = (
    "bathroom", "bedroom", "classroom", "computer_room", "conference_room", "corridor", "dining_area", "dining_room",
    "discussion_area", "furniture_store", "home_office", "kitchen", "lab", "lecture_theatre", "library", "living_room",
    "office", "rest_space", "study_space",
)  # fmt: skip


def prepare(source: Path, output: Path, options: dict[str, Any]) -> Generator[dict, None, dict[str, int]]:
    """Yields {"path", "label"} rows and returns the number of scenes left out, by class.

    Paths start at `output` for written files, at `source` for original ones. A scene without a depth map is a row
    without a file, and says so in "where".

    Raises:
        UserError: the split, a scene's folder or its class is missing, or its depth map is wrong.
    """
    check_options(options, ("split", "depth", "files"))
    depth, files = options.get("depth", "depth_bfx"), options.get("files", "millimetres")
    if depth not in ("depth_bfx", "depth") or files not in ("millimetres", "original"):
        raise UserError(f"prepare: depth is depth_bfx or depth, files millimetres or original; got {depth}, {files}")
    split = Path(source, options.get("split", "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"))
    counts: Counter[str] = Counter()
    for key in _keys(split):
        folder = Path(source, "SUNRGBD", key)
        label = _scene(folder, split)
        if label not in CLASSES:
            counts[label] += 1
            continue
        file = _depth_map(folder / depth)
        row = {"path": f"{label}/{key.replace('/', '__')}.png", "label": label}
        if file is None:
            row["where"] = f"{folder / depth} holds no PNG"
        elif files == "original":
            row["path"] = file.relative_to(source).as_posix()
        else:
            write_png(_millimetres(file), Path(output, row["path"]))
        yield row
    log_counts("scenes of other classes, left out", counts)
    return dict(counts)


def _keys(split: Path) -> list[str]:
    """The scenes of the test split, as paths below SUNRGBD, in the file's order."""
    keys = []
    for cell in load_mat(split, "alltest").ravel():
        text = str(cell.item()) if isinstance(cell, np.ndarray) and cell.size == 1 else repr(cell)
        parts = PurePosixPath(text.strip()).parts
        key = parts[parts.index("SUNRGBD") + 1 :] if "SUNRGBD" in parts else ()
        if not key or ".." in key:
            raise UserError(f"{split}: alltest should hold paths with SUNRGBD/ in them, found {text[:80]}")
        keys.append("/".join(key))
    if len(set(keys)) < len(keys):
        raise UserError(f"{split}: alltest holds {Counter(keys).most_common(1)[0][0]} twice")
    return keys


def _scene(folder: Path, split: Path) -> str:
    try:
        label = (folder / "scene.txt").read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        message = f"{split} names {folder}, of which scene.txt cannot be read: unpack SUNRGBD.zip into --source"
        raise UserError(message) from error
    if not label:
        raise UserError(f"{folder / 'scene.txt'} is empty: take it from the release again")
    return label


def _depth_map(folder: Path) -> Path | None:
    files = sorted(file for file in folder.glob("*.png") if not file.name.startswith("."))
    if len(files) > 1:
        raise UserError(f"{folder} should hold one depth map, but holds {len(files)} PNGs: take it from the release")
    return files[0] if files else None


def _millimetres(file: Path) -> Image.Image:
    """A PNG of the release with its bits turned back."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            stored = np.asarray(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}; take it from the release again") from error
    if stored.ndim != 2 or stored.dtype == np.uint8 or stored.min() < 0 or stored.max() > 65535:
        raise UserError(f"{file} is {image.mode}, the release's depth maps have one channel of 16 bits")
    stored = stored.astype(np.uint16)
    return Image.fromarray((stored >> 3) | (stored << 13))
