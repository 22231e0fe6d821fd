"""Check the hashes, members, captions and media of shards, and count what they hold."""

import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import first_line
from ..modalities import DecodeError, Modality
from ..remote import fetched
from .members import media_members, member_extension, read_captions, stream_samples
from .shards import ShardInfo, expand_shards, file_sha256, indexed
from .vidal import MissingCaption

_END_OF_TAR = bytes(1024)


@dataclass(frozen=True)
class Fault:
    """Something wrong in a shard; `key` is empty where the whole shard is meant."""

    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard}{f' {self.key}' if self.key else ''}: {self.what}"


@dataclass
class Checked:
    """What some shards hold, and what is wrong with them."""

    faults: list[Fault] = field(default_factory=list)
    infos: dict[str, ShardInfo] = field(default_factory=dict)  # of each readable shard
    sizes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # bytes, by extension
    words: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # words, by caption source
    captions: Counter[str] = field(default_factory=Counter)
    keys: dict[str, str] = field(default_factory=dict)  # key -> the shard that holds it

    def statistics(self) -> dict[str, Any]:
        """Return counts; sizes and lengths as (least, median, most)."""
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
    """Read every member of the shards, as training does.

    Args:
        spec: shards, as `expand_shards` takes them.
        modality: what each sample must hold.
        decode: whether to decode it, too.

    Raises:
        UserError: there are no such shards, an index is damaged, or their store cannot be reached.
    """
    checked, shards = Checked(), expand_shards(spec)
    index = indexed(shards)
    for shard in tqdm(shards, unit=" shards", disable=None):
        with fetched(shard) as path:
            _check_shard(checked, shard, path, index[shard], modality, decode)
    return checked


def _check_shard(
    checked: Checked, shard: str, path: Path, known: ShardInfo | None, modality: Modality | None, decode: bool
) -> None:
    info = ShardInfo(path.name, bytes=os.path.getsize(path), sha256=file_sha256(path))
    faults = (
        [] if _is_whole(path) else ["it does not end as a tar file does: it was cut off, or is another kind of file"]
    )

    def note(error: Exception) -> bool:
        faults.append(str(error.args[0]) if error.args else first_line(error))
        return True

    if known and (known.bytes, known.sha256) != (info.bytes, info.sha256):
        expected = f"{known.bytes} bytes, SHA-256 {known.sha256[:12]}…"
        found = f"{info.bytes} bytes, {info.sha256[:12]}…"
        checked.faults.append(Fault(shard, "", f"the index says {expected}, the file has {found}"))
    for sample in () if faults else stream_samples(str(path), note):
        key, _ = sample.pop("__key__"), sample.pop("__url__")
        checked.faults += [Fault(shard, key, what) for what in _check_sample(checked, info, shard, key, sample)]
        if modality is not None:
            checked.faults += [Fault(shard, key, what) for what in _check_media(sample, modality, decode)]
    checked.faults += [Fault(shard, "", f"broken tar file: {what}") for what in faults]
    if not faults:
        checked.infos[shard] = info


def _is_whole(shard: Path) -> bool:
    with open(shard, "rb") as file:
        file.seek(max(0, os.path.getsize(shard) - len(_END_OF_TAR)))
        return file.read() == _END_OF_TAR


def _check_sample(checked: Checked, info: ShardInfo, shard: str, key: str, members: dict[str, bytes]) -> list[str]:
    """Count a sample's members and captions; return what is wrong with it."""
    faults = [f"the key is also in {checked.keys[key]}"] if key in checked.keys else []
    checked.keys[key] = shard
    info.samples += 1
    for name, data in members.items():
        extension = member_extension(name)[0]
        info.members[extension] = info.members.get(extension, 0) + 1
        checked.sizes[extension].append(len(data))
        if not data:
            faults.append(f"{name} is empty")
    try:
        captions = read_captions(members)
    except MissingCaption as error:
        return [*faults, str(error)]
    lists = {source: text if isinstance(text, list) else [text] for source, text in captions.items()}
    texts = {source: [text for text in values if isinstance(text, str)] for source, values in lists.items()}
    if not any(text.strip() for values in texts.values() for text in values):
        faults.append("it has no caption")
    for source, values in texts.items():
        info.caption_sources[source] = info.caption_sources.get(source, 0) + 1
        checked.words[source] += [len(text.split()) for text in values]
        checked.captions.update(values)
    return faults


def _check_media(members: dict[str, bytes], modality: Modality, decode: bool) -> Iterable[str]:
    """Yield what is wrong with a sample's media."""
    found = media_members(members, modality.extensions)
    if found is None:
        yield f"no member is named {' or '.join(modality.extensions)}"
        return
    if isinstance(found, str):
        sources: list[Any] = [members[found]]
    else:
        frames = [members[name] for name in found.values()]
        sources = [frames] if modality.input_shape[1] > 1 else frames
    for source in sources if decode else ():
        try:
            modality.preprocess(source)
        except DecodeError as error:
            yield error.reason


def _spread(values: list[int]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)
