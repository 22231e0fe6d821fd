"""Prepare the depth maps of SUN RGB-D's test split with the 19 scene classes of the benchmark.

Each path of `alltest` in `allsplit.mat` becomes a row. These are paths on the authors' disk, and the part after
`SUNRGBD/` is a path below --source. The release's PNGs hold millimetres with their 16 bits rotated left by 3. Without
rotating them back, everything would be eight times as far away.
"""

from collections import Counter
from collections.abc import Generator
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from PIL import Image
from pydantic.dataclasses import dataclass
from scipy.io import loadmat

from ...config import UserError
from ..data.validation import CONFIG
from .writing import Row, reading, write_png

CLASSES = (
    "bathroom", "bedroom", "classroom", "computer_room", "conference_room", "corridor", "dining_area", "dining_room",
    "discussion_area", "furniture_store", "home_office", "kitchen", "lab", "lecture_theatre", "library", "living_room",
    "office", "rest_space", "study_space",
)  # fmt: skip


@dataclass(frozen=True, config=CONFIG)
class Options:
    """The path of the split below --source, the depth maps to use, and the files to write."""

    split: str = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
    depth: Literal["depth_bfx", "depth"] = "depth_bfx"  # the toolbox's filled-in depth, or the sensor's
    files: Literal["millimetres", "original"] = "millimetres"  # original files need a modality with `sun_rgbd`


def prepare(source: Path, output: Path, options: Options) -> Generator[Row, None, dict[str, int]]:
    """Yield {"path", "label"} rows, and return the number of scenes left out, by class.

    Paths are relative to `output` for written files and to `source` for original files. A scene without exactly one
    depth map becomes a row without a file, and "where" gives the reason.
    """
    split = source / options.split
    with reading(split), open(split, "rb") as stream:
        cells = loadmat(stream, variable_names=["alltest"])["alltest"].ravel()
        scenes = [str(PurePosixPath("/", cell.item().strip())).split("/SUNRGBD/", 1)[1] for cell in cells]
    counts: Counter[str] = Counter()
    for key in scenes:
        folder = source / "SUNRGBD" / key
        with reading(folder / "scene.txt"):
            label = (folder / "scene.txt").read_text(encoding="utf-8-sig").strip()
        if label not in CLASSES:
            counts[label] += 1
            continue
        row = {"path": f"{label}/{key.replace('/', '__')}.png", "label": label}
        files = [file for file in (folder / options.depth).glob("*.png") if not file.name.startswith(".")]
        if len(files) != 1:
            row["where"] = f"{folder / options.depth} holds {len(files)} PNG files instead of one"
        elif options.files == "original":
            row["path"] = files[0].relative_to(source).as_posix()
        else:
            write_png(_millimetres(files[0]), output / row["path"])
        yield row
    return dict(counts)


def _millimetres(file: Path) -> Image.Image:
    """Return a PNG of the release in millimetres, with its bits rotated back."""
    with reading(file), Image.open(file, formats=("PNG",)) as image:
        mode, stored = image.mode, np.asarray(image).astype(np.uint16)
    if not mode.startswith("I"):
        raise UserError(f"{file} is {mode}, but the release's depth maps have one 16-bit channel")
    return Image.fromarray((stored >> 3) | (stored << 13))
