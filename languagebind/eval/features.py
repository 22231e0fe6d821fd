"""Features of samples and of texts: in a fixed order, in batches, each rank taking its share.

The order, and so every bit of the result, does not depend on the number of workers. Nothing here draws a random
number, so that an evaluation in the middle of training leaves training as it was.
"""

import hashlib
import logging
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader

from .. import __version__
from ..config import UserError, to_dict
from ..distributed import Precision, autocast, gather_objects, rank, world_size
from ..modalities import Modality, modality_name
from .cache import FeatureCache, decoder_versions, identity, weights_digest
from .data.readers import EvalProtocol, Reader
from .data.samples import Sample
from .inputs import Inputs, collate
from .progress import progress

log = logging.getLogger(__name__)

BAD_SAMPLES_LISTED = 5

# Positions (B,) and features (B, D) of what a batch had that could be read
Part = tuple[list[int], Tensor]


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
    feature_cache: Path | None = None
    """folder to keep features in: a killed run goes on with what is there, a second one encodes nothing"""

    def __post_init__(self):
        if self.batch_size < 1 or self.workers < 0:
            raise UserError("--batch-size should be at least 1, --workers at least 0")
        if self.precision not in get_args(Precision):
            raise UserError(f"evaluation runs in {', '.join(get_args(Precision))}, not {self.precision}")


def encode_samples(
    model,
    reader: Reader,
    samples: Sequence[Sample],
    options: EncodeOptions,
    unit: bool = True,
    cache: FeatureCache | None = None,
) -> tuple[Tensor, list[int]]:
    """Features (M, D), float32, and the positions (M,) of the samples that could be read; the same on all ranks.

    Of a reader with several views that are not averaged, the features are (M, V, D).

    Args:
        model: its `encode` is called; with `unit` off, its `project`.
        reader: how samples are read.
        samples: what to encode.
        options: how.
        unit: give features of unit norm.
        cache: where features are looked for first, and kept. Batches with unreadable samples are not.

    Raises:
        UserError: a sample cannot be read and `skip_bad` is off, or none can, or the model gives NaN or infinity.
    """
    device, views = _device(model, options), reader.views
    size = max(1, options.batch_size // views)
    parts, missing = _stored_parts(samples, size, cache, device)
    loader = DataLoader(
        Inputs(samples, reader, getattr(model, "takes_files", False)),
        batch_sampler=[batch for batch, _ in missing],
        num_workers=options.workers if missing else 0,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or the loader would draw its workers' seed from the global one
    )
    bad: dict[int, str] = {}
    encode = model.encode if unit else _projection(model, "project")
    for (batch, names), loaded in zip(missing, progress(loader, len(loader), "samples"), strict=True):
        positions, inputs, unreadable = loaded
        bad |= unreadable
        if inputs is None:
            continue
        with _encoding(model, device, options):
            found = encode(inputs.flatten(0, 1).to(device, non_blocking=True)).float()  # (B * V, D)
        found = (_unit(found) if unit else found).unflatten(0, (-1, views)).flatten(1)
        parts[batch[0]] = positions, found
        if cache and not unreadable:
            cache.put(names, found)
    if cache:
        cache.flush()
    # Shared before anyone stops, so that every rank stops.
    bad = {i: reason for part in gather_objects(bad) for i, reason in part.items()}
    _check_bad(bad, len(samples), options.skip_bad)
    kept = [i for i in range(len(samples)) if i not in bad]
    features = _gather_rows(parts, kept, len(samples), size, device)
    _check_finite(features, [samples[i].key for i in kept])
    if views > 1:
        features = features.unflatten(1, (views, -1))
        features = F.normalize(features.mean(dim=1), dim=-1) if reader.pooled else features
    if len(features) > 1 and not rank() and bool((features == features[0]).all()):
        log.warning("all %d samples have the same features: the encoder has collapsed", len(features))
    return features, kept


def encode_texts(
    model, texts: Iterable[str], options: EncodeOptions, unit: bool = True, cache: FeatureCache | None = None
) -> tuple[Tensor, list[int]]:
    """Features (U, D), float32, of the distinct texts, and the row of each text in them.

    A text that occurs twice is encoded once: its copies have the very same features, and so the very same scores.
    Other arguments and errors as of `encode_samples`; the model's `encode_text` or `project_text` is called.
    """
    rows: dict[str, int] = {}
    positions = [rows.setdefault(text, len(rows)) for text in texts]
    distinct = list(rows)
    device = _device(model, options)
    encode = model.encode_text if unit else _projection(model, "project_text")
    parts: dict[int, Part] = {}
    batches = _own_batches(len(distinct), options.batch_size)
    for batch in progress(batches, len(batches), "texts"):
        here = distinct[batch[0] : batch[-1] + 1]
        found = cache.get(["text", *here]) if cache else None
        if found is None:
            tokens = model.tokenize(here)
            with _encoding(model, device, options):
                found = encode({key: value.to(device) for key, value in tokens.items()}).float()
            found = _unit(found) if unit else found
            if cache:
                cache.put(["text", *here], found)
        parts[batch[0]] = list(batch), found.to(device)
    if cache:
        cache.flush()
    features = _gather_rows(parts, list(range(len(distinct))), len(distinct), options.batch_size, device)
    _check_finite(features, distinct)
    return features, positions


def build_classifier(
    model,
    names: Sequence[str],
    templates: Sequence[str],
    options: EncodeOptions,
    cache: FeatureCache | None = None,
) -> Tensor:
    """Prompts of each class to one unit-norm vector a class, (K, D): the mean of its unit-norm prompt features."""
    features, rows = encode_texts(model, class_prompts(names, templates), options, cache=cache)
    per_class = features[torch.tensor(rows, device=features.device)].unflatten(0, (len(names), len(templates)))
    return F.normalize(per_class.mean(dim=1), dim=-1)


def class_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template of the first class, then of the second, ..."""
    return [template.replace("{c}", name) for name in names for template in templates]


def open_cache(model, name: str, protocol: EvalProtocol, options: EncodeOptions) -> FeatureCache | None:
    """The cache of all that features of the dataset `name` depend on beside the samples and prompts, the same one on
    all ranks; None where none is asked for. Raises `UserError` as `FeatureCache`."""
    if options.feature_cache is None:
        return None
    modality = protocol.reader.modality
    facts = {
        "dataset": name,
        "weights": weights_digest(model),
        "probe": _probe_features(model, modality, options),
        "text_fingerprint": model.text_fingerprint(),
        "modality": modality_name(modality),
        "inputs": to_dict(modality),
        "precision": options.precision,
        "rules": protocol.describe(),
        "versions": {"languagebind": __version__, "torch": torch.__version__} | decoder_versions(),
    }
    return FeatureCache(options.feature_cache, gather_objects(facts)[0])


def _probe_features(model, modality: Modality, options: EncodeOptions) -> str:
    """SHA-256 of the features of one made-up sample and text: what weights alone do not say of a model, such as its
    activation and its device."""
    device = _device(model, options)
    shape = modality.input_shape
    inputs = torch.linspace(-2, 2, math.prod(shape)).view(1, *shape)
    tokens = model.tokenize(["a photo of 2 dogs, running"])
    with _encoding(model, device, options):
        found = [model.encode(inputs.to(device)), model.encode_text({k: v.to(device) for k, v in tokens.items()})]
    return hashlib.sha256(b"".join(x.float().cpu().numpy().tobytes() for x in found)).hexdigest()


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


def _own_batches(total: int, size: int) -> list[range]:
    """This rank's batches. What shares a batch does not depend on the number of ranks, so neither do the bits."""
    batches = [range(start, min(start + size, total)) for start in range(0, total, size)]
    return batches[rank() :: world_size()]


def _stored_parts(
    samples: Sequence[Sample], size: int, cache: FeatureCache | None, device: torch.device
) -> tuple[dict[int, Part], list[tuple[range, list[Any]]]]:
    """This rank's batches that the cache has, and the others, each with what identifies its samples there."""
    parts: dict[int, Part] = {}
    missing = []
    for batch in _own_batches(len(samples), size):
        # Before anything is read: a file that changes meanwhile must not be found as the new one
        names = [identity(samples[i]) for i in batch] if cache else []
        stored = cache.get(names) if cache else None
        if stored is None:
            missing.append((batch, names))
        else:
            parts[batch[0]] = list(batch), stored.to(device)
    return parts, missing


def _projection(model, name: str):
    """The model's method for features of any norm."""
    if not hasattr(model, name):
        raise UserError("this model gives features of unit norm alone, which its paper's similarity cannot use")
    return getattr(model, name)


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


def _unit(x: Tensor) -> Tensor:
    """Unit norm; NaN, which is an error, where the norm is too large for float32 and would make all numbers zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm.isinf(), torch.nan).clamp_min(1e-12)


def _check_finite(features: Tensor, names: Sequence[str]) -> None:
    rows = (~features.isfinite()).any(dim=1).nonzero()
    if len(rows):
        first = names[int(rows[0])]
        raise UserError(
            f"the model gives NaN or infinity for {len(rows)} of {len(names)} inputs, the first is {first!r}"
        )


def _gather_rows(parts: dict[int, Part], kept: list[int], total: int, size: int, device: torch.device) -> Tensor:
    """What the ranks encoded, in the order of the data.

    Args:
        parts: by the first position of a batch, this rank's features (B, D) and their positions.
        kept: the positions, of `total`, that any rank encoded.
        total: how many positions were shared out.
        size: of a batch.
        device: where to gather.
    """
    world = world_size()
    if world == 1:
        return torch.cat([parts[start][1] for start in sorted(parts)])
    embed_dim = max(gather_objects(max((features.shape[1] for _, features in parts.values()), default=0)))
    slots = -(-total // (size * world))
    # Every rank brings rows for as many batches, zeros where there was nothing, so that the shapes agree.
    rows = torch.zeros(slots, size, embed_dim, device=device)
    for positions, features in parts.values():
        places = torch.tensor(positions, device=device)
        rows[places // (size * world), places % size] = features
    found = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(found, rows)
    return torch.stack(found, dim=1).flatten(0, 2)[torch.tensor(kept, device=device)]  # (slots, world, size) in order
