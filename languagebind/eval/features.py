"""Features of samples and of texts: in a fixed order, in batches, each rank taking its share.

The order, and so every bit of the result, does not depend on the number of workers. Nothing here draws a random
number, so that an evaluation in the middle of training leaves training as it was.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..config import UserError
from ..distributed import Precision, autocast, gather_objects, rank, world_size
from ..modalities import DecodeError, Modality
from .samples import Sample

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30
BAD_SAMPLES_LISTED = 5


@dataclass(frozen=True)
class EncodeOptions:
    """How samples and prompts are encoded."""

    batch_size: int = 64
    """samples, or prompts, at a time on each device"""
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    """processes that read samples; 0 reads in the main one"""
    precision: Precision = "fp32"
    """of the encoders: amp autocasts to float16, amp_bf16 to bfloat16; features are always compared in float32"""
    device: str | None = None
    """where to run, as in torch; default: the first GPU if there is one (in Python: where the model is)"""
    skip_bad: bool = False
    """go on without the samples that cannot be read, and count them in the result"""

    def __post_init__(self):
        if self.batch_size < 1 or self.workers < 0:
            raise UserError("--batch-size should be at least 1, --workers at least 0")
        if self.precision not in get_args(Precision):
            raise UserError(f"evaluation runs in {', '.join(get_args(Precision))}, not {self.precision}")


def encode_samples(
    model, modality: Modality, samples: Sequence[Sample], options: EncodeOptions
) -> tuple[Tensor, list[int]]:
    """Unit-norm features (M, D), float32, and the positions (M,) of the samples that could be read; same on all ranks.

    Raises:
        UserError: a sample cannot be read and `skip_bad` is off, or none can, or the model gives NaN.
    """
    here, world = rank(), world_size()
    loader = DataLoader(
        _Inputs(samples, modality, getattr(model, "takes_files", False)),
        sampler=range(here, len(samples), world),
        batch_size=options.batch_size,
        num_workers=options.workers,
        collate_fn=_collate,
        pin_memory=_device(model, options).type == "cuda",
        generator=torch.Generator(),  # or the loader would draw its workers' seed from the global one
    )
    device = _device(model, options)
    batches, bad = [], {}
    for inputs, unreadable in progress(loader, len(loader), "samples"):
        bad |= unreadable
        if inputs is not None:
            with _encoding(model, device, options):
                batches.append(_unit(model.encode(inputs.to(device, non_blocking=True))))
    # Shared before anyone stops, so that every rank stops.
    bad = {i: reason for part in gather_objects(bad) for i, reason in part.items()}
    _check_bad(bad, len(samples), options.skip_bad)
    kept = [i for i in range(len(samples)) if i not in bad]
    features = _gather_rows(batches, kept, len(samples), device)
    _check_nan(features, [samples[i].key for i in kept])
    return features, kept


def encode_texts(model, texts: Iterable[str], options: EncodeOptions) -> tuple[Tensor, list[int]]:
    """Unit-norm features (U, D), float32, of the distinct texts, and the row of each text in them.

    A text that occurs twice is encoded once: its copies have the very same features, and so the very same scores.
    """
    rows: dict[str, int] = {}
    positions = [rows.setdefault(text, len(rows)) for text in texts]
    here, world = rank(), world_size()
    distinct = list(rows)
    mine = distinct[here::world]
    starts = range(0, len(mine), options.batch_size)
    device = _device(model, options)
    batches = []
    for start in progress(starts, len(starts), "texts"):
        tokens = model.tokenize(mine[start : start + options.batch_size])
        with _encoding(model, device, options):
            batches.append(_unit(model.encode_text({key: value.to(device) for key, value in tokens.items()})))
    features = _gather_rows(batches, list(range(len(distinct))), len(distinct), device)
    _check_nan(features, distinct)
    return features, positions


def progress(items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
    """The items, with a bar on a terminal and a line in the log now and then elsewhere, on the first rank alone."""
    if rank():
        yield from items
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=unit, unit="batch", leave=False)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info("%s: %d of %d batches", unit, done, total)


class Unmoved(list):
    """A batch that is no tensor: it stays where it is when it is moved to a device."""

    def to(self, *_: Any, **__: Any) -> "Unmoved":
        return self


class _Inputs(Dataset):
    """(index, tensor or files), or (index, reason) of a sample that cannot be read: an error is a value here."""

    def __init__(self, samples: Sequence[Sample], modality: Modality, as_files: bool = False):
        self.samples, self.modality, self.as_files = samples, modality, as_files

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        sample = self.samples[index]
        try:
            if self.as_files:
                return index, sample.files(self.modality.input_shape[1])
            with _one_thread():
                return index, self.modality.preprocess(sample.load(self.modality.input_shape[1]))
        except DecodeError as error:
            return index, f"{sample.key}: {error.reason}"


def _collate(items: list[tuple[int, Any]]) -> tuple[Tensor | Unmoved | None, dict[int, str]]:
    inputs = [value for _, value in items if not isinstance(value, str)]
    bad = {index: value for index, value in items if isinstance(value, str)}
    if inputs and not isinstance(inputs[0], Tensor):
        return Unmoved(inputs), bad
    return torch.stack(inputs) if inputs else None, bad  # (B, C, T, H, W)


@contextmanager
def _one_thread():
    """Loader workers have one thread; sums are rounded otherwise with more, and results must not depend on workers."""
    threads = torch.get_num_threads()
    if get_worker_info() is not None or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _encoding(model, device: torch.device, options: EncodeOptions):
    """No gradients, evaluation mode, and the precision asked for; the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        # no_grad, not inference_mode: what a model caches here may be used in training.
        with torch.no_grad(), autocast(device, options.precision):
            yield
    finally:
        model.train(training)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def _device(model, options: EncodeOptions) -> torch.device:
    return model.logit_scale.device if options.device is None else torch.device(options.device)


def _check_bad(bad: dict[int, str], total: int, skip_bad: bool) -> None:
    """Stops, or warns, when samples could not be read: results on fewer samples must not pass for the real ones."""
    if not bad:
        return
    reasons = [bad[i] for i in sorted(bad)]
    listed = "".join(f"\n  {reason}" for reason in reasons[:BAD_SAMPLES_LISTED])
    more = f"\n  ... and {len(bad) - BAD_SAMPLES_LISTED} more" if len(bad) > BAD_SAMPLES_LISTED else ""
    found = f"{len(bad)} of {total} samples cannot be read"
    if not skip_bad or len(bad) == total:
        raise UserError(f"{found} (--skip-bad goes on without bad samples):{listed}{more}")
    log.warning("%s; the result is over the rest:%s%s", found, listed, more)


def _check_nan(features: Tensor, names: Sequence[str]) -> None:
    rows = features.isnan().any(dim=1).nonzero()
    if len(rows):
        first = names[int(rows[0])]
        raise UserError(f"the model gives NaN for {len(rows)} of {len(names)} inputs, the first is {first!r}")


def _gather_rows(batches: list[Tensor], kept: list[int], total: int, device: torch.device) -> Tensor:
    """What the ranks encoded, in the order of the data.

    Args:
        batches: this rank's features of those of positions rank, rank + world, ... that are in `kept`.
        kept: the positions, of `total`, that any rank encoded.
        total: how many positions were shared out.
        device: where to gather.
    """
    here, world = rank(), world_size()
    if world == 1:
        return torch.cat(batches)
    embed_dim = max(gather_objects(batches[0].shape[1] if batches else 0))
    per_rank = -(-total // world)
    # Every rank brings rows for all its positions, zeros where there was nothing, so that the shapes agree.
    rows = torch.zeros(per_rank, embed_dim, device=device)
    if batches:
        places = [i // world for i in kept if i % world == here]
        rows[torch.tensor(places, device=device)] = torch.cat(batches)
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows)
    return torch.stack(parts, dim=1).flatten(0, 1)[torch.tensor(kept, device=device)]  # (per_rank, world) is the order
