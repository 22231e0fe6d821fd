"""Make the index that `languagebind.index` searches: a folder with what is in files, in `index.sqlite`, and what that
depends on, in `index.json`. A killed run continues where features were last committed, two seconds before or so. A
FAISS index for each modality is written when all files are done.
"""

import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from threading import Lock
from typing import Any

import faiss
import numpy as np
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

from .config import UserError, at_least, first_line, to_dict
from .distributed import own_device
from .eval.cache import weights_digest
from .files import files_below, locked, printable, temporary_name, write_atomic
from .hub.encoders import Encoders, load
from .modalities import UNUSED, DecodeError, Modality, modality_class, modality_names

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (  -- a row for each modality that reads the file, or one with NULL
    id INTEGER PRIMARY KEY, path BLOB, size INTEGER, mtime INTEGER, modality TEXT, done INTEGER, failure TEXT);
CREATE INDEX IF NOT EXISTS paths ON files (path);
CREATE INDEX IF NOT EXISTS not_done ON files (modality, id) WHERE NOT done;
CREATE TABLE IF NOT EXISTS windows (  -- no id is used twice, because a FAISS index may still have the old one
    id INTEGER PRIMARY KEY AUTOINCREMENT, file REFERENCES files ON DELETE CASCADE, start REAL, end REAL, features BLOB);
CREATE INDEX IF NOT EXISTS windows_of_file ON windows (file);
PRAGMA foreign_keys = ON;
CREATE TEMP TABLE listing (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER) WITHOUT ROWID;
"""
FRAMES = ("jpg", "jpeg", "png")  # of a video: they are indexed as pictures
ENDINGS = {
    name: tuple(f".{each}" for each in modality_class(name).extensions if name != "video" or each not in FRAMES)
    for name in modality_names()
}
WORDS = {"infrared": "infrared|thermal", "depth": "depth"}  # in names of files and folders
FLAT = 50_000  # vectors that FAISS compares one by one
INTERVAL = 0.1 if sys.stderr.isatty() else 30  # seconds between reports of progress
PAGE = 10_000  # rows of the database that are held at once
WINDOWS = 64  # of a task; the rest of a longer file is for a later task, which opens it again


@dataclass(frozen=True)
class IndexOptions:
    """Index a folder of media, or bring its index up to date. To search it: languagebind index search --help"""

    folder: tyro.conf.Positional[Path]
    """folder of the media, with its subfolders"""
    output: Path
    """folder of the index"""
    model: tuple[str, ...] = ()
    """runs, checkpoints, published models or hub ids, one for each modality; (): those that made the index"""
    window: float = 10.0
    """seconds of each window of a long sound or video; a rest below half of that joins the last; 0: do not cut"""
    pattern: tuple[str, ...] = ()
    """which modality reads which files, such as infrared=thermal/*.png; the first that fits decides"""
    max_seconds: float | None = None
    """longest sound or video; None: as in training, usually 10 minutes of sound and an hour of video"""
    batch_size: int = 16
    """windows that are encoded at once"""
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    """threads that read files"""
    device: str | None = None
    """PyTorch device; None: the first GPU, or else the CPU"""

    def __post_init__(self):
        at_least(0, window=self.window)
        at_least(1, batch_size=self.batch_size, workers=self.workers)


def modality_of(path: str | os.PathLike, names: Iterable[str]) -> str | None:
    """Return which of the modalities `names` reads a file, by its extension, or None.

    Where several read the extension, the word infrared, thermal or depth in the file's name, else in its folder's, else
    in that folder's folder's decides. Without it, 16-bit PNGs of one channel and TIFFs are depth, or else infrared, and
    others are images, or else infrared. Without a model for video, audio reads its sound.
    """
    path, names = Path(path), [*names]
    fits = [name for name, endings in ENDINGS.items() if path.name.lower().endswith(endings)]
    found = [name for name in names if name in fits]
    if len(found) < 2:
        return found[0] if found else "audio" if "video" in fits and "audio" in names else None
    for part in reversed(path.absolute().parts[-3:]):
        if named := [name for name in found if name in WORDS and re.search(WORDS[name], part, re.IGNORECASE)]:
            return named[0]
    head = b""
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(26)
    wide = head[24:] == b"\x10\0" or "image" not in fits  # PNG's number of bits and kind of colour
    order = ("depth", "infrared", "image") if wide else ("image", "infrared", "depth")
    return next((name for name in order if name in found), found[0])


def make_index(options: IndexOptions) -> str:
    """Make the index of a folder, or bring it up to date. Return what is in it, and why files failed, as text.

    Raises `UserError` if the index was made of something else, another process writes it, or the folder has no files.
    """
    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is not a folder")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with locked(options.output / ".lock"), closing(connect(options.output)) as db:
            db.executescript(SCHEMA)
            return _Update(db, options).run()
    except BlockingIOError as error:
        raise UserError(f"another process writes {options.output}: wait for its end") from error
    except (OSError, sqlite3.OperationalError) as error:
        raise UserError(f"cannot write {options.output}: {error}") from error


class _Update:
    def __init__(self, db: sqlite3.Connection, options: IndexOptions):
        self.db, self.options, self.folder = db, options, os.path.abspath(options.folder)
        self.one_encodes = Lock()

    def run(self) -> str:
        db, output, options, before = self.db, self.options.output, self.options, read_facts(self.options.output)
        now: dict[str, Any] = {"folder": self.folder, "window": options.window, "pattern": [*options.pattern]}
        check(output, before, now)
        sources = [os.path.abspath(x) if os.path.exists(x) else x for x in options.model]
        used = {"model": sources or before.get("model"), "max_seconds": options.max_seconds}
        if not used["model"]:
            raise UserError(f"{output} has no models yet: name them with --model")
        new, gone = self._list()
        left = new or db.execute("SELECT count(*) FROM files WHERE NOT done").fetchone()[0]
        if changed := left or any(before.get(key) != used[key] for key in used):
            self.encoders = load_encoders(used, options.device)
            now |= facts_of(self.encoders, self.encoders.modalities)
            check(output, before, now)
            if used["max_seconds"] != before.get("max_seconds"):  # files that were too long may be read now
                db.execute("UPDATE files SET done = 0, failure = NULL WHERE failure NOTNULL")
            self._assign()
        if changed or gone or not before.get("current"):
            # None until the index can be searched, and then whether its vectors are those of the database
            facts = before | now | used | {"current": before.get("current") and False}
            write_atomic(output / "index.json", json.dumps(facts).encode())
            db.commit()
            if changed:
                self._encode()
            for name in facts["modalities"]:
                _write_vectors(db, name, output / f"{name}.faiss")
            write_atomic(output / "index.json", json.dumps(facts | {"current": True}).encode())
        return f"{new} files new or changed, {gone} removed or changed\n{_report(db)}"

    def _list(self) -> tuple[int, int]:
        """Forget changed and removed files; put new and changed ones into the table `listing`. Return the numbers."""
        rows = _listing(self.folder, os.path.abspath(self.options.output))
        (db := self.db).executemany("INSERT INTO listing VALUES (?, ?, ?)", rows)
        if not db.execute("SELECT count(*) FROM listing").fetchone()[0]:  # such as a disk that is not mounted
            raise UserError(f"{self.folder} has no files")
        same = "listing.path = files.path AND listing.size = files.size AND listing.mtime = files.mtime"
        other = f"FROM files WHERE NOT EXISTS (SELECT * FROM listing WHERE {same})"
        (gone,) = db.execute(f"SELECT count(DISTINCT path) {other}").fetchone()
        db.execute(f"DELETE {other}")
        db.execute("DELETE FROM listing WHERE path IN (SELECT path FROM files)")
        return db.execute("SELECT count(*) FROM listing").fetchone()[0], gone

    def _assign(self) -> None:
        """Decide which modalities read the files in the table `listing`."""
        names, patterns = self.encoders.modalities, [each.partition("=") for each in self.options.pattern]
        for wrong in (each for each in patterns if each[0] not in names or not each[2]):
            raise UserError(f"--pattern {''.join(wrong)}: write MODALITY=PATTERN with one of {', '.join(names)}")

        def rows() -> Iterator[tuple[Any, ...]]:
            for path, size, mtime in self.db.execute("SELECT path, size, mtime FROM listing"):
                place = os.fsdecode(path)
                fit = (name for name, _, each in patterns if PurePath(place).match(each))
                name = next(fit, None) or modality_of(os.path.join(self.folder, place), names)
                for each in [name, *["audio"] * (name == "video" and "audio" in names)]:  # and the sound of a video
                    yield path, size, mtime, each, each is None

        self.db.executemany("INSERT INTO files (path, size, mtime, modality, done) VALUES (?, ?, ?, ?, ?)", rows())

    def _encode(self) -> None:
        """Encode all files that are not done. What a task leaves is in a later page."""
        db, workers, committed = self.db, self.options.workers, time.monotonic()
        known, left = "SELECT count(*) FROM windows WHERE file = files.id", "FROM files WHERE NOT done"
        select = f"SELECT id, path, ({known}) {left} AND modality = ? ORDER BY id LIMIT {PAGE}"
        bar = tqdm(total=db.execute(f"SELECT count(*) {left}").fetchone()[0], unit=" files", mininterval=INTERVAL)
        with bar, ThreadPoolExecutor(workers) as pool:
            for name in self.encoders.modalities:
                while page := db.execute(select, (name,)).fetchall():
                    size = min(self.options.batch_size, -(-len(page) // workers))
                    tasks = (page[i : i + size] for i in range(0, len(page), size))
                    results: Any = pool.map(partial(self._encode_files, name), tasks)
                    with closing(results):  # an interrupted run drops the tasks that wait
                        for windows, ends in results:
                            db.executemany("INSERT INTO windows VALUES (NULL, ?, ?, ?, ?)", windows)
                            db.executemany("UPDATE files SET done = 1, failure = ? WHERE id = ?", ends)
                            db.executemany("DELETE FROM windows WHERE file = ?", [end[1:] for end in ends if end[0]])
                            if time.monotonic() > committed + 2:
                                db.commit()
                                committed = time.monotonic()
                            bar.update(len(ends))
        db.commit()

    @torch.no_grad()
    def _encode_files(self, name: str, rows: Sequence[tuple[int, bytes, int]]) -> tuple[list[Any], list[Any]]:
        """Return the windows of files of a modality (id, start, end, features), and each file's end (failure, id)."""
        (model, modality), size, windows = self.encoders.encoders[name], self.options.batch_size, list[Any]()
        spans, inputs, ends = self._read(modality, rows)
        for batch in (slice(i, i + size) for i in range(0, len(inputs), size)):
            with self.one_encodes:
                x = model.project(torch.stack(inputs[batch]).to(model.logit_scale.device)).float()
            features = F.normalize(x, dim=-1).cpu().numpy()
            windows += [(*span, row.tobytes()) for span, row in zip(spans[batch], features, strict=True)]
        return windows, ends

    def _read(self, modality: Modality, rows: Sequence[tuple[int, bytes, int]]) -> tuple[list[Any], ...]:
        """Return the windows of files (id, start, end), their inputs, and the ends of files."""
        spans, inputs, ends = list[Any](), list[Any](), list[Any]()
        for number, path, known in rows:
            source, failure = os.path.join(self.folder, os.fsdecode(path)), None
            try:
                for start, end, raw in modality.windows(source, self.options.window, known):
                    if len(inputs) == WINDOWS:
                        return spans, inputs, ends
                    inputs.append(modality.transform(raw))
                    spans.append((number, start, end))
            except DecodeError as error:
                silent = error.reason == "no audio stream" and source.lower().endswith(ENDINGS["video"])
                failure = None if silent else error.reason
            except Exception as error:
                error.add_note(f"while reading {source}")
                raise
            ends.append((failure, number))
        return spans, inputs, ends


def _listing(folder: str, output: str) -> Iterator[tuple[bytes, int, int]]:
    for path in files_below(Path(folder)):
        with suppress(OSError):  # of a link to nothing, or a file that was just removed
            status = os.stat(path)
            if not path.is_relative_to(output):
                yield os.fsencode(os.path.relpath(path, folder)), status.st_size, status.st_mtime_ns


def _write_vectors(db: sqlite3.Connection, name: str, path: Path) -> None:
    """Write the FAISS index of a modality's features."""
    source = "FROM windows CROSS JOIN files ON files.id = file WHERE modality = ?"  # in the order of the windows
    count, size = db.execute(f"SELECT count(*), max(length(features)) {source}", (name,)).fetchone()
    index = new_vectors(count, (size or 4) // 4)
    if not index.is_trained:  # FAISS wants at least 39 vectors for each list
        every = max(1, count // (50 * index.nlist))
        index.train(_matrix(db.execute(f"SELECT features {source} AND windows.id % ? = 0", (name, every)).fetchall()))
    pages = db.execute(f"SELECT features, windows.id {source} ORDER BY windows.id", (name,))
    while page := pages.fetchmany(PAGE):
        index.add_with_ids(_matrix(page), np.array([row[1] for row in page]))
    try:
        faiss.write_index(index, str(temporary_name(path)))
    except RuntimeError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
    temporary_name(path).replace(path)


def new_vectors(count: int, size: int) -> Any:
    """Return an empty FAISS index of inner products for `count` vectors of `size` numbers: flat, or IVF for many."""
    if count <= FLAT:
        return faiss.index_factory(size, "IDMap2,Flat", faiss.METRIC_INNER_PRODUCT)
    # FAISS's wiki, Guidelines to choose an index: 4 to 16 times the root of the number of vectors. A sixteenth of them
    # is searched, which is much, because queries of another modality than the vectors lie beside them.
    index: Any = faiss.index_factory(size, f"IVF{int(4 * count**0.5)},Flat", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = index.nlist // 16
    return index


def _matrix(rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
    return np.frombuffer(b"".join(row[0] for row in rows), np.float32).reshape(len(rows), -1)


def connect(path: Path) -> sqlite3.Connection:
    """Open the database of an index."""
    return sqlite3.connect(path / "index.sqlite", timeout=60)


def read_facts(path: Path) -> dict[str, Any]:
    """Return what an index depends on, or nothing for a new one."""
    file = path / "index.json"
    return json.loads(file.read_bytes()) if file.exists() else {}


def load_encoders(facts: dict[str, Any], device: str | None) -> Encoders:
    """Load the models that the facts of an index name."""
    limits = {"max_seconds": facts["max_seconds"]} if facts["max_seconds"] else {}
    return load(*facts["model"], device=own_device(device), **limits)


def facts_of(encoders: Encoders, names: Sequence[str]) -> dict[str, Any]:
    """Return what an index of some modalities depends on: the weights, and the options that change the inputs."""
    found: dict[str, Any] = {"modalities": [name for name in encoders.modalities if name in names]}
    for name in found["modalities"]:
        found[f"weights of {name}"] = weights_digest(encoders.model(name))[:16]
        options = to_dict(encoders.encoders[name][1])
        found |= {f"{name}'s {key}": value for key, value in options.items() if key not in UNUSED}
    return found


def check(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `UserError` if an index was made with other facts. A fact that is newer than the index is not compared."""
    if changed := [key for key in now if before.get(key, now[key]) != now[key]]:
        was, found = before[changed[0]], now[changed[0]]
        raise UserError(f"{path} was made with {changed[0]} {was}, not {found}: use the same, or another --output")


def _report(db: sqlite3.Connection) -> str:
    """Return lines that say what is in an index, and the commonest reasons why files failed."""
    counts, failed = "modality, count(DISTINCT files.id), count(windows.id)", "FROM files WHERE failure NOTNULL"
    rows = db.execute(f"SELECT {counts} FROM files JOIN windows ON file = files.id GROUP BY modality")
    lines = [f"{name}: {files} files, {windows} windows" for name, files, windows in rows] or ["no file is indexed"]
    unread, failures = db.execute("SELECT count(*) - count(modality), count(failure) FROM files").fetchone()
    lines.append(f"{unread} that no model reads, {failures} failed{', as index.sqlite lists:' if failures else ''}")
    reasons = f"SELECT failure, count(*), min(path) {failed} GROUP BY failure ORDER BY 2 DESC LIMIT 5"
    lines += [f"  {why}: {n}, such as {printable(os.fsdecode(path))}" for why, n, path in db.execute(reasons)]
    return "\n".join(lines)
