"""Make an annotation of videos, and merge into it the texts of the steps, which are journals of JSON lines.

Entries keep their order, and new ones come last. A journal has the same order, so both are read side by side, in memory
that does not grow with them.
"""

import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import UserError, parse
from ..data.tables import read_manifest
from ..data.vidal import SOURCE, read_annotation
from ..files import atomic_file, files_below, locked
from ..modalities import modality_class
from .steps import Entry

VIDEOS = [name for name in modality_class("video").extensions if name not in ("jpg", "jpeg", "png")]
LONGEST_ID = 200  # bytes; the names of results are longer, and file systems allow 255


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a journal, without a last line that a killed process has cut short."""
    with open(path, encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.endswith("\n"))


def append(journal: Path, lines: bytes) -> None:
    """Append lines to a journal, and wait until they are on the disk. Raises `UserError` if it is full."""
    try:
        with open(journal, "ab", buffering=0) as file:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {journal}: {error.strerror}") from error


def merge(annotation: Path, journals: Sequence[Path]) -> None:
    """Add the texts of journals to an annotation, then delete the journals. A kill leaves the old file or the new one.

    Raises `UserError` if the order of the entries has changed since the journals were written.
    """
    if journals:
        write_entries(annotation, _with_texts(annotation, journals))
    for path in journals:
        path.unlink()


def _with_texts(annotation: Path, journals: Sequence[Path]) -> Iterator[Entry]:
    """Yield the entries of an annotation, each with the texts that journals have for it."""
    rows = [_rows(path) for path in journals]
    heads = [next(each, None) for each in rows]
    for key, fields in read_annotation(annotation):
        for number, head in enumerate(heads):
            if head is not None and head["id"] == key:
                fields |= head["texts"]
                heads[number] = next(rows[number], None)
        yield Entry(key, fields)
    for path, head in zip(journals, heads, strict=True):
        if head is not None:
            problem = f"{path} has texts for {head['id']} that the annotation lacks or has in another place"
            raise UserError(f"{problem}: put the entry back, or delete the journal")


def write_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Write an annotation, one entry a line, atomically. `entries` may read it: its lock is held before they start."""
    with locked(path.with_name(f".{path.name}.lock"), wait=True), atomic_file(path) as file:
        start = b"{\n"
        for entry in entries:
            file.write(start + json.dumps(entry.id).encode() + b": " + json.dumps(entry.fields).encode())
            start = b",\n"
        file.write(b"\n}\n" if start == b",\n" else b"{}\n")


@dataclass(frozen=True)
class AnnotateOptions:
    """Make an annotation of videos with titles, or add new videos to it."""

    annotation: Path
    """annotation to write; the entries that it has are kept"""
    root: Path
    """folder of VIDAL's layout, to which paths of the videos are relative"""
    videos: Path
    """folder of the videos, with its subfolders"""
    titles: Path | None = None
    """table (CSV, TSV or JSON lines) with the columns path (below --videos) and title; None: file names are titles"""
    folder: str = "clips"
    """name of VIDAL's folder for the entries"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the annotation."""
    options = parse(AnnotateOptions, argv, "generate annotate")
    options.annotation.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect("")) as known:  # "": a temporary file
        known.execute("CREATE TABLE entries (id BLOB PRIMARY KEY, source BLOB UNIQUE) WITHOUT ROWID")
        write_entries(options.annotation, _entries(options, known))


def _entries(options: AnnotateOptions, known: sqlite3.Connection) -> Iterator[Entry]:
    """Yield the entries that the annotation has, then one for each new video.

    Raises `UserError` if a row of the table lacks its title or its video, or two videos would have one id.
    """
    insert, find = "INSERT OR IGNORE INTO entries VALUES (?, ?)", "SELECT source FROM entries WHERE id = ?"
    total = new = 0
    for key, fields in read_annotation(options.annotation) if options.annotation.exists() else ():
        total += known.execute(insert, [text and os.fsencode(text) for text in (key, fields.get(SOURCE))]).rowcount
        yield Entry(key, fields)
    for where, entry in _new_entries(options):
        row = [os.fsencode(entry.id), os.fsencode(entry.fields[SOURCE])]
        if known.execute(insert, row).rowcount:
            new += 1
            yield entry
        elif (first := known.execute(find, row[:1]).fetchone()) not in (None, (row[1],), (None,)):
            raise UserError(f"{where}: {entry.fields[SOURCE]} would have the id of {os.fsdecode(first[0])}: rename one")
    print(f"{total + new} entries, {new} of them new")


def _new_entries(options: AnnotateOptions) -> Iterator[tuple[str, Entry]]:
    """Yield where each video is listed, and its entry. Raises `UserError` if a row lacks its title or its video."""
    if not options.videos.is_dir():
        raise UserError(f"--videos {options.videos} is not a folder")
    base = Path(os.path.relpath(options.videos.resolve(), options.root.resolve()))  # `..` does not leave a link
    rows = read_manifest(options.titles) if options.titles else _named(options.videos)
    for where, row in rows:
        if not row.get("title") or not row.get("path"):
            raise UserError(f"{where}: a row needs a path and a title, in columns of these names")
        video = Path(row["path"])
        if not (options.videos / video).is_file():
            raise UserError(f"{where}: there is no video {options.videos / video}")
        key = "-".join(video.with_suffix("").parts)
        if len(os.fsencode(key)) > LONGEST_ID:
            raise UserError(f"{where}: the path {video} is longer than {LONGEST_ID} bytes: rename the file")
        yield where, Entry(key, {"folder": options.folder, "raw": row["title"], SOURCE: (base / video).as_posix()})


def _named(videos: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield a row for each video in a folder, with its name as the title."""
    for path in files_below(videos):
        if path.suffix.lower().lstrip(".") in VIDEOS:
            yield str(path), {"path": str(path.relative_to(videos)), "title": re.sub(r"[-_]+", " ", path.stem)}
