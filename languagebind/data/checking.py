"""Checking shards: hashes, tar structure, keys, captions and, when asked, every sample's media; and statistics."""

import os
import statistics
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..modalities import DecodeError, Modality
from ..remote import fetched
from .shards import ShardInfo, expand_shards, file_sha256, indexed, media_members, member_extension, read_captions
from .vidal import MissingCaption

_END_OF_TAR = bytes(1024)


@dataclass(frozen=True)
class Fault:
    """Something wrong in a shard; `key` is empty where it is the whole shard's."""

    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard}{f' {self.key}' if self.key else ''}: {self.what}"


@dataclass
class Checked:
    """What was found in some shards."""

    faults: list[Fault] = field(default_factory=list)
    infos: dict[str, ShardInfo] = field(default_factory=dict)  # of each shard that can be read
    sizes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # bytes, by extension
    words: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # words, by caption source
    captions: Counter = field(default_factory=Counter)
    keys: dict[str, str] = field(default_factory=dict)  # the shard that each key is in

    def statistics(self) -> dict[str, Any]:
        """Counts; sizes and lengths as (least, median, most)."""
        return {
            "shards": len(self.infos),
            "samples": len(self.keys),
            "bytes": sum(info.bytes for info in self.infos.values()),
            "members": {name: (len(sizes), *_spread(sizes)) for name, sizes in sorted(self.sizes.items())},
            "captions": {name: (len(words), *_spread(words)) for name, words in sorted(self.words.items())},
            "captions in all": self.captions.total(),
            "distinct captions": len(self.captions),
        }


def check_shards(spec: str | os.PathLike, modality: Modality | None = None, decode: bool = False) -> Checked:
    """Read every member of the shards.

    Args:
        spec: shards, as `expand_shards` takes them.
        modality: each sample must have it.
        decode: decode it, too.

    Raises:
        UserError: there are no such shards, an index is damaged, or their store cannot be reached.
    """
    checked, shards = Checked(), expand_shards(spec)
    known = indexed(shards)
    for shard in tqdm(shards, unit=" shards", disable=None):
        with fetched(shard) as path:
            _check_shard(checked, shard, path, known[shard], modality, decode)
    return checked


def _check_shard(
    checked: Checked, shard: str, path: Path, known: ShardInfo | None, modality: Modality | None, decode: bool
) -> None:
    info = ShardInfo(path.name, bytes=os.path.getsize(path), sha256=file_sha256(path))
    if known and (known.bytes, known.sha256) != (info.bytes, info.sha256):
        expected = f"{known.bytes} bytes, SHA-256 {known.sha256[:12]}…"
        found = f"{info.bytes} bytes, {info.sha256[:12]}…"
        checked.faults.append(Fault(shard, "", f"the index says {expected}, the file has {found}"))
    try:
        for key, members in _samples(path):
            _check_sample(checked, info, shard, key, members)
            if modality is not None:
                _check_media(checked, shard, key, members, modality, decode)
    except (tarfile.TarError, EOFError, OSError) as error:
        checked.faults.append(Fault(shard, "", f"broken tar file: {error}"))
        return
    checked.infos[shard] = info


def _samples(shard: Path) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """(key, [(extension, contents)]) of each sample, the members of one next to each other as in webdataset.

    Raises:
        tarfile.TarError: the file is no tar file, or ends too early.
    """
    with open(shard, "rb") as file:
        file.seek(max(0, os.path.getsize(shard) - len(_END_OF_TAR)))
        if file.read() != _END_OF_TAR:
            raise tarfile.ReadError("it does not end as a tar file does: it was cut off, or is of another kind")
    with tarfile.open(shard, "r:") as archive:
        members = ((*_split(member.name), archive.extractfile(member).read()) for member in archive if member.isfile())
        for key, group in groupby(members, key=lambda member: member[0]):
            yield key, [(extension, data) for _, extension, data in group]


def _split(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return folder + slash + key, extension


def _check_sample(checked: Checked, info: ShardInfo, shard: str, key: str, members: list[tuple[str, bytes]]) -> None:
    def fault(what: str) -> None:
        checked.faults.append(Fault(shard, key, what))

    if key in checked.keys:
        fault(f"the key is also in {checked.keys[key]}" if checked.keys[key] != shard else "the key is there twice")
    checked.keys[key] = shard
    info.samples += 1
    for name, number in Counter(extension for extension, _ in members).items():
        if number > 1:
            fault(f"{number} members are named {name}")
    for name, data in members:
        extension = member_extension(name)[0]
        info.members[extension] = info.members.get(extension, 0) + 1
        checked.sizes[extension].append(len(data))
        if not data:
            fault(f"{name} is empty")
    captions = _captions(dict(members), fault)
    for source, texts in captions.items():
        info.caption_sources[source] = info.caption_sources.get(source, 0) + 1
        for text in texts:
            checked.words[source].append(len(text.split()))
            checked.captions[text] += 1


def _captions(members: dict[str, bytes], fault) -> dict[str, list[str]]:
    """The texts of each caption source."""
    try:
        captions = read_captions(members)
    except MissingCaption as error:
        fault(str(error))
        return {}
    texts = {source: text if isinstance(text, list) else [text] for source, text in captions.items()}
    if not any(isinstance(text, str) and text.strip() for values in texts.values() for text in values):
        fault("it has no caption")
    return {source: [text for text in values if isinstance(text, str)] for source, values in texts.items()}


def _check_media(
    checked: Checked, shard: str, key: str, members: list[tuple[str, bytes]], modality: Modality, decode: bool
) -> None:
    contents = dict(members)
    found = media_members(contents, modality.extensions)
    if found is None:
        checked.faults.append(Fault(shard, key, f"no member is named {' or '.join(modality.extensions)}"))
    elif decode:
        for source in _sources(found, contents, modality):
            try:
                modality.preprocess(source)
            except DecodeError as error:
                checked.faults.append(Fault(shard, key, error.reason))


def _sources(found: str | dict[int, str], contents: dict[str, bytes], modality: Modality) -> Iterable[Any]:
    if isinstance(found, str):
        return [contents[found]]
    frames = [contents[name] for name in found.values()]
    return [frames] if modality.input_shape[1] > 1 else frames


def _spread(values: list[int]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)
