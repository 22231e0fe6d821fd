"""What can be known before the first step is checked before it, and refused with the arithmetic."""

import os
import random
import shutil
from itertools import islice
from pathlib import Path

from torch import nn

from languagebind.config import UserError, digest, first_line
from languagebind.data.members import read_captions, stream_samples
from languagebind.data.shards import ShardInfo, count_samples, expand_shards, indexed, split_shard
from languagebind.data.vidal import MissingCaption, choose_caption
from languagebind.modalities import DecodeError, Modality
from languagebind.remote import file_size, is_url

from .stream import DataConfig, select_input

# Enough to tell a wrong folder from a damaged sample.
PROBED_SAMPLES = 16


def check_data(
    config: DataConfig, modality: Modality, world_size: int, accum_freq: int = 1
) -> tuple[dict[str, int | None], int]:
    """The shards, with the number of samples in each where it is known, and the steps of an epoch.

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
    index = indexed(shards)
    _check_sizes(index)
    counts = count_samples(index)
    num_samples = config.train_num_samples or _total(counts)
    batch = config.batch_size * accum_freq * world_size
    if num_samples < batch:
        raise UserError(
            f"{num_samples} samples do not fill one batch of"
            f" --batch-size {config.batch_size} x {f'--accum-freq {accum_freq} x ' if accum_freq > 1 else ''}"
            f"{world_size} ranks = {batch}: use a smaller --batch-size"
        )
    _check_samples(shards, modality, config.caption_source)
    return counts, num_samples // batch


def shards_digest(shards: dict[str, int | None]) -> str:
    """What names the samples: a run that goes on with other shards under the same path does not go on exactly."""
    return digest([[split_shard(name)[1], count] for name, count in shards.items()])


def check_disk(folder: Path, model: nn.Module, averages: int, checkpoints: int) -> None:
    """Refuse when the run's checkpoints would not fit.

    Args:
        averages: numbers kept beside each weight that trains.
        checkpoints: how many there will be at once, beside those that are there.

    Raises:
        UserError: there is too little space.
    """
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    size = sum(value.nbytes for value in model.encoder_state().values()) + averages * trained
    free = shutil.disk_usage(folder).free
    if free < size * checkpoints:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free, but {checkpoints} checkpoints of {size / 1e9:.3f} GB take"
            f" {size * checkpoints / 1e9:.2f} GB: raise --save-every-n-steps"
        )


def _total(counts: dict[str, int | None]) -> int:
    unknown = [shard for shard, count in counts.items() if count is None]
    if unknown:
        raise UserError(
            f"no index.json (or sizes.json) counts the samples of {len(unknown)} of {len(counts)} shards, the first is"
            f" {unknown[0]}: give --train-num-samples, or write the index with scripts/check_shards.py --write-index"
        )
    return sum(counts.values())


def _check_sizes(index: dict[str, ShardInfo | None]) -> None:
    """A tar file cut off between two members reads like a whole one; its size tells."""
    for shard, info in index.items():
        size = None if info is None else _size(shard)
        if size is not None and size != info.bytes:
            raise UserError(
                f"{shard} has {size} bytes, its index.json says {info.bytes}: it is cut off or was"
                " changed; scripts/check_shards.py tells more"
            )


def _size(shard: str) -> int | None:
    """Bytes; None of what only streams (`pipe:`)."""
    if is_url(shard):
        return file_size(shard)
    return os.path.getsize(shard) if os.path.isfile(shard) else None


def _check_samples(shards: list[str], modality: Modality, caption_source: str) -> None:
    """One of the first samples must be usable: a wrong folder or option should not be found by the workers."""
    faults, rng = [], random.Random(0)

    def note(error: Exception) -> bool:
        faults.append(first_line(error))
        return True

    samples = (sample for shard in shards for sample in stream_samples(shard, note))
    for sample in islice(samples, PROBED_SAMPLES):
        try:
            choose_caption(read_captions(sample), caption_source, rng)
            modality.preprocess(select_input(sample, modality, rng, None))
            return
        except (DecodeError, MissingCaption) as error:
            faults.append(first_line(error))
    found = f"none of the first samples can be used: {faults[0]}" if faults else "there is no sample in them"
    raise UserError(f"{', '.join(shards[:3])}{', ...' if len(shards) > 3 else ''}: {found}")
