"""Checks before the first step: shards, samples, and disk space."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from languagebind.config import UserError, digest
from languagebind.data.shards import ShardInfo, count_samples, expand_shards, indexed, split_shard
from languagebind.modalities import Modality
from languagebind.model import DualEncoder
from languagebind.remote import file_size, is_url

from .batch import DataConfig, Plan
from .worker import ShardBatches, WorkerStream


def check_data(
    config: DataConfig, modality: Modality, world_size: int, accum_freq: int = 1
) -> tuple[dict[str, int | None], int]:
    """Return the shards with their number of samples (None if unknown), and the steps per epoch."""
    if not config.train_data:
        raise UserError("--train-data is required: shards, as a pattern or a folder")
    shards = expand_shards(config.train_data)
    readers = max(1, config.workers) * world_size
    if not config.dataset_resampled and len(shards) < readers:
        raise UserError(
            f"{len(shards)} shards are too few for {max(1, config.workers)} workers x {world_size} ranks = {readers}"
            " readers: make more shards, use fewer --workers, or draw shards with --dataset-resampled"
        )
    index = indexed(shards)
    _check_sizes(index)
    counts = count_samples(index)
    unknown = [shard for shard, count in counts.items() if count is None]
    if unknown and not config.train_num_samples:
        raise UserError(
            f"no index.json or sizes.json counts the samples of {len(unknown)} of {len(counts)} shards, such as"
            f" {unknown[0]}: give --train-num-samples, or write an index with scripts/check_shards.py --write-index"
        )
    num_samples = config.train_num_samples or sum(count or 0 for count in counts.values())
    batch = config.batch_size * accum_freq * world_size
    if num_samples < batch:
        raise UserError(
            f"{num_samples} samples do not fill one batch of"
            f" --batch-size {config.batch_size} x {f'--accum-freq {accum_freq} x ' if accum_freq > 1 else ''}"
            f"{world_size} ranks = {batch}: use a smaller --batch-size"
        )
    _check_samples(counts, modality, config)
    return counts, num_samples // batch


def shards_digest(shards: dict[str, int | None]) -> str:
    """Return a hash of the names and counts of shards, which tells a resumed run that its samples are the same."""
    return digest([[split_shard(name)[1], count] for name, count in shards.items()])


def check_disk(folder: Path, model: DualEncoder, averages: int, checkpoints: int) -> None:
    """Check that so many checkpoints, with so many averages of each trained weight, fit on the disk."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    size = sum(value.nbytes for value in model.encoder_state().values()) + averages * trained
    free = shutil.disk_usage(folder).free
    if free < size * checkpoints:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free, but {checkpoints} checkpoints of {size / 1e9:.3f} GB take"
            f" {size * checkpoints / 1e9:.2f} GB: raise --save-every-n-steps, or set --keep-last"
        )


def _check_sizes(index: dict[str, ShardInfo | None]) -> None:
    """Compare sizes with the index: a tar file cut off between two members reads like a complete one."""
    for shard, info in index.items():
        if info is None or shard.startswith("pipe:"):
            continue
        size = file_size(shard) if is_url(shard) else os.path.getsize(shard)
        if size is not None and size != info.bytes:
            raise UserError(
                f"{shard} has {size} bytes, its index.json says {info.bytes}: it is cut off or was changed;"
                " scripts/check_shards.py tells more"
            )


def _check_samples(shards: dict[str, int | None], modality: Modality, config: DataConfig) -> None:
    """Check that a sample can be used: this tells a wrong folder or option before the workers start."""
    config = replace(config, shuffle_buffer=0, dataset_resampled=False, positives="pair")
    probe = ShardBatches(shards, modality, lambda texts: {}, config, Plan(0, 0, 1, 1, 1))
    next(WorkerStream(probe, epoch=0, worker=0, workers=1, drawn=0).samples)
