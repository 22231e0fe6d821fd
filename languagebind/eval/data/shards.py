"""Random access to the samples of shards, with their labels and captions.

Each tar file is scanned once. After that, a member is a range of bytes in a file. Streaming, as in training, would make
the order of the samples depend on the number of workers.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...config import UserError
from ...data.members import dotted, group_members, held_members, media_members
from ...data.shards import expand_shards, why_unreadable
from ...files import parse_json, text_lines
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
        """Return the member's bytes. Raises `DecodeError` if the shard is gone or truncated."""
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                data, problem = file.read(self.size), "is truncated"
        except OSError as error:
            data, problem = b"", f"cannot be read: {error.strerror}"
        if len(data) < self.size:
            raise DecodeError(self.name, f"{self.shard} {problem}")
        return data


def list_shards(data: str) -> list[Path]:
    """Return the shards of a brace pattern, .tar file or folder, copied to disk if at URLs, or [] for other data."""
    if any(map(is_url, data.split("::"))):
        return [local_copy(shard) if is_url(shard) else Path(shard) for shard in expand_shards(data)]
    if os.path.isdir(data):
        return sorted(Path(data).glob("[!.]*.tar"))
    return [Path(shard) for shard in expand_shards(data)] if data.endswith(".tar") else []


def read_shard(
    shard: Path, extensions: tuple[str, ...], num_classes: int | None
) -> Iterator[tuple[str, Member | tuple[Member, ...] | None, dict[str, Any], str]]:
    """Yield (key, source, annotation, held) for each sample in order. Without a source, `held` says what there is.

    The source is the member, or the frames, with the first of the `extensions` that the sample has. A `.npy` label must
    have `num_classes` elements; None: any number. Raises `UserError` if the shard or an annotation is damaged.
    """
    source: Member | tuple[Member, ...] | None
    for key, members in group_members(str(shard), _scan(shard)):
        found = media_members(members, extensions)
        if isinstance(found, dict):
            source = tuple(members[name] for name in found.values())
        else:
            source = members[found] if found else None
        # A .npy may be the media itself
        rest = {extension: member for extension, member in members.items() if member != source}
        try:
            annotation = _annotation(rest, num_classes)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{shard}: cannot read the labels and captions of {key}: {error}") from error
        if remark := dotted(members):
            raise UserError(f"{shard}: {key} has no label or caption{remark}")
        yield key, source, annotation, "" if found else held_members(members)


def _scan(shard: Path) -> Iterator[tuple[str, Member]]:
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                if info.isfile():
                    yield info.name, Member(shard, info.name, info.offset_data, info.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard} cannot be read as a tar file: {why_unreadable(shard, error)}") from error


def _annotation(members: dict[str, Member], num_classes: int | None) -> dict[str, Any]:
    record = parse_json(members["json"].read()) if "json" in members else {}
    if "cls" in members:
        record.setdefault("label", int(members["cls"].read()))
    if "npy" in members:
        vector = np.load(io.BytesIO(members["npy"].read()), allow_pickle=False)
        if vector.ndim != 1 or not np.isin(vector, (0, 1)).all() or num_classes not in (None, len(vector)):
            raise ValueError(f"the .npy should hold 0 or 1 for each of {num_classes} classes")
        record.setdefault("labels", np.flatnonzero(vector).tolist())
    if "txt" in members and not record.keys() & {"caption", "captions"}:
        record["captions"] = [line for line in text_lines(members["txt"].read()) if line]
    return record
