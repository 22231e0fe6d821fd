"""Index a folder of media, and search it by text, by a file, or by both.

    python -m languagebind.index /data/media --model logs/depth-1 logs/audio-1 --output media.index
    python -m languagebind.index search media.index "with a red chair" --file room.png

Run the first command again to continue after a stop, or when files have changed. Cosines of different modalities differ
in level, so each modality has a ranking of its own.
"""

import json
import os
import sqlite3
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import faiss
import numpy as np
import tyro

from .config import UserError, at_least, gather_flags, parse, refuse_changes, run
from .distributed import own_device
from .files import printable
from .hub.encoders import Encoders, load
from .indexing import DATABASE, IndexOptions, facts_of, make_index, modality_of, read_facts
from .modalities import DecodeError

__all__ = ["Hit", "Index", "IndexOptions", "make_index", "modality_of"]


class Hit(NamedTuple):
    """A file, or a window of it, that a search found."""

    path: str
    modality: str
    score: float  # cosine
    start: float | None  # seconds; None for pictures and for what was not cut
    end: float | None


@dataclass(frozen=True)
class SearchOptions:
    """Search an index by text, by a file, or by both."""

    index: tyro.conf.Positional[Path]
    """folder of the index"""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """words to search for"""
    file: Path | None = None
    """file to search for, of any modality of the index"""
    weight: float = 0.5
    """share of the text in a search by text and file, from 0 to 1"""
    modality: tuple[str, ...] = ()
    """modalities to search; (): all that can be compared"""
    top: int = 10
    """results of each modality"""


class Index:
    """An index of a folder, opened for searching. Several threads may search it.

    `encoders` have the models that made it; by default these are loaded from where they were. Raises `UserError` if the
    index is missing or was never completed, or the models have other weights.
    """

    def __init__(self, path: str | os.PathLike, encoders: Encoders | None = None, device: str | None = None):
        self.path, facts = Path(path), read_facts(Path(path))
        if facts.get("current") is None:
            raise UserError(f"{path} is not a complete index: run languagebind index FOLDER --output {path} to its end")
        self.folder, self.window, self.limits = facts["folder"], facts["window"], facts["limits"]
        self.encoders = encoders or load(*facts["model"], device=own_device(device), **self.limits)
        self._database = f"{(self.path / DATABASE).absolute().as_uri()}?mode=rw"  # which does not create it
        self._facts, self._lock = facts_of(self.encoders, facts["modalities"]), Lock()
        self._read = 0  # when the index.json was written that the vectors belong to
        self._refresh()

    def _refresh(self) -> None:
        """Read the vectors, if an update has ended since they were read."""
        with self._lock:
            written, facts = os.stat(self.path / "index.json").st_mtime_ns, read_facts(self.path)
            if written == self._read or (self._read and not facts["current"]):
                return
            refuse_changes(self.path, facts, self._facts, "use the models that made it")
            try:
                read = {name: faiss.read_index(str(self.path / f"{name}.faiss")) for name in facts["modalities"]}
            except RuntimeError as error:
                advice = "delete its .faiss files, and run languagebind index again"
                raise UserError(f"vectors of {self.path} are missing or damaged: {advice}") from error
            self._vectors, self.modalities = read, [name for name in read if read[name].ntotal]  # that have files
            self._read = written

    def search(
        self, text: str = "", file: Any = None, modality_of_file: str | None = None, weight: float = 0.5,
        modalities: Iterable[str] | None = None, top: int = 10,
    ) -> dict[str, list[Hit]]:  # fmt: skip
        """Return the `top` hits of each of the `modalities`, best first, for a text, a file, or both.

        `file` is what `Encoders.encode` takes; `modality_of_file` is by default that of `modality_of`. The query for
        both is the sum of their unit features, with the `weight` of the text from 0 to 1. By default, all modalities
        are searched, but with a file only those that share the text tower of its modality. Raises `UserError` without
        a query, for a modality that the index lacks, and for one that cannot be compared with the file, and
        `DecodeError` if the file cannot be read.
        """
        self._refresh()
        at_least(1, top=top)
        if not 0 <= weight <= 1 or not (text.strip() or file is not None):
            raise UserError("search for a text, a file, or both, with a weight from 0 to 1")
        encoders, names = self.encoders, [*(modalities or self.modalities)]
        if unknown := [name for name in names if name not in self.modalities]:
            raise UserError(f"{self.path} has no files of {unknown[0]}, only of {', '.join(self.modalities)}")
        towers = {name: encoders.model(name).text_model for name in encoders.modalities}
        by_file: Any = None
        if file is not None:
            kind = modality_of_file or modality_of(file, encoders.modalities)
            if kind not in towers:
                raise UserError(f"no model reads {file}: there are models for {', '.join(towers)}")
            apart = [name for name in names if towers[name] is not towers[kind]]
            if apart and (modalities or apart == names):
                raise UserError(f"{kind} and {apart[0]} have different text towers, so they cannot be compared")
            names = [name for name in names if name not in apart]
            by_file = encoders.encode(to="numpy", **{kind: [file]})  # type: ignore[arg-type]  # the name of a modality
        queries: dict[int, Any] = {}  # texts are encoded once for each tower
        found = {}
        for name in names:
            if (tower := id(towers[name])) not in queries:
                x: Any = encoders.encode(text=[text], of=name, to="numpy") if text.strip() else by_file
                x = x if by_file is None else weight * x + (1 - weight) * by_file
                queries[tower] = x / np.linalg.norm(x)
            found[name] = self._hits(name, queries[tower], top)
        return found

    def _hits(self, name: str, query: np.ndarray, top: int) -> list[Hit]:
        vectors = self._vectors[name]
        scores, ids = (x[0].tolist() for x in vectors.search(query, max(1, min(top, vectors.ntotal))))
        select = "SELECT windows.id, path, start, end FROM windows JOIN files ON files.id = file"
        these = "WHERE windows.id IN (SELECT value FROM json_each(?))"
        try:
            with closing(sqlite3.connect(self._database, uri=True, timeout=60)) as db:
                rows = {row[0]: row[1:] for row in db.execute(f"{select} {these}", [json.dumps(ids)])}
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path / DATABASE}: {error}; if it stays so, delete {self.path}, and index the folder again"
            ) from error
        found = ((score, *rows[i]) for score, i in zip(scores, ids, strict=True) if i in rows)  # not removed since
        return [Hit(os.path.join(self.folder, os.fsdecode(path)), name, score, *span) for score, path, *span in found]


def main(argv: Sequence[str] | None = None) -> None:
    """Make an index, or search one if the first word is `search`."""
    words = sys.argv[1:] if argv is None else [*argv]
    if words[:1] != ["search"]:
        print(make_index(parse(IndexOptions, gather_flags(words, "--model"), "languagebind index")))
        return
    options = parse(SearchOptions, gather_flags(words[1:], "--modality"), "languagebind index search")
    text, file = " ".join(options.text), options.file
    try:
        found = Index(options.index).search(text, file, None, options.weight, options.modality, options.top)
    except DecodeError as error:
        raise UserError(str(error)) from error
    for name, hits in found.items():
        print(f"{name}:" if hits else f"{name}: nothing")
        for hit in hits:
            times = "" if hit.start is None else f"  {hit.start:.1f} to {hit.end:.1f} s"
            print(f"  {hit.score:.3f}  {printable(hit.path)}{times}")


if __name__ == "__main__":
    run(main)
