"""Turn what a kind yields into a manifest or class folders, written whole or not at all."""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...config import UserError, first_line
from ...files import temporary_name, write_atomic

Row = dict[str, Any]
SHOWN_MISSING = 5  # paths in the message about missing files


@dataclass
class Listing:
    """The rows of a dataset, the links they need, and the counts to check."""

    rows: list[Row] = field(default_factory=list)  # those whose file exists
    links: dict[Path, Path] = field(default_factory=dict)  # where to link -> to which file, which may be missing
    samples: int = 0  # with those whose file is missing; captions and labels likewise
    captions: int = 0
    labels: dict[str, str] = field(default_factory=dict)  # label -> the place where it comes first
    missing: list[str] = field(default_factory=list)  # "path below the download (place in the table)"
    left_out: dict[str, int] = field(default_factory=dict)  # what the kind left out or changed: reason -> count

    @property
    def reasons(self) -> str:
        """What the kind left out or changed, for messages."""
        return ", ".join(f"{reason} ({count})" for reason, count in sorted(self.left_out.items()))

    def refuse_missing(self, source: Path, name: str) -> None:
        """Raise `UserError` if rows have no file."""
        if self.missing:
            first = "; ".join(self.missing[:SHOWN_MISSING])
            count = f"{len(self.missing)} of {self.samples} files are not below {source}"
            raise UserError(f"{name}: {count}: {first}; --skip-missing leaves such rows out and lists them")

    def check_counts(self, expected: Mapping[str, int], name: str, read: str) -> None:
        """Raise `UserError` unless the counts are those of the dataset; `read` says which files were read."""
        found = {"samples": self.samples, "captions": self.captions, "classes": len(self.labels)}
        wrong = [f"{found[key]} {key}, expected {count}" for key, count in expected.items() if found[key] != count]
        if wrong:
            left_out = f"; left out or changed: {self.reasons}" if self.reasons else ""
            raise UserError(
                f"{name}: {'; '.join(wrong)}: the table is cut off or from another release. A subset needs a config of"
                f" its own, with its own `name` and `expect`{read}{left_out}"
            )

    def check_labels(self, classes: Collection[str], name: str, read: str) -> None:
        """Raise `UserError` if a label is not a class; `read` says which files were read."""
        unknown = [label for label in self.labels if label not in classes]
        if unknown:
            others = f" ({len(unknown)} labels are not)" if len(unknown) > 1 else ""
            raise UserError(f"{self.labels[unknown[0]]}: {unknown[0]!r} is not a class of {name}{others}{read}")


def list_rows(rows: Iterator[Row], source: Path, folder: Path, by_class: bool) -> Listing:
    """Collect what a kind yields, and find each row's file.

    Args:
        rows: as the kind yields them.
        source: the download.
        folder: the manifest's folder, or that of the class folders (`by_class`).
        by_class: put each file at `<label>/<name>`.

    Raises:
        UserError: two rows share a file, a label cannot name a folder, or another file lies where a link should.
    """
    seen: dict[str, str] = {}
    listing = Listing()
    for kind_row in _with_result(rows, listing):
        row = dict(kind_row)
        wanted = row["path"]
        where = row.pop("where", wanted)
        if by_class:
            row["path"] = _class_path(row, where)
        path = row["path"]
        if path in seen:
            raise UserError(f"{where}: {path} is listed twice, first at {seen[path]}")
        seen[path] = where
        listing.samples += 1
        listing.captions += count_captions(row)
        for label in row.get("labels", [row["label"]] if "label" in row else []):
            listing.labels.setdefault(str(label), where)
        file, target = source / wanted, folder / path
        exists, found = os.path.isfile(target), os.path.isfile(file)  # False, not an error, for a name too long
        if exists and found and not file.samefile(target):
            raise UserError(f"{target} exists and is not {file}: move one of them away")
        if not exists:
            listing.links[target] = file
        if exists or found:
            listing.rows.append(row)
        else:
            listing.missing.append(f"{wanted} ({where})")
    return listing


def _with_result(rows: Iterator[Row], listing: Listing) -> Iterator[Row]:
    """Yield the rows, then keep the counts that the kind's generator returns."""
    listing.left_out = (yield from rows) or {}


def _class_path(row: Row, where: str) -> str:
    """Return `<label>/<name>`; a kind that writes the files itself has put them there already."""
    label, path = row.get("label"), row["path"]
    if not label or "/" in label or label.startswith("."):
        raise UserError(f"{where}: the label {label!r} cannot name a folder; set `data:` to a .jsonl file instead")
    return path if path.startswith(f"{label}/") else f"{label}/{Path(path).name}"


def count_captions(row: Row) -> int:
    """Return the number of captions in a manifest's row."""
    return len(row.get("captions", ())) + ("caption" in row)


def make_links(links: Mapping[Path, Path]) -> None:
    """Link each file that exists, and remove the links of an earlier run to files that are gone."""
    for target, file in links.items():
        if os.path.islink(target):
            target.unlink()
        if os.path.isfile(file):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file.resolve())


def write_manifest(rows: Iterable[Row], manifest: Path) -> None:
    """Write the rows as JSON lines."""
    write_atomic(manifest, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write_png(image: Image.Image, target: Path) -> None:
    """Store an image as PNG, and make its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, "PNG")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the place of `folder` at the end; an exception inside leaves no trace."""
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn whatever a library raises about a damaged or missing file into a `UserError` that names the file."""
    try:
        yield
    except Exception as error:  # of many kinds: those of PIL, expat, json, h5py and SciPy
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"cannot read {file}: {reason}; check --source, or download the file again") from error
