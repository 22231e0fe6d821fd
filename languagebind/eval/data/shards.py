"""Reads webdataset shards at random: each tar file is indexed once, after which a member is a place in a file.

Streaming would tie the order of the samples to the number of workers, and an evaluation should not depend on that.
"""

import io
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ...config import UserError
from ...data.shards import expand_shards, media_members
from ...files import check_regular, parse_json, text_lines
from ...modalities import DecodeError
from ...remote import is_url, local_copy


@dataclass(frozen=True)
class Member:
    """A file inside a shard."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's bytes.

        Raises:
            DecodeError: the shard is gone or cut off.
        """
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise DecodeError(self.name, f"cannot read {self.shard}: {error.strerror}") from error
        if len(data) < self.size:
            raise DecodeError(self.name, f"{self.shard} is cut off")
        return data


def list_shards(data: str) -> list[Path]:
    """The shards that a brace pattern, a .tar file or a folder of them stands for; empty if it is none of these.

    Those behind URLs are copied to the disk, since they are read at random.

    Raises:
        UserError: a shard that was named does not exist, or cannot be copied.
    """
    if any(map(is_url, data.split("::"))):
        return [local_copy(shard) if is_url(shard) else Path(shard) for shard in expand_shards(data)]
    if os.path.isdir(data):  # unlike Path's, False of a name that is too long
        return sorted(Path(data).glob("[!.]*.tar"))
    return [Path(shard) for shard in expand_shards(data)] if data.endswith(".tar") else []


def read_shard(shard: Path, extensions: tuple[str, ...], num_classes: int | None) -> Iterable[tuple[str, Any, dict]]:
    """(key, source, annotation) of each sample in a shard, in its order.

    Args:
        shard: the .tar file.
        extensions: of the media member, the first one present is taken; `<key>.<k>.<extension>` is frame k.
        num_classes: what the length of a `.npy` label is checked against.

    Raises:
        UserError: the shard is no tar file, is cut off or has a sample or a member twice; an annotation cannot be read.
    """
    seen: set[str] = set()
    for key, group in groupby(_members(shard), key=lambda member: _split(member.name)[0]):
        if key in seen:
            raise UserError(f"{shard}: members of {key} lie at two places: write those of a sample next to each other")
        seen.add(key)
        members: dict[str, Member] = {}
        for member in group:
            if members.setdefault(_split(member.name)[1], member) is not member:
                raise UserError(f"{shard}: {member.name} is there twice")
        source = _media(members, extensions)
        # A .npy may be the media itself.
        rest = {extension: member for extension, member in members.items() if member != source}
        try:
            yield key, source, _annotation(rest, num_classes)
        except ValueError as error:
            raise UserError(f"{shard}: the annotation of {key} cannot be read: {error}") from error


def _members(shard: Path) -> Iterable[Member]:
    """What is hidden, as macOS's `._name`, is no part of a sample; webdataset sees it so, too."""
    try:
        check_regular(shard)
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                if info.isfile() and not info.name.rpartition("/")[2].startswith("."):
                    yield Member(shard, info.name, info.offset_data, info.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard} cannot be read as a tar file: {error}") from error


def _split(name: str) -> tuple[str, str]:
    """`a/b.0.png` -> (`a/b`, `0.png`): the key ends at the first dot of the file name, as in webdataset."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return folder + slash + key, extension.lower()


def _media(members: dict[str, Member], extensions: tuple[str, ...]) -> Member | tuple[Member, ...] | None:
    found = media_members(members, extensions)
    if isinstance(found, dict):
        return tuple(members[name] for name in found.values())
    return None if found is None else members[found]


def _annotation(members: dict[str, Member], num_classes: int | None) -> dict[str, Any]:
    record = parse_json(members["json"].read()) if "json" in members else {}
    if not isinstance(record, dict):
        raise ValueError("the .json should be an object")
    if "cls" in members:
        record.setdefault("label", int(members["cls"].read()))
    if "npy" in members:
        record.setdefault("labels", _positions(members["npy"].read(), num_classes))
    if "txt" in members and not record.keys() & {"caption", "captions"}:
        record["captions"] = text_lines(members["txt"].read())
    return record


def _positions(data: bytes, num_classes: int | None) -> list[int]:
    """A 0/1 vector over the classes to the indices of its ones."""
    vector = np.load(io.BytesIO(data), allow_pickle=False)
    if vector.ndim != 1 or not np.isin(vector, (0, 1)).all() or num_classes not in (None, len(vector)):
        raise ValueError(f"the .npy should hold 0 or 1 for each of {num_classes} classes")
    return np.flatnonzero(vector).tolist()
