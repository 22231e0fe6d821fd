"""Check the hashes, members, captions and media of shards, and count their contents.

languagebind check-shards /data/depth --modality depth --decode
"""

import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from ..config import UserError, first_line, parse
from ..files import POINTER, is_pointer
from ..modalities import DecodeError, Modality, modality_class
from ..remote import fetched, is_url
from .members import dotted, held_members, media_sources, member_extension, read_captions, stream_samples
from .shards import ShardInfo, count_samples, expand_shards, file_sha256, indexed, write_index
from .vidal import BLANK, NOT_TEXT, MissingCaption, caption_faults, texts_of

FAULTS_SHOWN = 50


@dataclass
class Checked:
    """The contents and the faults of the checked shards."""

    faults: list[str] = field(default_factory=list)  # `shard key: fault`, without a key for the whole shard
    infos: dict[str, ShardInfo] = field(default_factory=dict)  # shard -> index entry, readable shards only
    sizes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # bytes per member, by extension
    words: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # words per caption, by source
    captions: Counter[str] = field(default_factory=Counter)
    unusable: Counter[str] = field(default_factory=Counter)  # captions by their fault
    keys: dict[str, str] = field(default_factory=dict)  # key of a sample -> its shard

    def statistics(self) -> dict[str, Any]:
        """Return counts, and the minimum, median and maximum of the member sizes and caption lengths."""
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
    """Read every member of the shards as training does, and return their contents and faults.

    Each sample should have media of the `modality`, which `decode` also decodes. Raises `UserError` if no shard is
    found, an index is damaged, or the store cannot be reached.
    """
    checked, shards = Checked(), expand_shards(spec)
    index, sizes = indexed(shards), count_samples(dict.fromkeys(shards))
    for shard in tqdm(shards, unit=" shards", disable=None):
        with fetched(shard) as path:
            info = ShardInfo(path.name, bytes=os.path.getsize(path), sha256=file_sha256(path))
            if (known := index[shard]) and (known.bytes, known.sha256) != (info.bytes, info.sha256):
                expected, found = (f"{each.bytes} bytes, SHA-256 {each.sha256[:12]}…" for each in (known, info))
                checked.faults.append(f"{shard}: the index says {expected}, but the file has {found}")
            damage = POINTER if is_pointer(path) else "it is truncated, or is not a tar file"
            errors = [] if _is_whole(path) else [damage]
            for key, members in () if errors else _read_samples(path, errors):
                faults = list(_check_sample(checked, info, shard, key, members))
                if modality is not None:
                    faults += _check_media(members, modality, decode)
                checked.faults += [f"{shard} {key}: {fault}" for fault in faults]
        checked.faults += [f"{shard}: broken tar file: {error}" for error in errors]
        if not errors:
            checked.infos[shard] = info
            if sizes[shard] not in (None, info.samples):
                checked.faults.append(f"{shard}: it has {info.samples} samples, but sizes.json says {sizes[shard]}")
    return checked


def _is_whole(shard: Path) -> bool:
    """Return True if a file ends with the 1,024 zero bytes that end a tar file."""
    with open(shard, "rb") as file:
        file.seek(max(0, os.path.getsize(shard) - 1024))
        return file.read() == bytes(1024)


def _read_samples(shard: Path, errors: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield each sample as (key, contents by extension), and append the read errors to `errors`."""

    def note(error: Exception) -> bool:
        errors.append(str(error.args[0]) if error.args else first_line(error))
        return True

    for sample in stream_samples(str(shard), note):
        key, _ = sample.pop("__key__"), sample.pop("__url__")
        yield key, sample


def _check_sample(checked: Checked, info: ShardInfo, shard: str, key: str, members: dict[str, bytes]) -> Iterator[str]:
    """Count a sample's members and captions, and yield its faults."""
    if key in checked.keys:
        yield f"the key is also in {checked.keys[key]}"
    checked.keys[key] = shard
    for name, data in members.items():
        checked.sizes[member_extension(name)[0]].append(len(data))
        if not data:
            yield f"{name} is empty"
    try:
        captions, problem = read_captions(members), "the sample has no caption"
    except MissingCaption as error:
        captions, problem = {}, str(error)
    info.count(members, captions)
    texts: list[str] = []
    for source, value in captions.items():
        checked.words[source] += [len(text.split()) for text in texts_of(value)]
        texts += texts_of(value)
    checked.captions.update(texts)
    faults = caption_faults(captions)
    checked.unusable.update(faults)
    if faults[NOT_TEXT]:
        yield f"{faults[NOT_TEXT]} of {len(texts)} captions are {NOT_TEXT}"
    if faults[BLANK] == len(texts):
        yield problem + dotted(members)


def _check_media(members: dict[str, bytes], modality: Modality, decode: bool) -> Iterator[str]:
    """Yield the faults of a sample's media."""
    try:
        sources = media_sources({"__key__": "", **members}, modality)
    except DecodeError as error:
        yield f"{error.reason}; {held_members(members)}"
        return
    for source in sources.values() if decode else ():
        try:
            modality.preprocess(source)
        except DecodeError as error:
            yield error.reason


def _spread(values: list[int]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


@dataclass(frozen=True)
class CheckOptions:
    """Check shards."""

    shards: Annotated[str, tyro.conf.Positional]
    """shards: a folder, a glob or a brace pattern, on disk or at a URL (s3://...); several joined by `::`"""
    modality: str | None = None
    """the modality that each sample must contain"""
    decode: bool = False
    """also decode every sample; needs --modality"""
    write_index: bool = False
    """write index.json beside the shards if there are no faults"""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the shards, print the result, and return the exit status."""
    options = parse(CheckOptions, argv, prog="languagebind check-shards")
    if options.decode and options.modality is None:
        raise UserError("--decode needs --modality")
    if options.write_index and is_url(options.shards):
        raise UserError("--write-index needs local shards; run it on a local copy, then copy index.json to the URL")
    modality = modality_class(options.modality)() if options.modality else None
    checked = check_shards(options.shards, modality, options.decode)
    print_statistics(checked)
    for fault in checked.faults[:FAULTS_SHOWN]:
        print(f"fault: {fault}")
    if len(checked.faults) > FAULTS_SHOWN:
        print(f"... and {len(checked.faults) - FAULTS_SHOWN} more")
    if options.write_index and checked.faults:
        raise UserError("index.json was not written, because some shards have faults")
    for folder in {Path(shard).parent for shard in checked.infos} if options.write_index else ():
        write_index(folder, [info for shard, info in checked.infos.items() if Path(shard).parent == folder])
        print(f"wrote {folder / 'index.json'}")
    print(f"{len(checked.faults)} faults" if checked.faults else "no faults")
    return 1 if checked.faults else 0


def print_statistics(checked: Checked) -> None:
    """Print the numbers of samples, files and captions."""
    found = checked.statistics()
    print(f"{found['samples']} samples in {found['shards']} shards, {found['bytes'] / 1e6:.1f} MB")
    for name, (number, *spread) in found["members"].items():
        print(f"  .{name}: {number} members; bytes {' / '.join(f'{x:.0f}' for x in spread)} (min / median / max)")
    for name, (number, *spread) in found["captions"].items():
        print(f"  {name}: {number} captions; words {' / '.join(f'{x:g}' for x in spread)}")
    print(f"  {found['distinct captions']} of {found['captions in all']} captions are distinct")
    for fault, number in sorted(checked.unusable.items()):
        print(f"  {number} captions are {fault}")
