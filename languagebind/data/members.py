"""Read the members of shards and group them into samples by webdataset's rules.

A member is named `<key>.<extension>`. The key ends at the first dot of the file name, and the extension's case does not
matter. `<key>.<k>.<extension>` is frame k. The members of a sample are next to each other. A file whose name starts
with a dot, such as macOS's `._name`, belongs to no sample.
"""

import json
import random
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import IO, Any, TypeVar

from webdataset.handlers import reraise_exception
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander, tarfile_samples

from ..config import UserError
from ..files import decode_text, printable
from ..modalities import DecodeError, Modality
from ..remote import is_url, open_url
from .vidal import MissingCaption

T = TypeVar("T")
Handler = Callable[[Exception], bool]

_FRAME_MEMBER = re.compile(r"(\d+)\.(.+)")


def stream_samples(
    shard: str, handler: Handler = reraise_exception, extensions: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as webdataset does, each a dictionary from extension to contents.

    `shard` is a file, a `pipe:` command or a URL. A sample also has its `__key__`, and the shard as `__url__`. By
    default, all members are read; `extensions` have no frame numbers. If `handler`, which is called with each error,
    returns True, reading continues.
    """
    wanted = partial(_is_wanted, extensions=extensions)
    if not is_url(shard):
        yield from tarfile_samples(iter([{"url": shard}]), handler, wanted, printable)
        return
    try:
        file = open_url(shard)
    except UserError as error:
        handler(error)
        return
    with file:
        members = tar_file_expander(iter([{"url": shard, "stream": file}]), handler, wanted, printable)
        yield from group_by_keys(members, handler=handler)


def pick_samples(
    shard: str, places: Collection[int], extensions: Collection[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (place, sample) for the samples of `stream_samples` at these places, and seek past the others.

    Raises an error if the shard has members of other kinds than `_plain_members`, is damaged, or cannot seek.
    """
    with open_url(shard) if is_url(shard) else open(shard, "rb", buffering=0) as file:
        members = ((printable(name), found) for name, found in _plain_members(file))
        files = ({"fname": x, "data": y, "__url__": shard} for x, y in members if _is_wanted(x, extensions))
        for place, sample in islice(enumerate(group_by_keys(files)), max(places) + 1):
            if place in places:
                yield place, {name: _contents(file, value) for name, value in sample.items()}


def _plain_members(file: IO[bytes]) -> Iterator[tuple[str, slice]]:
    """Yield the name of each file in a tar, and where its contents are. Five times as fast as tarfile.

    Raises `tarfile.ReadError` or `ValueError` where a header is not plain: it is damaged, or has a long name.
    """
    at = 0
    while (header := file.read(512)) and any(header):
        kind, begin, size = header[156:157], at + 512, int(header[124:135], 8)
        checksum = int(header[148:154], 8) + sum(header[148:156]) - 8 * 32  # the sum of all bytes
        # Of Adler-32, the lower half is 1 + this sum, modulo 65521, and comes faster than the sum.
        wrong = len(header) < 512 or zlib.adler32(header) & 0xFFFF != (1 + checksum) % 65521
        comment = file.read(size) if kind == tarfile.XHDTYPE else b""  # webdataset's writer puts the time there
        if wrong or kind not in b"0\x005x" or header[345] or re.search(rb" (path|size|GNU[^=]*)=", comment):
            raise tarfile.ReadError(f"not a plain header at {at}")
        if kind in b"0\x00":
            yield header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"), slice(begin, begin + size)
        at = begin + (size + 511) // 512 * 512
        file.seek(at)


def _contents(file: IO[bytes], value: Any) -> Any:
    if not isinstance(value, slice):  # the key or the shard
        return value
    file.seek(value.start)
    data = file.read(value.stop - value.start)
    if len(data) < value.stop - value.start:
        raise tarfile.ReadError("unexpected end of data")
    return data


def group_members(shard: str, members: Iterable[tuple[str, T]]) -> Iterator[tuple[str, dict[str, T]]]:
    """Yield (key, values by extension) for each sample among (member name, value) pairs, or raise `UserError`."""

    def refuse(error: Exception) -> bool:
        raise UserError(f"{shard}: {error.args[0]}") from error

    shown = ((printable(name), data) for name, data in members)
    named = ({"fname": name, "data": data, "__url__": shard} for name, data in shown if _extension(name) is not None)
    seen: set[str] = set()
    for sample in group_by_keys(named, handler=refuse):
        key, _ = sample.pop("__key__"), sample.pop("__url__")
        if key in seen:
            raise UserError(f"{shard}: write the members of {key} next to each other; they are in two places")
        seen.add(key)
        yield key, sample


def member_extension(extension: str) -> tuple[str, int | None]:
    """Split an extension from its frame number: `3.depth.png` -> (`depth.png`, 3), `mp4` -> (`mp4`, None)."""
    frame = _FRAME_MEMBER.fullmatch(extension)
    return (frame[2], int(frame[1])) if frame else (extension, None)


def dotted(names: Iterable[str]) -> str:
    """Return a remark for messages if a sample has no annotation because of a dot in what was meant as its key."""
    found = {name.rpartition(".")[2]: name for name in names if name.endswith(("json", "txt", "cls"))}
    if not found or found.keys() & set(found.values()):
        return ""
    return f"; a key ends at the first dot of a name, as in <key>.{min(found.values())}: rename such files"


def media_members(names: Iterable[str], extensions: Iterable[str]) -> str | dict[int, str] | None:
    """Return a sample's media of the first of `extensions` that it has: a name, names of frames by number, or None."""
    whole = -1  # stands for the number of a member that is not a frame
    found: dict[str, dict[int, str]] = {}
    for name in names:
        extension, frame = member_extension(name)
        found.setdefault(extension, {})[whole if frame is None else frame] = name
    for extension in extensions:
        if extension in found:
            return extension if whole in found[extension] else dict(sorted(found[extension].items()))
    return None


def media_sources(sample: Mapping[str, Any], modality: Modality) -> dict[int | None, Any]:
    """Return a modality's members of a sample by frame number, or all as None; or raise `DecodeError`."""
    members = media_members((name for name in sample if not name.startswith("__")), modality.extensions)
    if members is None:
        raise DecodeError(sample["__key__"], f"no member is named {' or '.join(modality.extensions)}")
    if isinstance(members, str):
        return {None: sample[members]}
    frames: dict[int | None, Any] = {number: sample[name] for number, name in members.items()}
    return {None: list(frames.values())} if modality.input_shape[1] > 1 else frames


def choose_frame(sources: Mapping[int | None, Any], rng: random.Random, frame: int | None) -> int | None:
    """Return the number of one of a sample's `media_sources`: `frame`, or a random one if there is no such frame."""
    if None in sources:
        return None
    return frame if frame in sources else rng.choice(list(sources))


def held_members(names: Iterable[str]) -> str:
    """Return what a sample without a modality's member holds instead, as the end of a message."""
    held = {member_extension(name)[0] for name in names if not name.startswith("__")} - {"json", "txt"}
    return f"it holds {', '.join(sorted(held)) or 'captions alone'}: is --modality right?"


def read_captions(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the captions of a sample from its `.json` and `.txt`, keyed by source.

    The source of the `.txt` is `txt`. Texts in the `.json` that name no source have the source `caption`. Raises
    `MissingCaption` if the `.json` has no captions or is damaged, and there is no `.txt`.
    """
    captions = {"txt": decode_text(sample["txt"])} if "txt" in sample else {}
    if "json" in sample:
        try:
            record = json.loads(decode_text(sample["json"]))
            found = record["captions"] if "captions" in record else record["caption"]
            captions |= found if isinstance(found, dict) else {"caption": found}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if not captions:  # a .json beside a .txt may have other contents
                raise MissingCaption(f"unreadable .json: {error!r}") from error
    return captions


def _is_wanted(name: str, extensions: Collection[str] | None) -> bool:
    """Return True if a member belongs to a sample, and is an annotation or has one of the extensions, if given."""
    extension = _extension(name)
    if extension is None or extensions is None:
        return extension is not None
    return member_extension(extension)[0] in extensions or bool(dotted([extension]))


def _extension(name: str) -> str | None:
    """Return the extension of a member's name in lower case, or None if the member belongs to no sample."""
    own = name.startswith("__") and re.match("__[^/]*__(/|$)", name)  # webdataset's
    extension = None if own or name.rpartition("/")[2].startswith(".") else base_plus_ext(name)[1]
    return extension and extension.lower()
