"""What can be known before the first step is checked before it, and refused with the arithmetic."""

import os
import random
import shutil
from pathlib import Path

from webdataset.tariterators import tarfile_samples

from languagebind.config import UserError
from languagebind.data.shards import count_samples, expand_shards, indexed
from languagebind.modalities import DecodeError, Modality

from .data import DataConfig, select_input

# Enough to tell a wrong folder from a damaged sample.
PROBED_SAMPLES = 16


def check_data(config: DataConfig, modality: Modality, world_size: int) -> tuple[list[str], int]:
    """The shards and the steps of an epoch.

    Raises:
        UserError: there are no shards, too few of them, too few samples, or none that this modality can read.
    """
    if not config.train_data:
        raise UserError("--train-data is needed: shards, as a pattern or a folder")
    shards = expand_shards(config.train_data)
    readers = max(1, config.workers) * world_size
    if not config.dataset_resampled and len(shards) < readers:
        raise UserError(
            f"{len(shards)} shards are too few for {max(1, config.workers)} workers x {world_size} ranks = {readers}"
            " readers: make more shards, use fewer --workers, or draw them with --dataset-resampled"
        )
    _check_sizes(shards)
    num_samples = config.train_num_samples or _counted(shards)
    batch = config.batch_size * world_size
    if num_samples < batch:
        raise UserError(
            f"{num_samples} samples do not fill one batch of"
            f" --batch-size {config.batch_size} x {world_size} ranks = {batch}"
        )
    _check_sample(shards[0], modality)
    return shards, num_samples // batch


def check_disk(folder: Path, parameters_bytes: int, trainable_bytes: int) -> None:
    """Refuse when not even two checkpoints (the old one stays until the new one is whole) would fit.

    Raises:
        UserError: there is too little space.
    """
    need = 2 * (parameters_bytes + 2 * trainable_bytes)  # weights, and AdamW's two averages of what trains
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"{folder} has {free / 1e9:.2f} GB free; two checkpoints take {need / 1e9:.2f} GB")


def _counted(shards: list[str]) -> int:
    counts = count_samples(shards)
    unknown = [shard for shard, count in counts.items() if count is None]
    if unknown:
        raise UserError(
            f"no index.json (or sizes.json) counts the samples of {len(unknown)} of {len(shards)} shards, the first is"
            f" {unknown[0]}: give --train-num-samples, or write the index with scripts/check_shards.py --write-index"
        )
    return sum(counts[shard] for shard in shards)


def _check_sizes(shards: list[str]) -> None:
    """A tar file cut off between two members reads like a whole one; its size tells."""
    for shard, info in indexed(shards).items():
        if info is not None and os.path.isfile(shard) and os.path.getsize(shard) != info.bytes:
            raise UserError(
                f"{shard} has {os.path.getsize(shard)} bytes, its index.json says {info.bytes}: it is cut off or was"
                " changed; scripts/check_shards.py tells more"
            )


def _check_sample(shard: str, modality: Modality) -> None:
    error, seen = None, 0
    for sample in tarfile_samples(iter([{"url": shard}]), handler=lambda _: False):
        if seen == PROBED_SAMPLES:
            break
        seen += 1
        try:
            modality.preprocess(select_input(sample, modality, random.Random(0), None))
            return
        except DecodeError as reason:
            error = reason
    raise UserError(f"none of the first {seen} samples of {shard} can be used as {type(modality).__name__}: {error}")
