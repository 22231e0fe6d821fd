"""Turn the rows of a kind of dataset into a manifest or class folders."""

import os
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...config import UserError, first_line
from ...files import is_plain
from ..data.datasets import DatasetConfig

Row = dict[str, Any]
SHOWN_MISSING = 5  # missing files that a message lists


@dataclass
class Listing:
    """The rows of a dataset, including rows whose file is missing, and the links to make."""

    rows: dict[str, Row] = field(default_factory=dict)  # by path
    links: dict[Path, Path] = field(default_factory=dict)  # path of a link -> its file, which may be missing
    labels: dict[str, str] = field(default_factory=dict)  # label -> place of its first row
    missing: dict[str, str] = field(default_factory=dict)  # a row's path -> "path below the download (place)"
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> number of samples left out or changed
    unexpected: list[str] = field(default_factory=list)  # counts that differ from the YAML's `expect`

    @property
    def kept(self) -> list[Row]:
        """The rows whose file exists."""
        return [row for path, row in self.rows.items() if path not in self.missing]

    def check(
        self, dataset: DatasetConfig, classes: Collection[str], source: Path, skip_missing: bool, strict: bool = False
    ) -> None:
        """Raise `UserError` if a file is missing, or a label is not a class. With `strict`, also for other counts."""
        name, expect = dataset.name, dataset.expect
        if self.missing and not (skip_missing and self.kept):
            first = "; ".join(list(self.missing.values())[:SHOWN_MISSING])
            count = f"{len(self.missing)} of {len(self.rows)} files are not below {source}"
            raise UserError(f"{name}: {count}: {first}; --skip-missing leaves these rows out and lists them")
        found = {"samples": len(self.rows), "captions": count_captions(self.rows.values()), "classes": len(self.labels)}
        self.unexpected = [f"{found[key]} {key}, expected {x}" for key, x in expect.items() if found[key] != x]
        if (self.unexpected and strict) or not self.rows:
            counts = ", ".join(f"{reason} ({count})" for reason, count in self.left_out.items()) or "nothing"
            reason = f"{'; '.join(self.unexpected) or 'no samples'}: {source} is incomplete or from another release"
            advice = "to use a subset, write a config with its own `name` and `expect`"
            raise UserError(f"{name}: {reason} (left out or changed: {counts}); {advice}")
        if unknown := [label for label in self.labels if label not in classes]:
            place, others = self.labels[unknown[0]], len(unknown) - 1
            raise UserError(f"{place}: {unknown[0]!r} is not a class of {name} (other unknown labels: {others})")


def list_rows(rows: Generator[Row, None, Any], source: Path, folder: Path, by_class: bool) -> Listing:
    """Return the rows of a kind, with the links to make in `folder` to the files below `source`.

    With `by_class`, a file belongs at `<label>/<name>`. Raises `UserError` if two rows share a file, a label cannot
    name a folder, or another file is in the place of a link.
    """
    places: dict[str, str] = {}
    listing = Listing()

    def with_result() -> Iterator[Row]:
        listing.left_out = (yield from rows) or {}

    for row in with_result():
        file, where = source / row["path"], str(row.get("where", row["path"]))
        path = _class_path(row, where) if by_class else row["path"]
        if path in places:
            raise UserError(f"{where}: {path} is listed twice, first at {places[path]}")
        places[path] = where
        listing.rows[path] = {key: value for key, value in row.items() if key != "where"} | {"path": path}
        for label in row.get("labels", [row["label"]] if "label" in row else []):
            listing.labels.setdefault(label, where)
        target = folder / path
        exists, found = os.path.isfile(target), os.path.isfile(file)  # False, not an error, for overlong names
        if exists and found and not file.samefile(target):
            raise UserError(f"{target} exists and is not {file}: move or delete one of them")
        if not exists:
            listing.links[target] = file
        if not (exists or found):
            listing.missing[path] = f"{row['path']} ({where})"
    return listing


def _class_path(row: Row, where: str) -> str:
    """Return the path `<label>/<name>` of a row's file. Kinds that write the files themselves already use it."""
    label, path = row.get("label"), row["path"]
    if not label or "/" in label or label.startswith("."):
        raise UserError(f"{where}: the label {label!r} cannot name a folder: set `data:` to a .jsonl file instead")
    return path if path.startswith(f"{label}/") else f"{label}/{Path(path).name}"


def count_captions(rows: Iterable[Row]) -> int:
    """Return the number of captions in a manifest's rows."""
    return sum(len(row.get("captions", ())) + ("caption" in row) for row in rows)


def make_links(links: Mapping[Path, Path]) -> None:
    """Make a link to each file that exists, and remove an earlier run's links to files that are gone."""
    for target, file in links.items():
        if os.path.islink(target):
            target.unlink()
        if os.path.isfile(file):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file.resolve())


def write_png(image: Image.Image, target: Path) -> None:
    """Write an image as a PNG, and create its folder if needed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, "PNG")


def inside(path: str, where: object) -> str:
    """Return a path that stays in the folder of the download. Raises `UserError` for other paths."""
    if path.startswith("/") or ".." in path.split("/") or not is_plain(path):
        raise UserError(f"{where}: {path!r} is not a path in the folder of the download")
    return path


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn any error of a library about a damaged or missing file into a `UserError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # PIL, expat, json, h5py and SciPy raise many types
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"cannot read {file}: {reason}; check --source, or download the file again") from error
