"""Find and write webdataset shards and the index of their contents.

A sample has media members `<key>.<extension>`, and `<key>.json`. A member `<key>.<k>.<extension>` is frame k. A key has
no dot, because webdataset treats everything after the first dot of a name as the extension.
"""

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import UserError, first_line
from ..files import POINTER, atomic_file, is_pointer, printable, write_atomic
from ..remote import MissingFile, find_files, is_url, join, read_url
from .members import member_extension
from .members import read_captions as read_captions  # scripts import it from here

INDEX_NAME = "index.json"
INDEX_VERSION = 1


@dataclass
class ShardInfo:
    """The index entry of a shard. `members` counts the files by extension, and each frame is one file."""

    name: str
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    members: dict[str, int] = field(default_factory=dict)
    caption_sources: dict[str, int] = field(default_factory=dict)

    def count(self, members: Iterable[str], sources: Iterable[str]) -> None:
        """Count a sample. `members` are the names of its members without the key, `sources` its caption sources."""
        self.samples += 1
        extensions = (member_extension(name)[0] for name in members)
        for counts, names in (self.members, extensions), (self.caption_sources, sources):
            for name in names:
                counts[name] = counts.get(name, 0) + 1


def expand_shards(spec: str | os.PathLike) -> list[str]:
    """Return the paths or URLs of the shards in a specification, in order.

    A specification is a folder, a file, a glob or a brace pattern (`/data/{00000..00301}.tar`), on disk or at a URL
    (`s3://...`), or several of these joined by `::`. A `pipe:` command is returned unchanged. Raises `UserError` if a
    shard or folder does not exist or cannot be reached.
    """
    from braceexpand import braceexpand

    shards = []
    for part in os.fspath(spec).split("::"):
        try:  # the name of an existing folder may contain braces
            names = [part] if os.path.exists(part) else list(braceexpand(part))
        except ValueError as error:
            raise UserError(f"shards {part}: a brace is not closed") from error
        found = [shard for name in names for shard in _find(name)]
        if not found:
            raise UserError(f"no shards match {part!r}")
        shards += found
    return shards


def _find(name: str) -> list[str]:
    """Return the shards of one folder, file, glob, URL or `pipe:` command."""
    if is_url(name):
        return find_files(name, ".tar")
    if os.path.isdir(name):
        return sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
    if name.startswith("pipe:") or os.path.isfile(name):
        return [name]
    if name and not glob.has_magic(name):
        raise UserError(f"no such shard or folder: {name}")
    folder, pattern = os.path.split(name)  # the name of an existing folder may contain brackets
    return sorted(glob.glob(os.path.join(glob.escape(folder) if os.path.isdir(folder) else folder, pattern)))


def indexed(shards: Iterable[str]) -> dict[str, ShardInfo | None]:
    """Return each shard's entry in the `index.json` beside it, or None. Raises `UserError` if an index is unusable."""
    parts = {shard: split_shard(shard) for shard in shards}
    indexes = {}
    for folder in {folder for folder, _ in parts.values()}:
        path = join(folder, INDEX_NAME)
        index = _read_json(path)
        if index.get("version", INDEX_VERSION) != INDEX_VERSION:
            raise UserError(f"{path} has version {index['version']}, but this library reads version {INDEX_VERSION}")
        indexes[folder] = {entry["name"]: ShardInfo(**entry) for entry in index.get("shards", ())}
    return {shard: indexes[folder].get(name) for shard, (folder, name) in parts.items()}


def count_samples(index: Mapping[str, ShardInfo | None]) -> dict[str, int | None]:
    """Return the number of samples per shard from `indexed` or OpenCLIP's `sizes.json`, or None if neither has it."""
    sizes = {folder: _read_json(join(folder, "sizes.json")) for folder in {split_shard(shard)[0] for shard in index}}
    counts = {}
    for shard, info in index.items():
        folder, name = split_shard(shard)
        found = info.samples if info else sizes[folder].get(name)
        if found is not None and not str(found).isdecimal():
            raise UserError(f"{join(folder, 'sizes.json')}: {name} should have a number of samples, not {found!r}")
        counts[shard] = None if found is None else int(found)  # some programs write numbers as text
    return counts


def split_shard(shard: str) -> tuple[str, str]:
    """Return the folder of a shard (a path or URL) and the file name."""
    folder, name = os.path.split(shard)
    return folder or ".", name


def write_index(folder: Path, infos: Iterable[ShardInfo]) -> dict[str, Any]:
    """Write the `index.json` of a folder with these shards, and return the contents."""
    infos = sorted(infos, key=lambda info: info.name)
    index = {
        "version": INDEX_VERSION,
        "samples": sum(info.samples for info in infos),
        "bytes": sum(info.bytes for info in infos),
        "members": _total(info.members for info in infos),
        "caption_sources": _total(info.caption_sources for info in infos),
        "shards": [asdict(info) for info in infos],
    }
    write_atomic(folder / INDEX_NAME, json.dumps(index, indent=1).encode() + b"\n")
    return index


class ShardWriter:
    """Writes one shard. The file appears at `path` once it is complete. The same samples give the same bytes.

    Use the writer as a context manager. On exit, `info` is complete. After an exception, there is no file.
    """

    def __init__(self, path: Path):
        self.path, self.info = path, ShardInfo(path.name)
        self._file = atomic_file(path)

    def __enter__(self) -> "ShardWriter":
        self._tar = tarfile.open(fileobj=self._file.__enter__(), mode="w|", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, media: Mapping[str, bytes], metadata: Mapping[str, Any]) -> None:
        """Add a sample with its media by extension (`mp4`, `3.depth.png`) and the contents of its `<key>.json`."""
        if not is_key(key):
            raise ValueError(f"{key!r} is not a valid key; use at most 80 letters, digits, - and _")
        members = {**media, "json": json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode()}
        for extension, data in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")  # owner 0, time 0: the same contents give the same bytes
            header.size, header.mode = len(data), 0o644
            self._tar.addfile(header, io.BytesIO(data))
        self.info.count(members, metadata["captions"])

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self._tar.close()
        self._file.__exit__(kind, *error)
        if kind is None:
            info = self.info
            info.bytes, info.sha256 = self.path.stat().st_size, file_sha256(self.path)
            info.members, info.caption_sources = _total([info.members]), _total([info.caption_sources])


def is_key(key: str) -> bool:
    """Return True if a text is a valid key for a sample."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) is not None


def as_key(sample_id: str) -> str:
    """Return a unique key for a sample id: the id itself if it is a valid key, otherwise its end and a hash."""
    if is_key(sample_id):
        return sample_id
    digest = hashlib.sha256(printable(sample_id).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', sample_id)[-64:]}-{digest}"


def why_unreadable(shard: str | os.PathLike, error: Exception) -> str:
    """Return the reason for an error of reading a shard."""
    return POINTER if is_pointer(shard) else first_line(error)


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, as the index records it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: str) -> dict[str, Any]:
    """Return the object in a JSON file (a path or URL), or an empty one if there is no such file."""
    try:
        return json.loads(read_url(path) if is_url(path) else Path(path).read_bytes())
    except (FileNotFoundError, MissingFile):
        return {}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sorted(sum(map(Counter, counts), Counter()).items()))
