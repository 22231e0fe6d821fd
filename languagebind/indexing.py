"""Make the index that `languagebind.index` searches: `index.sqlite` (files, windows, features), `index.json` (what they
depend on), and a FAISS file for each modality, written at the end.
"""

import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event, Lock
from typing import Any

import faiss
import numpy as np
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

from .config import UserError, at_least, refuse_changes, to_dict
from .distributed import own_device
from .eval.cache import weights_digest
from .files import atomic_file, files_below, locked, parse_json, printable, write_atomic
from .hub.encoders import Encoders, load
from .modalities import UNUSED, DecodeError, Modality, modality_class, modality_names
from .model import DualEncoder

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (  -- a row for each modality that reads the file, or one with NULL
    id INTEGER PRIMARY KEY, path BLOB, size INTEGER, mtime INTEGER, modality TEXT, done INTEGER, failure TEXT);
CREATE TABLE IF NOT EXISTS windows (  -- no id is used twice, because a FAISS index may still have the old one
    id INTEGER PRIMARY KEY AUTOINCREMENT, file REFERENCES files ON DELETE CASCADE, start REAL, end REAL, features BLOB);
CREATE INDEX IF NOT EXISTS windows_of_file ON windows (file);
PRAGMA foreign_keys = ON;
CREATE TEMP TABLE listing (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER) WITHOUT ROWID;
CREATE TEMP TABLE fresh (path BLOB, size INTEGER, mtime INTEGER, modality TEXT, done INTEGER);
"""
NEW, GONE = "(path, size, mtime) NOT IN (SELECT path, size, mtime FROM files)", "(path, size, mtime) NOT IN listing"
ENDINGS = {name: tuple(f".{each}" for each in modality_class(name).extensions) for name in modality_names()}
ENDINGS["video"] = tuple(each for each in ENDINGS["video"] if each not in ENDINGS["image"])  # its frames are pictures
FLAT = 50_000  # vectors that FAISS compares one by one
DATABASE = "index.sqlite"
PAGE = 10_000  # rows of the database that are held at once
ONE_ENCODES = Lock()
Rows = Sequence[tuple[Any, ...]]
check = partial(refuse_changes, advice="use the same, or another --output")


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

    Where several read the extension, the last word infrared, thermal or depth in the names of the file, its folder and
    that folder's folder decides. Without it, 16-bit PNGs of one channel and TIFFs are depth, or else infrared, and
    others are images, or else infrared. Without a model for video, audio reads its sound.
    """
    path, names = Path(path), [*names]
    fits = [name for name, endings in ENDINGS.items() if path.name.lower().endswith(endings)]
    found = [name for name in names if name in fits]
    if len(found) < 2:
        return found[0] if found else "audio" if "video" in fits and "audio" in names else None
    words = re.findall("depth|infrared|thermal", "/".join(path.absolute().parts[-3:]).lower())
    named = [word.replace("thermal", "infrared") for word in reversed(words)]
    head = b""
    if path.is_file():  # not a pipe, which would wait for a writer
        with suppress(OSError), open(path, "rb") as file:
            head = file.read(26)
    wide = head[24:] == b"\x10\0" or "image" not in fits  # PNG's number of bits and kind of colour
    order = ("depth", "infrared", "image") if wide else ("image", "infrared", "depth")
    return next((name for name in (*named, *order) if name in found), found[0])


def make_index(options: IndexOptions) -> str:
    """Make the index of a folder, or bring it up to date. Return what is in it, and why files failed, as text.

    Raises `UserError` if the index was made with other facts, another process writes it, or the folder is empty.
    """
    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is not a folder")
    if options.output.resolve() == options.folder.resolve():
        raise UserError("--output is the folder of the media: choose another")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with locked(options.output / ".lock"), closing(sqlite3.connect(options.output / DATABASE, timeout=60)) as db:
            db.executescript(SCHEMA)
            return _update(db, options)
    except BlockingIOError as error:
        raise UserError(f"another process writes {options.output}: wait for its end") from error
    except (OSError, sqlite3.DatabaseError) as error:
        raise UserError(f"cannot make {options.output}: {error}") from error


def _update(db: sqlite3.Connection, options: IndexOptions) -> str:
    output, before = options.output, read_facts(options.output)
    limits: Any = {} if options.max_seconds is None else {"max_seconds": options.max_seconds}
    now = {"folder": os.path.abspath(options.folder), "window": options.window, "limits": limits}
    check(output, before, now)
    if not before and db.execute("SELECT 1 FROM files").fetchone():
        raise UserError(f"{output / 'index.json'} is missing: delete {output}, and index the folder again")
    model = [os.path.abspath(x) if os.path.exists(x) else x for x in options.model] or before.get("model")
    if not model:
        raise UserError(f"{output} has no models yet: name them with --model")
    new, gone, unlistable = _list(db, options)
    whole = before.get("current") and all((output / f"{name}.faiss").exists() for name in before["modalities"])
    if new or gone or not whole or before["model"] != model:
        encoders = load(*model, device=own_device(options.device), **limits)
        now |= facts_of(encoders, encoders.modalities)
        check(output, before, now)
        for row in db.execute(f"SELECT * FROM listing WHERE {NEW}"):
            name = modality_of(options.folder / os.fsdecode(row[0]), encoders.modalities)
            sound = ["audio"] if name == "video" and "audio" in encoders.modalities else []
            rows = ((*row, each, each is None) for each in (name, *sound))
            db.executemany("INSERT INTO fresh VALUES (?, ?, ?, ?, ?)", rows)
        db.execute(f"DELETE FROM files WHERE {GONE}")  # only now, because it locks the database
        db.execute("INSERT INTO files (path, size, mtime, modality, done) SELECT * FROM fresh")
        # None until the index can be searched, and then whether its vectors are those of the database
        facts = now | {"model": model, "current": None if before.get("current") is None else False}
        write_atomic(output / "index.json", json.dumps(facts).encode())
        db.commit()
        _encode(db, options, encoders)
        for name in encoders.modalities:
            _write_vectors(db, name, output / f"{name}.faiss")
        write_atomic(output / "index.json", json.dumps(facts | {"current": True}).encode())
    lines = [f"{new} files new or changed, {gone} removed or changed", *_report(db)]
    if unlistable:
        lines.append(f"{len(unlistable)} folders cannot be listed, such as {printable(unlistable[0])}")
    return "\n".join(lines)


def _list(db: sqlite3.Connection, options: IndexOptions) -> tuple[int, int, list[str]]:
    """Put all files into `listing`. Return how many are new, how many are gone, and folders that cannot be listed."""
    output, unlistable = os.path.abspath(options.output), list[str]()

    def keep(error: OSError) -> None:
        """Take what was below a folder that cannot be listed now as if it were still there."""
        unlistable.append(error.filename)
        start = os.fsencode(os.path.relpath(error.filename, options.folder)) + b"/"
        known = "SELECT DISTINCT path, size, mtime FROM files WHERE substr(path, 1, ?) = ?"
        db.execute(f"INSERT INTO listing {known}", (len(start), start))

    for path in files_below(options.folder, keep):
        with suppress(OSError):  # of a link to nothing, or a file that was just removed
            status, name = os.stat(path), os.fsencode(path.relative_to(options.folder))
            if not Path(os.path.abspath(path)).is_relative_to(output):
                db.execute("INSERT INTO listing VALUES (?, ?, ?)", (name, status.st_size, status.st_mtime_ns))
    (found,) = db.execute("SELECT count(*) FROM listing").fetchone()
    if not found:  # such as a disk that is not mounted
        raise UserError(f"{options.folder} has no files that can be listed")
    (new,) = db.execute(f"SELECT count(*) FROM listing WHERE {NEW}").fetchone()
    (gone,) = db.execute(f"SELECT count(DISTINCT path) FROM files WHERE {GONE}").fetchone()
    return new, gone, unlistable


def _encode(db: sqlite3.Connection, options: IndexOptions, encoders: Encoders) -> None:
    """Encode all files that are not done. A kill loses the last two seconds and the tasks under way."""
    committed, (total,) = 0.0, db.execute("SELECT count(*) FROM files WHERE NOT done").fetchone()
    select = f"SELECT id, path FROM files WHERE NOT done AND modality = ? ORDER BY id LIMIT {PAGE}"
    stop, bar = Event(), tqdm(total=total, unit=" files", mininterval=0.1 if sys.stderr.isatty() else 30)
    with bar, ThreadPoolExecutor(options.workers) as pool, ExitStack() as end:
        end.callback(db.commit)
        end.callback(pool.shutdown, cancel_futures=True)
        end.callback(stop.set)  # after an exception, what is under way ends with its next window
        for name, encoder in encoders.encoders.items():
            size = 1 if hasattr(encoder[1], "max_seconds") else options.batch_size  # files of a task
            while page := db.execute(select, (name,)).fetchall():
                tasks = (page[i : i + size] for i in range(0, len(page), size))
                for task in as_completed(pool.submit(_encode_files, options, stop, *encoder, rows) for rows in tasks):
                    windows, ends, seconds = task.result()
                    db.executemany("INSERT INTO windows VALUES (NULL, ?, ?, ?, ?)", windows)
                    db.executemany("UPDATE files SET done = 1, failure = ? WHERE id = ?", ends)
                    bar.update(len(ends))
                    if seconds > 0.2 or time.monotonic() > committed + 2:
                        db.commit()
                        committed = time.monotonic()


@torch.no_grad()
def _encode_files(
    options: IndexOptions, stop: Event, model: DualEncoder, modality: Modality, rows: Rows
) -> tuple[Rows, Rows, float]:
    """Return the windows of files (id, start, end, features), each file's end (failure, id), and the time it took."""
    windows, failures, begin = list[Any](), dict[int, str](), time.monotonic()

    def read() -> Iterator[tuple[Any, ...]]:
        for number, path in rows:
            source = options.folder / os.fsdecode(path)
            try:
                for start, end, raw in modality.windows(source, options.window):
                    yield number, start, end, modality.transform(raw)
                    if stop.is_set():
                        return
            except DecodeError as error:
                if error.reason != "no audio stream" or not source.name.lower().endswith(ENDINGS["video"]):
                    failures[number] = error.reason
            except Exception as error:
                error.add_note(f"while reading {source}")
                raise

    inputs = read()
    while batch := [*islice(inputs, options.batch_size)]:
        *spans, tensors = zip(*batch, strict=True)
        with ONE_ENCODES:
            x = model.project(torch.stack(tensors).to(model.logit_scale.device)).float()
        windows += zip(*spans, map(np.ndarray.tobytes, F.normalize(x, dim=-1).cpu().numpy()), strict=True)
    done = [(failures.get(number), number) for number, _ in rows]
    return [window for window in windows if window[0] not in failures], done, time.monotonic() - begin


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
    with atomic_file(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]


def new_vectors(count: int, size: int) -> Any:
    """Return an empty FAISS index of inner products for `count` vectors of `size` numbers: flat, or IVF for many."""
    if count <= FLAT:
        return faiss.index_factory(size, "IDMap2,Flat", faiss.METRIC_INNER_PRODUCT)
    # FAISS's wiki, Guidelines to choose an index: 4 to 16 times the root of the number of vectors. A sixteenth of them
    # is searched, which is much, because queries of another modality than the vectors lie beside them.
    index: Any = faiss.index_factory(size, f"IVF{int(4 * count**0.5)},Flat", faiss.METRIC_INNER_PRODUCT)
    index.nprobe, index.cp.niter = index.nlist // 16, 5  # more rounds of k-means find no more
    return index


def _matrix(rows: Rows) -> np.ndarray:
    return np.frombuffer(b"".join(row[0] for row in rows), np.float32).reshape(len(rows), -1)


def read_facts(path: Path) -> dict[str, Any]:
    """Return what an index depends on, or nothing for a new one."""
    file = path / "index.json"
    try:
        return parse_json(file.read_bytes()) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): delete {path}, and index the folder again") from error


def facts_of(encoders: Encoders, names: Sequence[str]) -> dict[str, Any]:
    """Return what an index of some modalities depends on: the weights, and the options that change the inputs."""
    found: dict[str, Any] = {"modalities": [name for name in encoders.modalities if name in names]}
    for name in found["modalities"]:
        options = to_dict(encoders.encoders[name][1]).items()
        found |= {f"{name}'s {key}": value for key, value in options if key not in UNUSED}
        found[f"weights of {name}"] = weights_digest(encoders.model(name))[:16]
    return found


def _report(db: sqlite3.Connection) -> list[str]:
    """Return lines that say what is in an index, and the commonest reasons why files are not."""
    counts, reason = "count(DISTINCT files.id), count(windows.id)", "coalesce(failure, 'no model reads it')"
    rows = db.execute(f"SELECT modality, {counts} FROM files JOIN windows ON file = files.id GROUP BY modality")
    lines = [f"{name}: {files} files, {windows} windows" for name, files, windows in rows]
    select = f"SELECT count(DISTINCT path), min(path), {reason} FROM files WHERE failure NOTNULL OR modality ISNULL"
    rows = db.execute(f"{select} GROUP BY 3 ORDER BY 1 DESC LIMIT 9")
    return lines + [f"{n} not indexed, such as {printable(os.fsdecode(path))}: {why}" for n, path, why in rows]
