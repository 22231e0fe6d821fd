"""Features of a frozen encoder, stored beside the shards so that training does not compute them at each step.

`00000.<modality>-<first digits of the encoder's fingerprint>.safetensors` belongs to `00000.tar`; text is a modality,
too. It has `features` (N, D) in float16, and the sorted 64-bit hashes of what was encoded: `captions` or `media`. As a
caption or the bytes of media look a feature up, the file serves every way of drawing captions and frames, and a sample
that has changed never gets the features of an older one.
"""

import hashlib
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..config import UserError, first_line
from ..files import write_atomic
from ..remote import file_sizes, folder_sizes, is_url, local_copy, read_url
from .members import read_captions, stream_samples
from .shards import expand_shards, split_shard
from .vidal import MissingCaption, all_captions, source_names

FeaturesMode = Literal["auto", "cached", "live"]
Item = str | bytes | Sequence[bytes]  # a caption, a file, or the files of a clip's frames


@dataclass(frozen=True)
class FeatureStore:
    """The features of one frozen encoder beside the shards. Each loader worker has a copy."""

    fingerprint: str  # of the encoder
    modality: str = "text"  # of a text tower, or of a partner

    @property
    def _words(self) -> tuple[str, str, str]:  # the encoder in messages, the name of its command, and what that needs
        if self.modality == "text":
            return "text tower", "text", "--text-tower, --caption-source, --negatives and --context-length"
        return "partner", "anchor", "--anchor"

    def path(self, shard: str) -> Path | str:
        """Return the path of the features of a shard, or the URL if the shard is a URL."""
        path = f"{os.path.splitext(shard)[0]}.{self.modality}-{self.fingerprint[:12]}.safetensors"
        return path if is_url(shard) else Path(path)

    def find(self, shard: str, item: Item) -> Tensor:
        """Return the feature (D,), float16, of a caption or media. Raises `UserError` if it was not encoded."""
        path = self.path(shard)
        hashes, features = _open_table(path)
        key = hash_item(item)
        row = np.searchsorted(hashes, key)
        if row == len(hashes) or hashes[row] != key:
            lost = f"the caption {item[:80]!r}" if isinstance(item, str) else f"the {self.modality} of a sample"
            remedy = f"if the shard has changed, delete the file and run languagebind embed-{self._words[1]} again"
            raise UserError(f"{path} lacks {lost}; {remedy}")
        return features[row]

    def write(self, shard: str, items: Iterable[Item], features: Tensor, sources: Iterable[str] = ()) -> None:
        """Write the features (N, D) of N items of a local shard. `sources` names the captions that they cover."""
        hashes = np.array([hash_item(item) for item in items], np.uint64)
        order = torch.from_numpy(np.argsort(hashes))
        name = "captions" if self.modality == "text" else "media"
        tensors = {name: torch.from_numpy(hashes.view(np.int64))[order], "features": features[order]}
        metadata = {"fingerprint": self.fingerprint, "sources": json.dumps(sorted(sources))}
        try:
            write_atomic(Path(self.path(shard)), save(tensors, metadata))
        except OSError as error:
            raise UserError(f"cannot write {self.path(shard)}: {error.strerror}") from error

    def serves(self, mode: FeaturesMode, shards: Iterable[str], sources: Iterable[str] = ()) -> bool:
        """Tell whether to use the features beside the shards; if not, the encoder runs during training.

        `auto` uses the encoder if no shard has features. Raises `UserError` if some shards lack features of this
        encoder or these sources, or a URL cannot be reached.
        """
        if mode == "live":
            return False
        paths = {shard: self.path(shard) for shard in shards}
        missing = [shard for shard, size in zip(paths, file_sizes(paths.values()), strict=True) if size is None]
        others = self._beside(missing)
        if mode == "auto" and len(missing) == len(paths) and not others:
            return False
        owner, name, options = self._words
        problems = [f"{other} belongs to another {owner} than this run's, {self.fingerprint[:12]}" for other in others]
        lack = f"of {len(paths)} shards lack {self.modality} features, for example"
        problems += [f"{len(missing)} {lack} {shard}" for shard in missing]
        for shard in () if problems else paths:
            if lacking := set(sources) - (self.sources(shard) or set()):
                problems.append(f"{paths[shard]} lacks captions of source {', '.join(sorted(lacking))}")
        if problems:
            remedy = f"run languagebind embed-{name} with the {options} of training, or use --{name}-features live"
            raise UserError(f"{problems[0]}; {remedy}")
        return True

    def sources(self, shard: str) -> set[str] | None:
        """Return the caption sources that a shard's features cover, or None if a local shard has no features.

        Raises `UserError` if the file is damaged, or belongs to another encoder.
        """
        path = self.path(shard)
        if isinstance(path, Path) and not path.is_file():
            return None
        with _reading(path):
            if isinstance(path, Path):
                with safe_open(path, "np") as file:
                    metadata = file.metadata() or {}
            else:
                size = int.from_bytes(read_url(path, 0, 8), "little")  # of the header with the metadata
                metadata = json.loads(read_url(path, 8, 8 + size)).get("__metadata__", {})
        if metadata.get("fingerprint") != self.fingerprint:
            other = f"another {self._words[0]} than this one, {self.fingerprint[:12]}"
            raise UserError(f"{path} belongs to {other}; delete it")
        return set(json.loads(metadata["sources"]))

    def _beside(self, shards: Iterable[str]) -> list[str]:
        """Return the names of the shards' feature files of this modality, from any encoder."""
        starts: dict[str, set[str]] = defaultdict(set)  # by folder, so that each is listed once
        for folder, name in map(split_shard, shards):
            starts[folder].add(f"{os.path.splitext(name)[0]}.{self.modality}")
        found: list[str] = []
        for folder, own in starts.items():
            names = folder_sizes(folder) if is_url(folder) else [x.name for x in Path(folder).glob("*.safetensors")]
            found += (name for name in names if name.rpartition("-")[0] in own)
        return sorted(found)


def write_text_features(
    shard: str, source: str, fingerprint: str, encode: Callable[[list[str]], Tensor], batch_size: int = 256,
    negatives: bool = False,
) -> int | None:  # fmt: skip
    """Encode every caption in a local shard that `source` can select, and write the features to one file.

    `encode` returns the unit-norm features (B, D) of texts. The result is the number of captions, or None if an earlier
    run has already written them. With `negatives`, the samples' hard negatives are encoded, too. Raises `UserError` if
    the shard cannot be read or has no caption of this source, or the file cannot be written.
    """
    store, sources = FeatureStore(fingerprint), set(source_names(source, negatives))
    written = store.sources(shard)
    if written is not None and sources <= written:
        return None
    sources |= written or set()
    samples = []
    for sample in samples_in(shard, ("json", "txt")):
        with suppress(MissingCaption):  # training skips such samples and counts them
            samples.append(read_captions(sample))
    found = {text for captions in samples for name in sources for text in all_captions(captions, name)}
    if not found:
        others = sorted({name for captions in samples for name in captions})
        raise UserError(f"{shard} has no caption of source {source!r}, only of {others}")
    texts = sorted(found, key=len)  # batches of texts of similar length need little padding
    features = [encode(texts[i : i + batch_size]).half().cpu() for i in range(0, len(texts), batch_size)]
    store.write(shard, texts, torch.cat(features), sources)
    return len(texts)


def hash_item(item: Item) -> np.uint64:
    """Return the 64-bit hash of a caption, or of the contents of a file or a clip's frames."""
    contents = item.encode() if isinstance(item, str) else item if isinstance(item, bytes) else b"".join(item)
    return np.uint64(int.from_bytes(hashlib.blake2b(contents, digest_size=8).digest(), "little"))


def local_shards(spec: str) -> list[str]:
    """Return the paths of the shards in a specification. Raises `UserError` if no file can be written beside them."""
    shards = expand_shards(spec)
    if streams := [shard for shard in shards if is_url(shard) or shard.startswith("pipe:")]:
        raise UserError(f"features cannot be written beside {streams[0]}; use local shards, then copy the features")
    return shards


def samples_in(shard: str, extensions: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard with the members of these extensions. Raises `UserError` if it cannot be read."""
    try:
        yield from stream_samples(shard, extensions=extensions)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"cannot read {shard}: {first_line(error)}") from error


@lru_cache(256)  # covers the shards with samples in the shuffle buffer of one process
def _open_table(path: Path | str) -> tuple[np.ndarray, Tensor]:
    with _reading(path):
        # The file is memory-mapped: rows that are never looked up are never read.
        table: dict[str, Any] = load_file(path if isinstance(path, Path) else local_copy(path))
        features, (hashes,) = table.pop("features"), table.values()
        return hashes.numpy().view(np.uint64), features


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); delete it") from error
