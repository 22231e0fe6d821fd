"""Features of the frozen text tower for the captions of shards, kept in a `FeatureStore`."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..config import UserError
from .feature_store import FeaturesMode, FeatureStore, samples_in
from .members import read_captions
from .vidal import MissingCaption, all_captions, source_names

TextFeatures = FeatureStore  # its default kind is text


def features_path(shard: str, fingerprint: str) -> Path | str:
    """Return the path of a text tower's features for a shard, or the URL if the shard is a URL."""
    return TextFeatures(fingerprint).path(shard)


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
    store, sources = TextFeatures(fingerprint), set(source_names(source, negatives))
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


def open_text_features(
    mode: FeaturesMode, shards: Iterable[str], source: str, fingerprint: str, negatives: bool = False
) -> TextFeatures | None:
    """Return the features beside the shards, or None if the tower should encode captions during training.

    For the modes and the errors see `FeatureStore.serves`.
    """
    store = TextFeatures(fingerprint)
    return store if store.serves(mode, shards, source_names(source, negatives)) else None
