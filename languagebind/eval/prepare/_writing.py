"""Writes what a kind yields: a manifest, or class folders; whole, or not at all."""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
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

    def check(self, expected: Mapping[str, int], name: str, read: str) -> None:
        """Raise `UserError` where the counts are not those that the dataset should have; `read` says which files."""
        found = {"samples": self.samples, "captions": self.captions, "classes": len(self.labels)}
        wrong = [f"{found[key]} {key}, expected {count}" for key, count in expected.items() if found[key] != count]
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.left_out.items())
        left_out = f"; left out: {reasons}" if reasons else ""
        if wrong:
            raise UserError(
                f"{name}: {'; '.join(wrong)}: a table that was cut, or of another release. A part of the set needs a"
                f" config of its own, with its own `name` and `expect`{read}{left_out}"
            )

    def check_labels(self, classes: Collection[str], name: str, read: str) -> None:
        """Raise `UserError` where a label is no class; `read` says which files."""
        unknown = [label for label in self.labels if label not in classes]
        if unknown:
            count = f"({len(unknown)} are not)"
            raise UserError(f"{self.labels[unknown[0]]}: {unknown[0]!r} is no class of {name} {count}{read}")


def find_rows(
    rows: Iterator[dict[str, Any]], source: Path, folder: Path, by_class: bool
) -> tuple[list[dict[str, Any]], Tally, dict[Path, Path]]:
    """The manifest's rows, whose files lie below `folder`, or are to be linked there.

    Args:
        rows: what a kind yields.
        source: the download.
        folder: the manifest's folder, or the class folders' (`by_class`).
        by_class: files are to be at `<label>/<name>`.

    Returns:
        The rows that have a file, the counts of all, and the links to make: where -> which file, if it is there.

    Raises:
        UserError: two rows are of one file, a row has no class, or another file lies where a link should.
    """
    seen: dict[str, str] = {}
    kept, tally, links = [], Tally(), {}
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
        target = folder / path
        there, found = os.path.isfile(target), os.path.isfile(file)  # False, too, of a name that is too long
        if there and found and not file.samefile(target):
            raise UserError(f"{target} is there, and is not {file}: move one of them away")
        if not there:
            links[target] = file
        if there or found:
            kept.append(row)
        else:
            tally.missing.append(f"{wanted} ({where})")
    return kept, tally, links


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


def make_links(links: Mapping[Path, Path]) -> None:
    """Links, where -> to which file, in place of links to a download that is gone; none to a file that is missing."""
    for target, file in links.items():
        try:
            if os.path.islink(target):
                target.unlink()
            if os.path.isfile(file):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file.resolve())
        except OSError as error:
            raise UserError(f"cannot link {target} to {file}: {error.strerror}") from error


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
