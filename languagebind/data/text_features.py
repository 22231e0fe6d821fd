"""Features of the frozen text tower, stored beside the shards so that training does not compute them at each step.

The file of `00000.tar` is `00000.text-<first digits of the tower's fingerprint>.safetensors`. It has `captions` (sorted
64-bit hashes of the captions) and `features` (N, D) in float16. A feature is looked up by the text of its caption, so
the file serves every way of drawing captions.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
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
from ..remote import file_size, folder_sizes, is_url, local_copy, read_url
from .members import read_captions, stream_samples
from .shards import split_shard
from .vidal import MissingCaption, all_captions, source_names

TextFeaturesMode = Literal["auto", "cached", "live"]


def features_path(shard: str, fingerprint: str) -> Path | str:
    """Return the path of a text tower's features for a shard, or the URL if the shard is a URL."""
    path = f"{os.path.splitext(shard)[0]}.text-{fingerprint[:12]}.safetensors"
    return path if is_url(shard) else Path(path)


def write_text_features(
    shard: str,
    source: str,
    fingerprint: str,
    encode: Callable[[list[str]], Tensor],
    batch_size: int = 256,
    negatives: bool = False,
) -> int | None:
    """Encode every caption in a local shard that `source` can select, and write the features to one file.

    Args:
        encode: function from texts to unit-norm features (B, D).
        negatives: encode the samples' hard negatives, too.

    Returns:
        The number of captions, or None if an earlier run has already written them.

    Raises `UserError` if the shard cannot be read or has no caption of this source, or the file cannot be written.
    """
    path, sources = Path(features_path(shard, fingerprint)), set(source_names(source, negatives))
    if path.is_file():
        written = _sources(path, fingerprint)
        if sources <= written:
            return None
        sources |= written
    samples = list(_captions_in(shard))
    found = {text for captions in samples for name in sources for text in all_captions(captions, name)}
    if not found:
        others = sorted({name for captions in samples for name in captions})
        raise UserError(f"{shard} has no caption of source {source!r}, only of {others}")
    texts = sorted(found, key=len)  # batches of texts of similar length need little padding
    features = torch.cat([encode(texts[i : i + batch_size]).half().cpu() for i in range(0, len(texts), batch_size)])
    hashes = np.array([_hash(text) for text in texts], np.uint64)
    order = torch.from_numpy(np.argsort(hashes))
    tensors = {"captions": torch.from_numpy(hashes.view(np.int64))[order], "features": features[order]}
    try:
        write_atomic(path, save(tensors, {"fingerprint": fingerprint, "sources": json.dumps(sorted(sources))}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return len(texts)


@dataclass(frozen=True)
class TextFeatures:
    """Looks up the features of captions. Each loader worker has a copy."""

    fingerprint: str
    """Fingerprint of the text tower that computed the features."""

    def find(self, shard: str, caption: str) -> Tensor:
        """Return the feature of a caption in a shard, (D,) in float16.

        Raises `UserError` if the caption was not encoded.
        """
        path = features_path(shard, self.fingerprint)
        hashes, features = _open_table(path)
        key = _hash(caption)
        row = np.searchsorted(hashes, key)
        if row == len(hashes) or hashes[row] != key:
            remedy = "if the shard has changed, delete the file and run languagebind embed-text again"
            raise UserError(f"{path} lacks the caption {caption[:80]!r}; {remedy}")
        return features[row]


def open_text_features(
    mode: TextFeaturesMode, shards: Iterable[str], source: str, fingerprint: str, negatives: bool = False
) -> TextFeatures | None:
    """Return the features beside the shards, or None if the tower should encode captions during training.

    `auto` uses the features if every shard has them, and the tower if no shard has any. Raises `UserError` if some
    shards lack features of this tower or this source, or a URL cannot be reached.
    """
    if mode == "live":
        return None
    paths = {shard: features_path(shard, fingerprint) for shard in shards}
    missing = [shard for shard, path in paths.items() if file_size(path) is None]
    others = sorted({name for shard in missing for name in _tables_beside(shard)})
    if mode == "auto" and len(missing) == len(paths) and not others:
        return None
    problems = [f"{name} belongs to another text tower than this run's, {fingerprint[:12]}" for name in others]
    problems += [f"{len(missing)} of {len(paths)} shards lack text features, for example {shard}" for shard in missing]
    for path in () if problems else paths.values():
        if lacking := set(source_names(source, negatives)) - _sources(path, fingerprint):
            problems.append(f"{path} lacks captions of source {', '.join(sorted(lacking))}")
    if problems:
        options = "the --text-tower, --caption-source, --negatives and --context-length of training"
        raise UserError(f"{problems[0]}; run languagebind embed-text with {options}, or use --text-features live")
    return TextFeatures(fingerprint)


def _captions_in(shard: str) -> Iterator[dict[str, Any]]:
    """Yield the captions of each sample, keyed by source."""
    try:
        for sample in stream_samples(shard, extensions=("json", "txt")):
            with suppress(MissingCaption):  # training skips such samples and counts them
                yield read_captions(sample)
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"cannot read {shard}: {first_line(error)}") from error


def _tables_beside(shard: str) -> list[str]:
    """Return the names of a shard's feature files from any text tower."""
    folder, name = split_shard(shard)
    names = folder_sizes(folder) if is_url(shard) else (path.name for path in Path(folder).glob("*.text-*"))
    return [other for other in names if other.startswith(os.path.splitext(name)[0] + ".text-")]


def _sources(path: Path | str, fingerprint: str) -> set[str]:
    """Return the caption sources of a feature file, and check that it belongs to this text tower."""
    with _reading(path):
        if isinstance(path, Path):
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
        else:
            size = int.from_bytes(read_url(path, 0, 8), "little")  # of the header with the metadata
            metadata = json.loads(read_url(path, 8, 8 + size)).get("__metadata__", {})
    if metadata.get("fingerprint") != fingerprint:
        raise UserError(f"{path} belongs to another text tower than this one, {fingerprint[:12]}; delete it")
    return set(json.loads(metadata["sources"]))


@lru_cache(256)  # covers the shards with samples in the shuffle buffer of one process
def _open_table(path: Path | str) -> tuple[np.ndarray, Tensor]:
    with _reading(path):
        # The file is memory-mapped: rows that are never looked up are never read.
        table = load_file(path if isinstance(path, Path) else local_copy(path))
        return table["captions"].numpy().view(np.uint64), table["features"]


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); delete it") from error


def _hash(caption: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little"))
