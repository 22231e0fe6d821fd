"""Writes what a kind yields: a manifest, or class folders; whole, or not at all."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import UserError
from ...files import is_plain, temporary_name, write_atomic

# Of rows without a file, as many as are shown.
SHOWN_MISSING = 5


@dataclass
class Tally:
    """The counts of a table, with the rows that have no file."""

    samples: int = 0
    captions: int = 0
    labels: dict[str, str] = field(default_factory=dict)  # label -> where it was seen first
    missing: list[str] = field(default_factory=list)  # "path below the download (place in the table)"
    left_out: Mapping[str, int] = field(default_factory=dict)  # what the kind says it left out: reason -> how many

    def check(self, expected: Mapping[str, int], name: str) -> None:
        """Raise `UserError` where the counts are not those that the dataset should have."""
        found = {"samples": self.samples, "captions": self.captions, "classes": len(self.labels)}
        wrong = [f"{found[key]} {key}, expected {count}" for key, count in expected.items() if found[key] != count]
        if wrong:
            raise UserError(
                f"{name}: {'; '.join(wrong)}: a table that was cut, or of another release. A part of the set needs a"
                " config of its own, with its own `name` and `expect`"
            )

    def check_labels(self, classes: Iterable[str], name: str) -> None:
        """Raise `UserError` where a label is no class."""
        unknown = [label for label in self.labels if label not in set(classes)]
        if unknown:
            raise UserError(f"{self.labels[unknown[0]]}: {unknown[0]!r} is no class of {name} ({len(unknown)} are not)")


def place_rows(
    rows: Iterator[dict[str, Any]], source: Path, folder: Path, by_class: bool
) -> tuple[list[dict[str, Any]], Tally]:
    """The manifest's rows, their files below `folder`: as they are there, or as links into the download.

    Args:
        rows: what a kind yields.
        source: the download.
        folder: the manifest's folder, or the class folders' (`by_class`).
        by_class: files are to be at `<label>/<name>`.

    Returns:
        The rows that have a file, and the counts of all.

    Raises:
        UserError: two rows are of one file, or a row has no class.
    """
    seen: dict[str, str] = {}
    kept, tally = [], Tally()
    for row in _with_result(rows, tally):
        row = dict(row)
        where = row.pop("where", row["path"])
        wanted = row["path"]
        file = source / wanted
        if by_class:
            row["path"] = _class_path(row, where)
        path = row["path"]
        if path in seen:
            raise UserError(f"{where}: {path} is there twice, first at {seen[path]}")
        seen[path] = where
        tally.samples += 1
        tally.captions += count_captions(row)
        for label in row.get("labels", [row["label"]] if "label" in row else []):
            tally.labels.setdefault(str(label), where)
        if _place(file, folder / path):
            kept.append(row)
        else:
            tally.missing.append(f"{wanted} ({where})")
    return kept, tally


def _with_result(rows: Iterator[dict[str, Any]], tally: Tally) -> Iterator[dict[str, Any]]:
    """The rows; what a kind returns at the end are the counts of what it left out."""
    tally.left_out = (yield from rows) or {}


def count_captions(row: dict[str, Any]) -> int:
    """How many captions a manifest's row has."""
    return len(row.get("captions", ())) + ("caption" in row)


def refuse_missing(tally: Tally, source: Path, name: str) -> None:
    """Raise `UserError` if rows have no file."""
    if tally.missing:
        first = "; ".join(tally.missing[:SHOWN_MISSING])
        count = f"{len(tally.missing)} of {tally.samples} files are not below {source}"
        raise UserError(f"{name}: {count}: {first}; --skip-missing leaves such rows out and lists them")


def write_manifest(rows: Iterable[dict[str, Any]], manifest: Path) -> None:
    """JSON lines."""
    write_atomic(manifest, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes its name, and another's place, at the end. An exception inside leaves no trace."""
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _class_path(row: dict[str, Any], where: str) -> str:
    """`<label>/<name>`: a kind that writes files has put them there; others' files are linked there."""
    label = row.get("label")
    if not isinstance(label, str) or "/" in label or label.startswith(".") or not is_plain(label):
        raise UserError(f"{where}: the label {label!r} cannot be the name of a folder; a .jsonl as `data:` can hold it")
    path = row["path"]
    return path if path.startswith(f"{label}/") else f"{label}/{Path(path).name}"


def _place(file: Path, target: Path) -> bool:
    """Have a file at `target`, by a link if need be; False if there is none."""
    if target.is_file():
        if file.is_file() and not file.samefile(target):
            raise UserError(f"{target} is there, and is not {file}: move one of them away")
        return True
    try:
        if target.is_symlink():  # to a download that is gone
            target.unlink()
        if not file.is_file():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file.resolve())
    except OSError as error:
        raise UserError(f"cannot link {target} to {file}: {error.strerror}") from error
    return True
