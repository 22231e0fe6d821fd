"""Check shards, samples and disk space before the first step."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from languagebind.config import UserError, digest
from languagebind.data.shards import count_samples, expand_shards, indexed, split_shard
from languagebind.data.vidal import NEGATIVES
from languagebind.modalities import Modality
from languagebind.model import DualEncoder
from languagebind.remote import file_sizes

from .batch import DataConfig, Plan
from .worker import ShardBatches, WorkerStream

log = logging.getLogger(__name__)


def check_data(
    config: DataConfig, modality: Modality, world_size: int, accum_freq: int = 1
) -> tuple[dict[str, int | None], int]:
    """Return the number of samples per shard (None if unknown), and the steps per epoch."""
    if not config.train_data:
        raise UserError("--train-data is required: pass a pattern or a folder of shards")
    shards = expand_shards(config.train_data)
    readers = max(1, config.workers) * world_size
    if not config.dataset_resampled and len(shards) < readers:
        needed = f"{max(1, config.workers)} workers x {world_size} ranks = {readers} readers"
        advice = "make more shards, use fewer --workers, or draw shards with --dataset-resampled"
        raise UserError(f"{len(shards)} shards are too few for {needed}: {advice}")
    index = indexed(shards)
    expected = {shard: info.bytes for shard, info in index.items() if info and not shard.startswith("pipe:")}
    for (shard, size), found in zip(expected.items(), file_sizes(expected), strict=True):
        if found not in (None, size):  # a tar file truncated between members looks complete
            advice = "check it with languagebind check-shards"
            raise UserError(f"{shard} has {found} bytes, but its index.json says {size}: {advice}")
    named = [extension for extension in modality.extensions if "." in extension]  # of this modality alone
    held = sorted({name for info in index.values() if info for name in info.members} - {"json"})
    if held and named and not set(named) & set(held):
        log.warning("no member is named %s, only %s: is --modality right?", " or ".join(named), ", ".join(held))
    sources = {name for info in index.values() if info for name in info.caption_sources}
    if config.negatives and sources and NEGATIVES not in sources:
        raise UserError(f"--negatives: no sample has {NEGATIVES!r} among its captions; pack them, too")
    counts = count_samples(index)
    unknown = [shard for shard, count in counts.items() if count is None]
    if unknown and not config.train_num_samples:
        lacking = f"the number of samples of {len(unknown)} of {len(counts)} shards, such as {unknown[0]}"
        advice = "pass --train-num-samples, or write an index with languagebind check-shards --write-index"
        raise UserError(f"index.json and sizes.json lack {lacking}: {advice}")
    num_samples = config.train_num_samples or sum(count or 0 for count in counts.values())
    batch = config.batch_size * accum_freq * world_size
    if num_samples < batch:
        product = f"{config.batch_size} x {f'--accum-freq {accum_freq} x ' if accum_freq > 1 else ''}{world_size} ranks"
        advice = f"--batch-size {product} = {batch}: use a smaller --batch-size"
        raise UserError(f"{num_samples} samples do not fill one batch of {advice}")
    _check_samples(counts, modality, config)
    return counts, num_samples // batch


def shards_digest(shards: dict[str, int | None]) -> str:
    """Return a hash of the names and sample counts of shards. A resumed run compares it with the checkpoint's."""
    return digest([[split_shard(name)[1], count] for name, count in shards.items()])


def checkpoint_size(model: DualEncoder, averages: int) -> int:
    """Return the bytes of a model's checkpoint, with `averages` values per trained weight."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return sum(value.nbytes for value in model.encoder_state().values()) + averages * trained


def check_disk(folder: Path, size: int, checkpoints: int) -> None:
    """Check that the disk has space for `checkpoints` checkpoints of `size` bytes."""
    free = shutil.disk_usage(folder).free
    if free < size * checkpoints:
        needed = f"{checkpoints} checkpoints of {size / 1e9:.3f} GB need {size * checkpoints / 1e9:.2f} GB"
        advice = "increase --save-every-n-steps or pass --keep-last"
        raise UserError(f"{folder} has {free / 1e9:.2f} GB free, but {needed}: {advice}")


def _check_samples(shards: dict[str, int | None], modality: Modality, config: DataConfig) -> None:
    """Check that a sample can be used, to report a wrong folder or option before the workers start."""
    config = replace(config, shuffle_buffer=0, dataset_resampled=False, positives="pair")
    probe = ShardBatches(shards, modality, lambda texts: {}, config, Plan(0, 0, 1, 1, 1))
    sample = next(WorkerStream(probe, epoch=0, worker=0, workers=1, resumed=False).samples)
    if config.negatives and not any(sample.texts[1:]):
        log.warning("--negatives: the first sample, %s, has none; are they packed?", sample.key)
