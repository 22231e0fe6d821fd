"""NYU Depth v2's test images, from `nyu_depth_v2_labeled.mat` and `splits.mat`, as PNGs.

With `take: depths`, 16-bit PNGs in millimetres: `depths` (N, width, height), the filled-in depth in metres, is turned
to (height, width) and multiplied by 1000, and rounded to the nearest integer, halves to even: no scaling, cropping or
clipping. With `take: images`, the colour pictures of the same scenes: `images` (N, 3, width, height), turned. A file is
`<class>/<number>.png`, the number with four digits and from 1, as `testNdxs` in `splits.mat` counts.

The release's 27 scene types become 10 classes: the nine that CLASSES names, and `others` for every other type.
"""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...config import UserError, first_line
from ._common import check_options, load_mat, log_counts, need, write_png

CLASSES = (
    "bathroom", "bedroom", "bookstore", "classroom", "dining_room", "home_office", "kitchen", "living_room", "office",
)  # fmt: skip


def prepare(source: Path, output: Path, options: dict[str, Any]) -> Generator[dict, None, dict[str, int]]:
    """Write the pictures below `output`; yields {"path", "label"} rows, returns the scene types that became `others`.

    Raises:
        UserError: a package or a file is missing, or a file does not hold what the release does.
    """
    check_options(options, ("file", "splits", "take"))
    take = options.get("take", "depths")
    if take not in KINDS:
        raise UserError(f"prepare: take should be {' or '.join(KINDS)}, not {take!r}")
    file = Path(source, options.get("file", "nyu_depth_v2_labeled.mat"))
    splits = Path(source, options.get("splits", "splits.mat"))
    h5py = need("h5py")
    tests = load_mat(splits, "testNdxs").ravel()
    if not file.is_file():
        raise UserError(f"{file} does not exist: --source is the folder of the download")
    others: dict[str, int] = {}
    try:
        with h5py.File(file, "r") as release:
            pictures, types = _variables(release, take, file)
            _check_numbers(tests, len(types), splits, file)
            for number in map(int, tests):
                scene = _text(release, types[number - 1], f"{file}: sceneTypes {number}")
                label = scene if scene in CLASSES else "others"
                if label == "others":
                    others[scene] = others.get(scene, 0) + 1
                path = f"{label}/{number:04d}.png"
                pixels = KINDS[take].pixels(pictures[number - 1], f"{file}: {take} {number}")
                write_png(Image.fromarray(pixels), Path(output, path))
                yield {"path": path, "label": label}
    except (OSError, KeyError, RuntimeError) as error:  # what h5py raises for a file that is cut off, or broken inside
        raise UserError(f"{file} cannot be read as HDF5: {first_line(error)}; download it again") from error
    log_counts("scenes that became others", others)
    return others


def _variables(release: Any, take: str, file: Path) -> tuple[Any, np.ndarray]:
    """The pictures, to be read one at a time, and the references to the names in `sceneTypes` (N,)."""
    for name in (take, "sceneTypes"):
        if name not in release or not hasattr(release[name], "shape"):
            raise UserError(f"{file} has no variable {name}: is it nyu_depth_v2_labeled.mat of the release?")
    pictures, types, kind = release[take], release["sceneTypes"][()].ravel(), KINDS[take]
    shape, names = pictures.shape, len(types)
    fits = len(shape) == kind.ndim and pictures.dtype.kind == kind.dtype and shape[0] == names
    if not fits or types.dtype.kind != "O":
        found = f"{shape} of {pictures.dtype}, and {names} sceneTypes of {types.dtype}"
        raise UserError(f"{file}: expected {take} {kind.expected} and N names, found {found}")
    return pictures, types


def _check_numbers(tests: np.ndarray, count: int, splits: Path, file: Path) -> None:
    if tests.dtype.kind not in "iuf" or not len(tests) or (tests != tests.astype(np.int64)).any():
        raise UserError(f"{splits}: testNdxs should hold the numbers of the test images")
    if tests.min() < 1 or tests.max() > count:
        raise UserError(f"{splits}: testNdxs {tests.min()} to {tests.max()}, but {file} holds images 1 to {count}")
    if len(np.unique(tests)) < len(tests):
        raise UserError(f"{splits}: testNdxs holds a number twice")


def _text(release: Any, reference: Any, where: str) -> str:
    """The text that an entry of a cell array refers to: MATLAB stores UTF-16 code units."""
    codes = release[reference] if reference else None
    if getattr(codes, "dtype", None) != np.uint16 or not codes.size:
        raise UserError(f"{where} is no text: is it the file of the release?")
    return codes[()].ravel().astype("<u2").tobytes().decode("utf-16-le", "replace")


def _millimetres(depth: np.ndarray, where: str) -> np.ndarray:
    """(width, height) metres to (height, width) millimetres, uint16."""
    depth = np.rint(depth.T.astype(np.float64) * 1000)
    if not np.isfinite(depth).all() or depth.min() < 0 or depth.max() > 65535:
        raise UserError(f"{where}: {depth.min() / 1000:g} to {depth.max() / 1000:g} should be metres, from 0 to 65.535")
    return depth.astype(np.uint16)


def _colours(picture: np.ndarray, where: str) -> np.ndarray:
    """(3, width, height) to (height, width, 3), uint8."""
    if len(picture) != 3 or picture.dtype != np.uint8:
        raise UserError(f"{where}: {picture.shape} of {picture.dtype} should be (3, width, height) of 8 bits")
    return np.ascontiguousarray(picture.T)


class Kind(NamedTuple):
    """A variable of the release, and how one of its pictures becomes pixels."""

    ndim: int
    dtype: str  # numpy's letter for the kind of number
    expected: str
    pixels: Callable[[np.ndarray, str], np.ndarray]


KINDS = {
    "depths": Kind(3, "f", "(N, width, height) in metres", _millimetres),
    "images": Kind(4, "u", "(N, 3, width, height) of 8 bits", _colours),
}
