"""Index a folder of media, and search it by text, by a file, or by both.

    python -m languagebind.index /data/media --model logs/depth-1 logs/audio-1 --output media.index
    python -m languagebind.index search media.index "a bell ringing"
    python -m languagebind.index search media.index --file room.png "with a red chair" --modality image

Run the first command again to continue after a stop, or when files have changed. `media.index` is a folder with a
database of files, windows and features, `index.sqlite`, and a FAISS index for each modality. Cosines of different
modalities differ in level, so each modality has a ranking of its own.
"""

import json
import logging
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePath
from queue import SimpleQueue
from threading import Event, Semaphore
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

from .config import UserError, at_least, first_line, gather_flags, parse, run, to_dict
from .distributed import own_device
from .eval.cache import weights_digest
from .files import files_below, locked, printable, temporary_name
from .hub.encoders import Encoders, load
from .modalities import UNUSED, DecodeError, Modality, modality_class, modality_names

log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS files (  -- one row for each modality that reads a file; NULL if none does
    id INTEGER PRIMARY KEY, path BLOB, size INTEGER, mtime INTEGER, modality TEXT, done INTEGER, failure TEXT);
CREATE INDEX IF NOT EXISTS paths ON files (path);
CREATE INDEX IF NOT EXISTS todo ON files (modality, id) WHERE NOT done;
CREATE TABLE IF NOT EXISTS windows (  -- no id is used twice, because a FAISS index may still have the old one
    id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER REFERENCES files ON DELETE CASCADE,
    start REAL, end REAL, features BLOB);
CREATE INDEX IF NOT EXISTS windows_of_file ON windows (file);
"""
FRAMES = ("jpg", "jpeg", "png")  # extensions of a video's frames, which are indexed as pictures
WORDS = {"infrared": "infrared|thermal", "depth": "depth"}  # in names of files and folders
FLAT = 100_000  # vectors that FAISS compares one by one
PAGE = 10_000  # rows of the database that are held at once
SECONDS_BETWEEN_COMMITS = 1.0
EXAMPLES = 5  # kinds of failures that the report lists


class Hit(NamedTuple):
    """A file, or a window of it, that a search found."""

    path: str
    modality: str
    score: float  # cosine
    start: float | None  # seconds; None for pictures and for what was not cut
    end: float | None


@dataclass(frozen=True)
class IndexOptions:
    """Index a folder of media, or bring its index up to date. To search it: `languagebind index search --help`."""

    folder: tyro.conf.Positional[Path]
    """folder of the media, with its subfolders"""
    output: Path
    """folder of the index"""
    model: tuple[str, ...] = ()
    """runs, checkpoints, folders in the published layout or hub ids, one for each modality; (): those of the index"""
    window: float = 10.0
    """seconds of each window of a long sound or video; a rest below half of that joins the last; 0: do not cut"""
    pattern: tuple[str, ...] = ()
    """which modality reads which files, such as infrared=thermal/*.png; the first that fits decides"""
    batch_size: int = 32
    """windows that are encoded at once"""
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    """threads that read files"""
    device: str | None = None
    """PyTorch device; None: the first GPU, or else the CPU"""
    exif: bool = True
    """turn pictures as their EXIF orientation says"""
    max_seconds: float | None = None
    """longest sound or video; None: as in training, usually 10 minutes of sound and an hour of video"""
    max_pixels: int | None = None
    """largest picture or frame; None: as in training"""

    def __post_init__(self):
        at_least(0, window=self.window)
        at_least(1, batch_size=self.batch_size, workers=self.workers)
        if bad := [each for each in self.pattern if not re.fullmatch(r"[\w.]+=.+", each)]:
            raise UserError(f"--pattern {bad[0]}: write a modality and a pattern, as in infrared=thermal/*.png")

    @property
    def reading(self) -> dict[str, Any]:
        """The options of reading, as `load` takes them."""
        found = {"exif": self.exif, "max_seconds": self.max_seconds, "max_pixels": self.max_pixels}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class SearchOptions:
    """Search an index by text, by a file, or by both."""

    index: tyro.conf.Positional[Path]
    """folder of the index"""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """words to search for"""
    file: Path | None = None
    """file to search for, of any modality of the index"""
    file_modality: str | None = None
    """modality that reads --file; None: found by its name and content"""
    weight: float = 0.5
    """share of the text in a search by text and file, from 0 to 1"""
    modality: tuple[str, ...] = ()
    """modalities to search; (): all that can be compared"""
    top: int = 10
    """number of results of each modality"""
    json: bool = False
    """print JSON"""


def modalities_of(path: str | os.PathLike, names: Iterable[str]) -> list[str]:
    """Return which of the modalities `names` read a file: one, and for a video's sound also audio; none if none can.

    Where several read the extension, a word in the file's name, else in its folder's, else in that folder's folder's
    decides: infrared, thermal or depth. Without such a word, pictures with one channel of more than 8 bits are depth
    maps (infrared, if no depth is loaded), and others are images (infrared, if no image is loaded).
    """
    path, extensions = Path(path), {name: modality_class(name).extensions for name in modality_names()}
    clip = any(path.name.lower().endswith(f".{end}") for end in extensions["video"] if end not in FRAMES)
    extensions["video"] = extensions["video"] if clip else ()
    names = [name for name in names if name in extensions]
    found = [name for name in names if path.name.lower().endswith(tuple(f".{end}" for end in extensions[name]))]
    if len(found) > 1:
        found = [_decided(path, found)]
    return found + ["audio"] * (clip and "audio" in names)


def modality_of(path: str | os.PathLike, names: Iterable[str]) -> str | None:
    """Return which of the modalities `names` reads a file, or None; see `modalities_of`."""
    return next(iter(modalities_of(path, names)), None)


def _decided(path: Path, names: list[str]) -> str:
    for part in reversed(path.absolute().parts[-3:]):
        if named := [name for name in names if name in WORDS and re.search(WORDS[name], part, re.IGNORECASE)]:
            return named[0]
    from PIL import Image

    try:
        with Image.open(path) as image:
            wide = image.mode.startswith(("I", "F"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # whoever reads it will say what is wrong
        wide = False
    order = ("depth", "infrared", "image") if wide else ("image", "infrared", "depth")
    return next((name for name in order if name in names), names[0])


class Index:
    """An index of a folder, opened for searching.

    `encoders` are the models that made it; by default they are loaded from where they were. Raises `UserError` if the
    index is missing or not complete, or the models have other weights.
    """

    def __init__(self, path: str | os.PathLike, encoders: Encoders | None = None, device: str | None = None):
        self.path = Path(path)
        if not (self.path / "index.sqlite").is_file():
            raise UserError(
                f"{path} is not an index: make it with languagebind index FOLDER --model ... --output {path}"
            )
        with closing(_connect(self.path)) as db:
            facts = _facts(db)
        if not facts.get("complete"):
            raise UserError(f"{path} is not complete: run the command that makes it again, which continues")
        self.folder = Path(facts["folder"])
        self.encoders = encoders or load(*facts["model"], device=own_device(device), **facts["reading"])
        _check(self.path, facts, _facts_of(self.encoders))
        files = {name: self.path / f"{name}.faiss" for name in self.encoders.modalities}
        self._vectors = {name: _faiss().read_index(str(file)) for name, file in files.items() if file.exists()}

    @property
    def modalities(self) -> list[str]:
        """Return the names of the modalities with files in the index."""
        return [*self._vectors]

    def search(
        self,
        text: str = "",
        file: Any = None,
        modality_of_file: str | None = None,
        weight: float = 0.5,
        modalities: Iterable[str] | None = None,
        top: int = 10,
    ) -> dict[str, list[Hit]]:
        """Return the best hits of each modality, best first.

        Args:
            text: what to search for.
            file: a file to search for: a path, bytes, or what else `Encoders.encode` takes.
            modality_of_file: modality that reads `file`; by default that of `modality_of`, for which it is a path.
            weight: share of the text in a search by both; the query is the weighted sum of the unit features.
            modalities: those to search. By default all, but with a file those that share the text tower of its
                modality, since others have a space of their own.
            top: number of hits of each modality.

        Raises `UserError` if there is no query, a modality is not in the index, or it cannot be compared with the file.
        """
        at_least(1, top=top)
        if not 0 <= weight <= 1:
            raise UserError(f"weight should be from 0 to 1, got {weight}")
        if not text.strip() and file is None:
            raise UserError("search for a text, a file, or both")
        names = [*modalities] if modalities else self.modalities
        if unknown := [name for name in names if name not in self._vectors]:
            raise UserError(f"{self.path} has no {unknown[0]}, only {', '.join(self.modalities) or 'no files'}")
        by_file: Any = None
        if file is not None:
            kind = modality_of_file or modality_of(file, self.encoders.modalities)
            if kind not in self.encoders.modalities:
                raise UserError(
                    f"no model of {self.path} reads {file}: its modalities are {', '.join(self.modalities)}"
                )
            tower = self.encoders.model(kind).text_model
            if apart := [name for name in names if self.encoders.model(name).text_model is not tower]:
                if modalities:
                    raise UserError(f"{kind} and {apart[0]} have different text towers, so they cannot be compared")
                log.warning(
                    "not searched, because their text towers differ from that of %s: %s", kind, ", ".join(apart)
                )
            names = [name for name in names if name not in apart]
            items: dict[str, Any] = {kind: [file]}
            by_file = self.encoders.encode(to="numpy", **items)
        found: dict[str, list[Hit]] = {}
        texts: dict[int, Any] = {}
        with closing(_connect(self.path)) as db:
            for name in names:
                query, tower = by_file, self.encoders.model(name).text_model
                if text.strip():
                    if id(tower) not in texts:
                        texts[id(tower)] = self.encoders.encode(text=[text], of=name, to="numpy")
                    query = texts[id(tower)]
                    if by_file is not None:
                        both = weight * query + (1 - weight) * by_file
                        query = both / np.linalg.norm(both)
                found[name] = self._hits(db, name, query, top)
        return found

    def _hits(self, db: sqlite3.Connection, name: str, query: np.ndarray, top: int) -> list[Hit]:
        scores, ids = (x[0].tolist() for x in self._vectors[name].search(query, top))
        marks = ",".join("?" * len(ids))
        select = "SELECT windows.id, path, start, end FROM windows JOIN files ON files.id = file WHERE windows.id IN"
        rows = {row[0]: row[1:] for row in db.execute(f"{select} ({marks})", ids)}  # without removed files
        return [
            Hit(os.fsdecode(os.path.join(os.fsencode(self.folder), rows[i][0])), name, score, *rows[i][1:])
            for i, score in zip(ids, scores, strict=True)
            if i in rows
        ]


def make_index(options: IndexOptions) -> dict[str, Any]:
    """Make the index of a folder, or bring it up to date. Return the report, which `print_report` shows.

    Raises `UserError` if the index was made of another folder, by other models or with other options, another process
    writes it, or the folder has no files.
    """
    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is not a folder")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with locked(options.output / ".lock"), closing(_connect(options.output)) as db:
            db.executescript(SCHEMA)
            return _Update(db, options).run()
    except BlockingIOError as error:
        raise UserError(f"another process writes {options.output}: wait for its end") from error
    except (OSError, sqlite3.OperationalError) as error:
        raise UserError(f"cannot write {options.output}: {error}") from error


class _Update:
    def __init__(self, db: sqlite3.Connection, options: IndexOptions):
        self.db, self.options, self.folder = db, options, os.fsencode(options.folder.absolute())
        self.encoders: Any = None
        self.committed = time.monotonic()

    def run(self) -> dict[str, Any]:
        db, options, before = self.db, self.options, _facts(self.db)
        now = {"folder": os.fsdecode(self.folder), "window": options.window, "pattern": list(options.pattern)}
        _check(options.output, before, now)
        used: dict[str, Any] = {
            "model": [os.path.abspath(x) if os.path.exists(x) else x for x in options.model],
            "reading": options.reading,
        }
        used["model"] = used["model"] or before.get("model")
        if not used["model"]:
            raise UserError(f"{options.output} is new: name the models, --model ...")
        removed = self._list()
        (new,) = db.execute("SELECT count(*) FROM listing").fetchone()
        (left,) = db.execute("SELECT count(*) FROM files WHERE NOT done").fetchone()
        if new or left or any(before.get(key) != used[key] for key in used):
            self.encoders = load(*used["model"], device=own_device(options.device), **options.reading)
            now |= _facts_of(self.encoders)
            _check(options.output, before, now)
            _remember(db, now | used | {"stale": True})
            if used["reading"] != before.get("reading"):  # with other limits, more files may be read
                db.execute("UPDATE files SET done = 0, failure = NULL WHERE failure NOTNULL")
            self._assign()
            db.commit()
            self._encode()
        if _facts(db)["stale"]:
            for (name,) in db.execute("SELECT DISTINCT modality FROM files WHERE modality NOTNULL").fetchall():
                _write_vectors(db, name, options.output / f"{name}.faiss")
            _remember(db, {"complete": True, "stale": False})
            db.commit()
        return _report(db) | {"new": new, "removed": removed}

    def _list(self) -> int:
        """List the folder in the table `listing`, and leave the new and changed files there.

        Forget the changed and removed files; return the number of the latter.
        """
        db = self.db
        db.execute("CREATE TEMP TABLE listing (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER) WITHOUT ROWID")
        if not db.executemany("INSERT INTO listing VALUES (?, ?, ?)", _listing(self.folder)).rowcount > 0:
            raise UserError(f"{self.options.folder} has no files")  # perhaps a disk that is not mounted
        gone = "SELECT count(DISTINCT path) FROM files WHERE path NOT IN (SELECT path FROM listing)"
        (removed,) = db.execute(gone).fetchone()
        same = "listing.path = files.path AND listing.size = files.size AND listing.mtime = files.mtime"
        if db.execute(f"DELETE FROM files WHERE NOT EXISTS (SELECT * FROM listing WHERE {same})").rowcount:
            _remember(db, {"stale": True})
        db.execute("DELETE FROM listing WHERE path IN (SELECT path FROM files)")
        db.commit()
        return removed

    def _assign(self) -> None:
        """Decide which modalities read the files in the table `listing`."""
        patterns = [each.split("=", 1) for each in self.options.pattern]
        names = self.encoders.modalities
        if unknown := [name for name, _ in patterns if name not in names]:
            raise UserError(f"--pattern {unknown[0]}=...: no model reads {unknown[0]}, only {', '.join(names)}")

        def rows() -> Iterator[tuple[Any, ...]]:
            for path, size, mtime in self.db.execute("SELECT path, size, mtime FROM listing"):
                whole = os.fsdecode(os.path.join(self.folder, path))
                found = next((name for name, each in patterns if PurePath(os.fsdecode(path)).match(each)), None)
                reading: Sequence[str | None] = [found] if found else modalities_of(whole, names)
                yield from ((path, size, mtime, name, name is None) for name in reading or [None])

        self.db.executemany("INSERT INTO files (path, size, mtime, modality, done) VALUES (?, ?, ?, ?, ?)", rows())

    def _encode(self) -> None:
        """Encode all files that are not done."""
        count = "SELECT modality, count(*) FROM files WHERE NOT done GROUP BY modality"
        left = dict(self.db.execute(count).fetchall())
        # Outside a terminal, print the progress only every 30 seconds
        interval = 0.1 if sys.stderr.isatty() else 30
        with tqdm(total=sum(left.values()), unit=" files", mininterval=interval) as bar:
            for name in left:
                waiting: list[Any] = []
                windows, size = 0, self.options.batch_size
                for item in read_ahead(self._reader(name), self._rows(name), self.options.workers, 4 * size):
                    waiting.append(item)
                    windows += len(item) > 2
                    if windows == size or len(waiting) == 4 * size:
                        bar.update(self._write(name, waiting))
                        waiting, windows = [], 0
                bar.update(self._write(name, waiting))
        # A video without sound is not a failure
        silent = "failure = 'no audio stream' AND path IN (SELECT path FROM files WHERE modality = 'video')"
        self.db.execute(f"UPDATE files SET failure = NULL WHERE modality = 'audio' AND {silent}")
        self.db.commit()

    def _rows(self, name: str) -> Iterator[tuple[int, bytes, int]]:
        """Yield the id, the path and the number of known windows of each file of a modality that is not done."""
        known, last = "(SELECT count(*) FROM windows WHERE file = files.id)", 0
        select = f"SELECT id, path, {known} FROM files WHERE NOT done AND modality = ? AND id > ? ORDER BY id LIMIT ?"
        while page := self.db.execute(select, (name, last, PAGE)).fetchall():
            yield from page
            last = page[-1][0]

    def _reader(self, name: str) -> Callable[[Any], Iterator[tuple[Any, ...]]]:
        """Return a function that yields a file's windows (id, start, end, input), and then (id, why it failed)."""
        modality: Modality = self.encoders.encoders[name][1]

        def read(row: tuple[int, bytes, int]) -> Iterator[tuple[Any, ...]]:
            number, path, known = row
            source, failure = os.fsdecode(os.path.join(self.folder, path)), None
            try:
                for start, end, raw in modality.windows(source, self.options.window, known):
                    yield number, start, end, modality.transform(raw)
            except DecodeError as error:
                failure = error.reason
            except Exception as error:
                error.add_note(f"while reading {source}")
                raise
            yield number, failure

        return read

    @torch.no_grad()
    def _write(self, name: str, items: list[tuple[Any, ...]]) -> int:
        """Encode windows, write them and what else the reader found; return the number of files that are done."""
        windows, ends = ([item for item in items if (len(item) > 2) is long] for long in (True, False))
        if windows:
            model = self.encoders.model(name)
            x = model.project(torch.stack([item[3] for item in windows]).to(model.logit_scale.device)).float()
            features = F.normalize(x, dim=-1).cpu().numpy()
            if not np.isfinite(features).all():
                raise UserError(f"the model of {name} returns NaN or infinity")
            rows = ((*item[:3], feature.tobytes()) for item, feature in zip(windows, features, strict=True))
            self.db.executemany("INSERT INTO windows (file, start, end, features) VALUES (?, ?, ?, ?)", rows)
        self.db.executemany("UPDATE files SET done = 1, failure = ? WHERE id = ?", [end[::-1] for end in ends])
        self.db.executemany("DELETE FROM windows WHERE file = ?", [end[:1] for end in ends if end[1]])
        if time.monotonic() > self.committed + SECONDS_BETWEEN_COMMITS:
            self.db.commit()
            self.committed = time.monotonic()
        return len(ends)


def _listing(folder: bytes) -> Iterator[tuple[bytes, int, int]]:
    for path in files_below(Path(os.fsdecode(folder))):
        try:
            status = os.stat(path)
        except OSError:  # a link to nothing, or a file that was just removed
            continue
        yield os.path.relpath(os.fsencode(path), folder), status.st_size, status.st_mtime_ns


def read_ahead(read: Callable[[Any], Iterable[Any]], rows: Iterable[Any], threads: int, ahead: int) -> Iterator[Any]:
    """Yield what `read` yields for each row, in order for one row. Threads read at most `ahead` items in advance."""
    found: SimpleQueue[Any] = SimpleQueue()
    room, stopped, end = Semaphore(ahead), Event(), object()

    def work(row: Any) -> None:
        try:
            for item in read(row):
                room.acquire()
                if stopped.is_set():
                    return
                found.put(item)
            found.put(end)
        except BaseException as error:  # raised below, in the calling thread
            found.put(error)

    rows = iter(rows)
    with ThreadPoolExecutor(threads) as pool:
        try:
            running = [pool.submit(work, row) for row in islice(rows, ahead)]
            count = len(running)
            while count:
                item = found.get()
                if item is end:
                    count -= 1
                    for row in islice(rows, 1):
                        pool.submit(work, row)
                        count += 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    room.release()
                    yield item
        finally:
            stopped.set()
            room.release(threads)
            pool.shutdown(cancel_futures=True)


def _write_vectors(db: sqlite3.Connection, name: str, path: Path) -> None:
    """Write the FAISS index of a modality's features."""
    faiss: Any = _faiss()
    source = "FROM windows CROSS JOIN files ON files.id = file WHERE modality = ?"  # in the order of the windows
    count, size = db.execute(f"SELECT count(*), max(length(features)) {source}", (name,)).fetchone()
    if not count:
        path.unlink(missing_ok=True)
        return
    index = new_vectors(count, size // 4)
    if not index.is_trained:
        # FAISS wants 39 to 256 vectors of each list
        sample = db.execute(
            f"SELECT features {source} AND windows.id % ? = 0", (name, max(1, count // (50 * index.nlist)))
        )
        index.train(_matrix([row for (row,) in sample]))
    pages = db.execute(f"SELECT windows.id, features {source} ORDER BY windows.id", (name,))
    while page := pages.fetchmany(PAGE):
        ids, features = zip(*page, strict=True)
        index.add_with_ids(_matrix(features), np.array(ids, np.int64))
    try:
        faiss.write_index(index, str(temporary_name(path)))
    except RuntimeError as error:  # a full disk
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
    temporary_name(path).replace(path)


def new_vectors(count: int, size: int) -> Any:
    """Return an empty FAISS index of inner products, for `count` vectors of `size` numbers."""
    faiss: Any = _faiss()
    flat = faiss.IndexFlatIP(size)
    if count <= FLAT:
        return faiss.IndexIDMap2(flat)
    # FAISS's guidelines: 4 to 16 times the root of the number of vectors. A sixteenth of the lists is more than usual,
    # because queries of another modality than the vectors lie beside the lists.
    index = faiss.IndexIVFFlat(flat, size, int(4 * count**0.5), faiss.METRIC_INNER_PRODUCT)
    index.own_fields = True
    flat.this.disown()
    index.nprobe = index.nlist // 16
    return index


def _matrix(features: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(features), np.float32).reshape(len(features), -1)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError("an index needs FAISS: pip install 'languagebind[app]'") from error
    return faiss


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path / "index.sqlite", timeout=60)
    db.execute("PRAGMA foreign_keys = ON")
    return db


def _facts(db: sqlite3.Connection) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in db.execute("SELECT key, value FROM facts")}


def _remember(db: sqlite3.Connection, facts: Mapping[str, Any]) -> None:
    db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", [(key, json.dumps(x)) for key, x in facts.items()])


def _facts_of(encoders: Encoders) -> dict[str, Any]:
    """Return what an index depends on: the weights, and the options of each modality that change its inputs."""
    found: dict[str, Any] = {"modalities": encoders.modalities}
    for name, (model, modality) in encoders.encoders.items():
        found[f"weights of {name}"] = weights_digest(model)
        found |= {f"{name}'s {key}": value for key, value in to_dict(modality).items() if key not in UNUSED}
    return found


def _check(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `UserError` if an index was made with other facts. A newer option is not compared."""
    for key, value in now.items():
        if (was := before.get(key, value)) != value:
            short = [str(each)[:12] if key.startswith("weights") else each for each in (was, value)]
            advice = "use the same again, or make another index (another --output)"
            raise UserError(f"{path} was made with {key} {short[0]}, not {short[1]}: {advice}")


def _report(db: sqlite3.Connection) -> dict[str, Any]:
    counts = "SELECT modality, count(DISTINCT files.id), count(windows.id)"
    per = f"{counts} FROM files JOIN windows ON file = files.id GROUP BY modality"
    failed = "FROM files WHERE failure NOTNULL"
    reasons = f"SELECT failure, count(*), min(path) {failed} GROUP BY 1 ORDER BY 2 DESC LIMIT {EXAMPLES}"
    return {
        "indexed": {name: {"files": files, "windows": windows} for name, files, windows in db.execute(per)},
        "failed": db.execute(f"SELECT count(*) {failed}").fetchone()[0],
        "failures": [(reason, count, printable(os.fsdecode(path))) for reason, count, path in db.execute(reasons)],
        "unread": db.execute("SELECT count(*) FROM files WHERE modality IS NULL").fetchone()[0],
    }


def print_report(report: Mapping[str, Any]) -> None:
    """Print what is in an index, and the commonest reasons why files failed."""
    for name, counts in report["indexed"].items():
        print(f"{name}: {counts['files']} files, {counts['windows']} windows")
    counts = [f"{report['new']} files new or changed", f"{report['removed']} removed", f"{report['failed']} failed"]
    print(", ".join([*counts, f"{report['unread']} that no model reads"]))
    for reason, count, path in report["failures"]:
        print(f"  {reason}: {count}, such as {path}")
    if not report["indexed"]:
        raise UserError("no file is in the index")


def main(argv: Sequence[str] | None = None) -> None:
    """Make an index, or search one if the first word is `search`."""
    words = sys.argv[1:] if argv is None else [*argv]
    if words[:1] != ["search"]:
        print_report(make_index(parse(IndexOptions, gather_flags(words, "--model", "--pattern"), "languagebind index")))
        return
    options = parse(SearchOptions, gather_flags(words[1:], "--modality"), "languagebind index search")
    try:
        found = Index(options.index).search(
            " ".join(options.text), options.file, options.file_modality, options.weight, options.modality, options.top
        )
    except DecodeError as error:
        raise UserError(str(error)) from error
    if options.json:
        print(json.dumps({name: [hit._asdict() for hit in hits] for name, hits in found.items()}, indent=1))
        return
    for name, hits in found.items():
        print(name)
        for hit in hits:
            times = "" if hit.end is None else f"  {clock(hit.start)} to {clock(hit.end)}"
            print(f"  {hit.score:.3f}  {printable(hit.path)}{times}")


def clock(seconds: float | None) -> str:
    """Return a time as minutes and seconds, such as 1:05.5."""
    minutes, rest = divmod(round(seconds or 0, 1), 60)
    return f"{minutes:.0f}:{rest:04.1f}"


if __name__ == "__main__":
    run(main)
