"""Webdataset shards: writing them, finding them, and the index that says what they hold.

A sample is `<key>.<extension>` media members and `<key>.json`; a member `<key>.<k>.<extension>` is frame k. A key
has no dot, since webdataset takes everything after a name's first dot as the extension.
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
from ..files import atomic_file, write_atomic
from ..remote import MissingFile, find_files, is_url, join, read_url
from .members import member_extension

INDEX_NAME = "index.json"
INDEX_VERSION = 1


@dataclass
class ShardInfo:
    """What the index says about one shard; `members` counts by extension, each frame of a sample on its own."""

    name: str
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    members: dict[str, int] = field(default_factory=dict)
    caption_sources: dict[str, int] = field(default_factory=dict)

    def count(self, members: Iterable[str], sources: Iterable[str]) -> None:
        """Count a sample, by what follows the key in its members' names, and by its caption sources."""
        self.samples += 1
        extensions = (member_extension(name)[0] for name in members)
        for counts, names in (self.members, extensions), (self.caption_sources, sources):
            for name in names:
                counts[name] = counts.get(name, 0) + 1


def expand_shards(spec: str | os.PathLike) -> list[str]:
    """Return the shards that a specification names, in order.

    A specification is a folder, a file, a glob or a brace pattern (`/data/{00000..00301}.tar`), on the disk or behind
    a URL (`s3://`), or several of these joined by `::`. A `pipe:` command is taken as it is.

    Raises:
        UserError: one of them does not exist, or cannot be reached.
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
            raise UserError(f"no shards: {part or 'the specification is empty'}")
        shards += found
    return shards


def _find(name: str) -> list[str]:
    """Return the shards that one name without braces stands for."""
    if is_url(name):
        return find_files(name, ".tar")
    if os.path.isdir(name):
        return sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
    if name.startswith("pipe:") or os.path.isfile(name):
        return [name]
    if name and not glob.has_magic(name):
        raise UserError(f"no such shard or folder: {name}")
    return sorted(glob.glob(name))


def indexed(shards: Iterable[str]) -> dict[str, ShardInfo | None]:
    """Return what the `index.json` beside each shard says about it; None where none does.

    Raises:
        UserError: an index is damaged, or of another version.
    """
    places = {shard: split_shard(shard) for shard in shards}
    indexes = {folder: _read_index(folder) for folder in {folder for folder, _ in places.values()}}
    return {shard: indexes[folder].get(name) for shard, (folder, name) in places.items()}


def count_samples(index: Mapping[str, ShardInfo | None]) -> dict[str, int | None]:
    """Return the samples in each shard, from `indexed` or OpenCLIP's `sizes.json`; None where neither says.

    Raises:
        UserError: a `sizes.json` is damaged.
    """
    sizes = {folder: _read_json(join(folder, "sizes.json")) for folder in {split_shard(shard)[0] for shard in index}}
    counts = {}
    for shard, info in index.items():
        folder, name = split_shard(shard)
        counts[shard] = info.samples if info else sizes[folder].get(name)
    return counts


def split_shard(shard: str) -> tuple[str, str]:
    """Return the folder of a shard, or its URL, and the shard's name."""
    folder, name = os.path.split(shard)
    return folder or ".", name


def write_index(folder: Path, infos: Iterable[ShardInfo]) -> dict[str, Any]:
    """Write `index.json` for the shards of a folder; return its contents."""
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
    """Writes one shard, which appears at `path` when it is complete. The same samples give the same bytes.

    Use as a context manager; `info` is complete after it. An exception inside leaves no file.
    """

    def __init__(self, path: Path):
        self.path, self.info = path, ShardInfo(path.name)
        self._file = atomic_file(path)

    def __enter__(self) -> "ShardWriter":
        self._tar = tarfile.open(fileobj=self._file.__enter__(), mode="w|", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, media: Mapping[str, bytes], metadata: Mapping[str, Any]) -> None:
        """Add a sample: `media` by extension (`mp4`, `3.depth.png`), and the contents of `<key>.json`."""
        if not is_key(key):
            raise ValueError(f"{key!r} is not a key: use letters, digits, - and _, at most 80")
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
    """Whether webdataset will split `<key>.<extension>` as we mean it."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) is not None


def as_key(sample_id: str) -> str:
    """Return a key for any id: the id if it can be one, otherwise its letters and a hash that keeps it unique."""
    if is_key(sample_id):
        return sample_id
    digest = hashlib.sha256(sample_id.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', sample_id)[-64:]}-{digest}"


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, as the index records it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(folder: str) -> dict[str, ShardInfo]:
    path = join(folder, INDEX_NAME)
    index = _read_json(path)
    if index.get("version", INDEX_VERSION) != INDEX_VERSION:
        raise UserError(f"{path} has version {index['version']}, this library reads {INDEX_VERSION}")
    return {entry["name"]: ShardInfo(**entry) for entry in index.get("shards", ())}


def _read_json(path: str) -> dict[str, Any]:
    """Return the object in a JSON file on the disk or behind a URL; an empty one where there is no such file."""
    try:
        return json.loads(read_url(path) if is_url(path) else Path(path).read_bytes())
    except (FileNotFoundError, MissingFile):
        return {}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sorted(sum(map(Counter, counts), Counter()).items()))
