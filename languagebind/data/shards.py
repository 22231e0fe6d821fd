"""Webdataset shards: writing them, naming them, and the index that says what they hold.

A sample is `<key>.<extension>` media members and `<key>.json`; a member `<key>.<k>.<extension>` is frame k. A key
has no dot, since webdataset takes all after a name's first dot as the extension.
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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..config import UserError, first_line
from ..files import atomic_file, write_atomic
from ..remote import MissingFile, find_files, is_url, join, read_url
from .members import member_extension

INDEX_NAME = "index.json"
INDEX_VERSION = 1

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


@dataclass
class ShardInfo:
    """What the index says of one shard; `members` counts by extension, frames of one sample singly."""

    name: str
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    members: dict[str, int] = field(default_factory=dict)
    caption_sources: dict[str, int] = field(default_factory=dict)


def expand_shards(spec: str | os.PathLike) -> list[str]:
    """The shards that a specification names, in order.

    A specification is a folder, a file, a glob or a brace pattern (`/data/{00000..00301}.tar`), on the disk or behind
    a URL (`s3://`), or several joined by `::`. A `pipe:` command is taken as it is.

    Raises:
        UserError: one of them is not there, or cannot be reached.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    shards = []
    for part in os.fspath(spec).split("::"):
        try:
            # A folder may well have braces in its name.
            names = [part] if os.path.exists(part) else braceexpand(part)
            found = [shard for name in names for shard in _find(name)]
        except UnbalancedBracesError as error:
            raise UserError(f"shards {part}: a brace is not closed") from error
        if not found:
            raise UserError(f"no shards: {part or 'the specification is empty'}")
        shards += found
    return shards


def indexed(shards: Iterable[str]) -> dict[str, ShardInfo | None]:
    """What the `index.json` beside each shard says of it; None where there is none, or the shard is not in it.

    Raises:
        UserError: an index is damaged.
    """
    entries: dict[str, dict[str, ShardInfo]] = {}
    infos = {}
    for shard in shards:
        folder, name = split_shard(shard)
        if folder not in entries:
            entries[folder] = _read_index(join(folder, INDEX_NAME))
        infos[shard] = entries[folder].get(name)
    return infos


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
    """Folder, or its URL, and name."""
    folder, name = os.path.split(shard)
    return folder or ".", name


def write_index(folder: Path, infos: Iterable[ShardInfo]) -> dict[str, Any]:
    """Write `index.json` for the shards of a folder; returns its contents."""
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
    """Writes one shard: nothing is at `path` until all of it is on the disk. The same samples give the same bytes.

    Use as a context manager; `info` is complete after it. An exception inside leaves no file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.info = ShardInfo(path.name)
        self._members, self._sources = Counter(), Counter()

    def __enter__(self) -> "ShardWriter":
        self._closing = ExitStack()
        self._file = _Hashing(self._closing.enter_context(atomic_file(self.path)))
        self._tar = tarfile.open(fileobj=self._file, mode="w|", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, media: Mapping[str, bytes], metadata: Mapping[str, Any]) -> None:
        """Add a sample: `media` by extension (`mp4`, `3.depth.png`), and what goes into `<key>.json`."""
        if not is_key(key):
            raise ValueError(f"{key!r} cannot be a key: letters, digits, - and _ only, at most 80")
        for extension, data in media.items():
            self._add_member(f"{key}.{extension}", data)
            self._members[member_extension(extension)[0]] += 1
        self._add_member(f"{key}.json", json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode())
        self._members["json"] += 1
        self._sources.update(metadata["captions"].keys())
        self.info.samples += 1

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self._tar.close()
        self._closing.__exit__(kind, *error)
        self.info.bytes, self.info.sha256 = self._file.size, self._file.digest.hexdigest()
        self.info.members, self.info.caption_sources = _sorted(self._members), _sorted(self._sources)

    def _add_member(self, name: str, data: bytes) -> None:
        header = tarfile.TarInfo(name)  # owner 0, time 0: the bytes tell nothing but the contents
        header.size, header.mode = len(data), 0o644
        self._tar.addfile(header, io.BytesIO(data))


def is_key(key: str) -> bool:
    """Whether webdataset will read `<key>.<extension>` as we mean it."""
    return _KEY.fullmatch(key) is not None


def as_key(sample_id: str) -> str:
    """A key for any id: itself where it can be one, otherwise its letters with a hash that tells it from others."""
    if is_key(sample_id):
        return sample_id
    digest = hashlib.sha256(sample_id.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', sample_id)[-64:]}-{digest}"


def file_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, as the index records it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Hashing:
    """A file being written, whose hash is known when the last byte is."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)


def _find(name: str) -> list[str]:
    """The shards that one expanded name stands for."""
    if name.startswith("pipe:"):
        return [name]
    if is_url(name):
        return find_files(name, ".tar")
    if os.path.isdir(name):
        return sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
    if os.path.isfile(name):
        return [name]
    if any(char in name for char in "*?["):
        return sorted(glob.glob(name))
    if name:
        raise UserError(f"no such shard or folder: {name}")
    return []


def _read_index(path: str) -> dict[str, ShardInfo]:
    index = _read_json(path)
    if index.get("version", INDEX_VERSION) != INDEX_VERSION:
        raise UserError(f"{path} is of version {index['version']}, this library reads {INDEX_VERSION}")
    try:
        infos = [ShardInfo(**entry) for entry in index.get("shards", ())]
    except TypeError as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    for info in infos:
        if not isinstance(info.samples, int) or not isinstance(info.bytes, int) or info.samples < 0:
            raise UserError(f"{path} is damaged: the entry of {info.name} has no whole numbers")
    return {info.name: info for info in infos}


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(read_url(path) if is_url(path) else Path(path).read_bytes())
    except (FileNotFoundError, MissingFile):
        return {}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it should hold a JSON object")
    return content


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter()
    for count in counts:
        total.update(count)
    return _sorted(total)


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))
