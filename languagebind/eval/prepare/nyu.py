"""Write NYU Depth v2's test images as PNGs, from `nyu_depth_v2_labeled.mat` and `splits.mat`.

The release's 27 scene types become 10 classes: the nine in CLASSES, and `others` for every other type. A file is named
`<class>/<number>.png`. The number has four digits and counts from 1, like `testNdxs` in `splits.mat`.

With `masks`, files are `<take>/<number>.png`. `classMapping40.mat` maps the release's 894 labels to 40 classes, and
`class13Mapping.mat` these to 13; in both, classes count from 1.
"""

from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from PIL import Image
from pydantic.dataclasses import dataclass
from scipy.io import loadmat

from ...config import UserError
from ..data.validation import CONFIG
from .writing import Row, reading, write_png

CLASSES = (
    "bathroom", "bedroom", "bookstore", "classroom", "dining_room", "home_office", "kitchen", "living_room", "office",
)  # fmt: skip


@dataclass(frozen=True, config=CONFIG)
class Options:
    """The files to read below --source, and the variable to write."""

    file: str = "nyu_depth_v2_labeled.mat"
    splits: str = "splits.mat"
    take: Literal["depths", "images"] = "depths"  # the filled-in depth, or the colour pictures of the same scenes
    masks: Literal["13", "40"] | None = None  # for segmentation into so many classes


def prepare(source: Path, output: Path, options: Options) -> Generator[Row, None, dict[str, int]]:
    """Write PNG files below `output`, yield their rows, and return the scene types counted as `others`."""
    file, splits = source / options.file, source / options.splits
    others: Counter[str] = Counter()
    with reading(splits), open(splits, "rb") as stream:
        numbers = loadmat(stream, variable_names=["testNdxs"])["testNdxs"].ravel().tolist()
    indices = _indices(source, options.masks) if options.masks else None
    with reading(file):
        release = h5py.File(file)
        cells = release["sceneTypes"][()].ravel()
        scenes = ["".join(map(chr, release[cell][()].ravel())) for cell in cells]
    with release:
        if not set(numbers) <= set(range(1, len(scenes) + 1)):
            raise UserError(f"{splits}: testNdxs should be image numbers in {file}, from 1 to {len(scenes)}")
        for number in map(int, numbers):
            with reading(file):
                picture = release[options.take][number - 1]
                mask = None if indices is None else indices[release["labels"][number - 1].T]
            scene = scenes[number - 1]
            label = scene if scene in CLASSES else "others"
            others.update([scene] if label == "others" else [])
            pixels = _millimetres(picture, f"{file}: depths {number}") if options.take == "depths" else picture.T
            row = {"path": f"{label}/{number:04d}.png", "label": label}
            if mask is not None:
                row = {"path": f"{options.take}/{number:04d}.png", "mask": f"masks_{options.masks}/{number:04d}.png"}
                write_png(Image.fromarray(mask), output / row["mask"])
            write_png(Image.fromarray(np.ascontiguousarray(pixels)), output / row["path"])
            yield row
    return dict(others)


def _indices(source: Path, classes: str) -> np.ndarray:
    """Return the index (895,), uint8, of the class of each label; 255 for none."""
    found = np.arange(895)
    for name, key in [("classMapping40", "mapClass"), ("class13Mapping", "classMapping13")][: 1 + (classes == "13")]:
        with reading(source / f"{name}.mat"), open(source / f"{name}.mat", "rb") as stream:
            table = loadmat(stream, variable_names=[key], squeeze_me=True)[key]
        found = np.append(0, table["labels13"].item() if key == "classMapping13" else table)[found]
    return (found.astype(int) - 1).astype(np.uint8)


def _millimetres(depth: np.ndarray, where: str) -> np.ndarray:
    """Return the depth in millimetres (height, width), uint16, from metres (width, height)."""
    depth = np.rint(depth.T.astype(np.float64) * 1000)
    if not (depth.min() >= 0 and depth.max() <= 65535):  # nor NaN
        raise UserError(f"{where}: {depth.min() / 1000:g} to {depth.max() / 1000:g} should be metres, from 0 to 65.535")
    return depth.astype(np.uint16)
