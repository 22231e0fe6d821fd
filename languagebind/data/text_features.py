"""Features of the frozen text tower beside the shards, so that training does not compute them again at each step.

`00000.tar` gets `00000.text-<first digits of the tower's fingerprint>.safetensors` with `captions`, the sorted 64-bit
hashes of its captions, and `features`, (N, D) in float16. Looked up by what the caption says, they serve every way of
drawing captions.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal

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

# Tables that stay open in each process: those of the shards whose samples wait in its shuffle buffer.
OPEN_TABLES = 256


def features_path(shard: str, fingerprint: str) -> Path | str:
    """Where the features of a shard's captions are, by one text tower; a URL of a shard behind one."""
    path = f"{os.path.splitext(shard)[0]}.text-{fingerprint[:12]}.safetensors"
    return path if is_url(shard) else Path(path)


def write_text_features(
    shard: str, source: str, fingerprint: str, encode: Callable[[list[str]], Tensor], batch_size: int = 256
) -> int | None:
    """Encode the captions of one shard that `source` may draw; nothing is at the path until all are written.

    Args:
        encode: texts -> (B, D), unit norm.

    Returns:
        How many captions; None where a former run wrote them already.

    Raises:
        UserError: the shard cannot be read, has no caption of this source, or the file cannot be written.
    """
    path, sources = features_path(shard, fingerprint), set(source_names(source))
    if path.is_file():
        written = _sources(path, fingerprint)
        if sources <= written:
            return None
        sources |= written
    texts = sorted(_texts_of(shard, sources), key=len)  # a batch of texts of one length holds the least padding
    if not texts:
        raise UserError(f"{shard} has no caption of source {source!r}, only of {_sources_in(shard)}")
    features = torch.cat([encode(texts[i : i + batch_size]).half().cpu() for i in range(0, len(texts), batch_size)])
    hashes = np.array([_hash(text) for text in texts], np.uint64)
    order = np.argsort(hashes)
    tensors = {
        "captions": torch.from_numpy(hashes[order].view(np.int64)),
        "features": features[torch.from_numpy(order)],
    }
    try:
        write_atomic(path, save(tensors, {"fingerprint": fingerprint, "sources": json.dumps(sorted(sources))}))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return len(texts)


class TextFeatures:
    """Looks up the features of captions. Loader workers take a copy.

    Args:
        fingerprint: of the text tower that made them.
    """

    def __init__(self, fingerprint: str):
        self.fingerprint = fingerprint

    def find(self, shard: str, caption: str) -> Tensor:
        """The feature (D,), float16, of a caption of a shard.

        Raises:
            UserError: it was not embedded.
        """
        path = features_path(shard, self.fingerprint)
        hashes, features = _open_table(path)
        key = _hash(caption)
        row = np.searchsorted(hashes, key)
        if row == len(hashes) or hashes[row] != key:
            raise UserError(
                f"{path} lacks the caption {caption[:80]!r}: was the shard made anew? Delete the file, run"
                " scripts/embed_text.py again"
            )
        return features[row]


def open_text_features(
    mode: TextFeaturesMode, shards: Iterable[str], source: str, fingerprint: str
) -> TextFeatures | None:
    """The features beside the shards; None where the tower is to encode the captions as they come.

    `auto` takes the features where every shard has them, and the tower where none has.

    Raises:
        UserError: some shards lack their features, or those of this tower or this source; or a URL is out of reach.
    """
    shards = list(shards)
    if mode == "live":
        return None
    missing = [shard for shard in shards if not _is_there(features_path(shard, fingerprint))]
    others = sorted({name for shard in missing for name in _tables_beside(shard)})
    if mode == "auto" and len(missing) == len(shards) and not others:
        return None
    remedy = "run scripts/embed_text.py for this tower, or train with --text-features live"
    if others:
        raise UserError(f"{others[0]} is of another text tower than this run's, {fingerprint[:12]}: {remedy}")
    if missing:
        raise UserError(f"{len(missing)} of {len(shards)} shards lack text features, {missing[0]} for one: {remedy}")
    for shard in shards:
        path = features_path(shard, fingerprint)
        if lacking := set(source_names(source)) - _sources(path, fingerprint):
            raise UserError(f"{path} lacks captions of source {', '.join(sorted(lacking))}: {remedy}")
    return TextFeatures(fingerprint)


def _texts_of(shard: str, sources: set[str]) -> set[str]:
    texts = set()
    try:
        for sample in stream_samples(shard, extensions=("json", "txt")):
            try:
                captions = read_captions(sample)
            except MissingCaption:
                continue  # training leaves this sample out, and counts it
            texts.update(text for source in sources for text in all_captions(captions, source))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shard}: {first_line(error)}") from error
    return texts


def _sources_in(shard: str) -> list[str]:
    """The caption sources of its first sample that has any."""
    for sample in stream_samples(shard, extensions=("json", "txt")):
        with suppress(MissingCaption):
            return sorted(read_captions(sample))
    return []


def _is_there(path: Path | str) -> bool:
    return path.is_file() if isinstance(path, Path) else file_size(path) is not None


def _tables_beside(shard: str) -> list[str]:
    """Names of the features of one shard, by any tower."""
    folder, name = split_shard(shard)
    names = folder_sizes(folder) if is_url(shard) else (path.name for path in Path(folder).glob("*.text-*"))
    return [other for other in names if other.startswith(os.path.splitext(name)[0] + ".text-")]


def _metadata(path: Path | str) -> dict[str, str]:
    if isinstance(path, Path):
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    size = int.from_bytes(read_url(path, 0, 8), "little")  # of the header, in which the metadata is
    return json.loads(read_url(path, 8, 8 + size)).get("__metadata__", {})


def _sources(path: Path | str, fingerprint: str) -> set[str]:
    try:
        metadata = _metadata(path)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged, delete it: {first_line(error)}") from error
    if metadata.get("fingerprint") != fingerprint:
        raise UserError(f"{path} is of another text tower than this one, {fingerprint[:12]}: delete it")
    return set(json.loads(metadata["sources"]))


@lru_cache(OPEN_TABLES)
def _open_table(path: Path | str) -> tuple[np.ndarray, Tensor]:
    try:
        table = load_file(
            local_copy(path) if is_url(path) else path
        )  # maps the file: what is never looked up is never read
        return table["captions"].numpy().view(np.uint64), table["features"]
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} is damaged, delete it: {first_line(error)}") from error


def _hash(caption: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little"))
