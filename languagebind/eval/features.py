"""Encode samples and texts in a fixed order, in batches that are distributed over the ranks.

The order does not depend on the number of workers, so neither does any bit of the result. Nothing here draws a random
number, so an evaluation during training does not change the training.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from .. import __version__
from ..config import UserError, at_least
from ..dense import score_maps
from ..distributed import Precision, autocast, gather_objects, rank, world_size
from ..modalities import DecodeError
from ..temporal import PairHead
from ..text import Tokenizer
from .cache import FeatureCache, identity
from .data.datasets import DatasetConfig
from .data.readers import EvalProtocol, Reader
from .data.samples import Sample, class_names
from .score.retrieval import RERANKED
from .score.segmentation import read_mask

log = logging.getLogger(__name__)

BAD_SAMPLES_LISTED = 5
SECONDS_BETWEEN_LINES = 30


@dataclass(frozen=True)
class EncodeOptions:
    """How samples and prompts are encoded."""

    batch_size: int = 64
    """samples or prompts per batch, on each device"""
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    """number of processes that read samples; 0: read in the main process"""
    precision: Precision = "fp32"
    """precision of the encoders; amp: float16 autocast, amp_bf16: bfloat16 autocast; scores are always float32"""
    device: str | None = None
    """PyTorch device to use; None: the first GPU, or else the CPU; in Python: the model's device"""
    skip_bad: bool = False
    """skip samples that cannot be read, and count them in the result"""
    feature_cache: Path | None = None
    """folder that caches features: a killed run resumes from the cache, and a repeated run encodes nothing"""

    def __post_init__(self):
        at_least(1, batch_size=self.batch_size)
        at_least(0, workers=self.workers)
        if self.precision not in get_args(Precision):
            raise UserError(f"precision should be one of {', '.join(get_args(Precision))}, not {self.precision}")


class FeatureEncoder:
    """A model that encodes samples and texts by the rules of a protocol.

    If the protocol compares unnormalised features, `project` and `project_text` of the model are called in place of
    `encode` and `encode_text`. The model is a `languagebind.eval.models.Model`; its train or eval mode is restored
    after each batch. The name of the cache folder starts with `name`, that of the dataset.
    """

    def __init__(self, model: Any, protocol: EvalProtocol, options: EncodeOptions, name: str = ""):
        self.model, self.protocol, self.options = model, protocol, options
        self.device = model.logit_scale.device if options.device is None else torch.device(options.device)
        head = getattr(model, "temporal_head", None)
        self.pairs = head if isinstance(head, PairHead) else None  # its features have any norm: of frames, and of texts
        tokenizer = getattr(getattr(model, "text_model", None), "tokenizer", None)
        self.tokenizer: Any = tokenizer if isinstance(tokenizer, Tokenizer) else None  # None: another library's
        folder = options.feature_cache
        self.cache = FeatureCache(Path(folder) / name, model, protocol, options.precision) if folder else None

    def encode_samples(self, samples: Sequence[Sample]) -> tuple[Tensor, list[int]]:
        """Return float32 features (M, D) and the positions (M,) of the readable samples, the same on all ranks.

        If the reader returns several views and does not average them, the features are (M, V, D). Batches with
        unreadable samples are not cached. Raises `UserError` if a sample cannot be read and `skip_bad` is off, no
        sample can be read, or a feature is not finite.
        """
        reader, views = self.protocol.reader, self.protocol.reader.views
        batches = _own_batches(len(samples), max(1, self.options.batch_size // views))
        parts: dict[int, Tensor] = {}
        names: dict[range, list[Any]] = {}
        if self.cache:
            # Before any file is read: a file that changes meanwhile must not be stored under its new identity
            names = {batch: [identity(samples[i]) for i in batch] for batch in batches}
            parts = {batch[0]: x for batch in batches if (x := self.cache.get(names[batch])) is not None}
        missing = [batch for batch in batches if batch[0] not in parts]
        loader = DataLoader(
            _Batches(samples, reader, getattr(self.model, "takes_files", False)),
            batch_size=None,  # each item of the data is a batch
            sampler=missing,
            num_workers=self.options.workers if missing else 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # so that the workers' seed does not come from the global generator
        )
        bad: dict[int, str] = {}
        encode = self.model.encode if self.protocol.unit else self.model.project
        encode = encode if self.pairs is None else self.model.project_frames
        for batch, (inputs, unreadable) in zip(missing, _progress(loader, "samples"), strict=True):
            bad |= unreadable
            if len(unreadable) == len(batch):
                continue
            features = self._run(encode, inputs).unflatten(0, (-1, views)).flatten(1)  # (B, V * D)
            parts[batch[0]] = features
            if self.cache and not unreadable:
                self.cache.put(names[batch], features)
        # Gathered before any rank stops, so that every rank stops
        bad = {i: reason for part in gather_objects(bad) for i, reason in part.items()}
        _check_bad(bad, len(samples), self.options.skip_bad)
        kept = [i for i in range(len(samples)) if i not in bad]
        features = self._gather(parts, [samples[i].key for i in kept])
        if len(features) > 1 and not rank() and bool((features == features[0]).all()):
            log.warning("all %d samples have the same features: the encoder has collapsed", len(features))
        if views == 1:
            return features, kept
        features = features.unflatten(1, (views, -1))
        return F.normalize(features.mean(dim=1), dim=-1) if reader.pooled else features, kept

    def encode_texts(self, texts: Iterable[str]) -> tuple[Tensor, list[int]]:
        """Return float32 features (U, D) of the distinct texts, and the row of each text in the features.

        A repeated text is encoded once, so that its copies have exactly the same features and scores. Raises
        `UserError` if the model returns NaN or infinity.
        """
        rows: dict[str, int] = {}
        positions = [rows.setdefault(text, len(rows)) for text in texts]
        distinct = list(rows)
        raw, words = not self.protocol.unit or self.pairs, self.protocol.words
        if not rank() and self.tokenizer and (cut := self.tokenizer.count_cut(distinct, words)):
            log.warning("%d of %d texts have more tokens than are read, and are cut", cut, len(distinct))
        encode = self.model.project_text if raw else self.model.encode_text
        parts: dict[int, Tensor] = {}
        for batch in _progress(_own_batches(len(distinct), self.options.batch_size), "texts"):
            here = distinct[batch[0] : batch[-1] + 1]
            found = self.cache.get(["text", *here]) if self.cache else None
            if found is None:
                tokens = self.model.tokenize(here) if words is None else self.tokenizer(here, words)
                found = self._run(encode, tokens)
                if self.cache:
                    self.cache.put(["text", *here], found)
            parts[batch[0]] = found
        return self._gather(parts, distinct), positions

    def build_classifier(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return one unit-norm vector per class (K, D): the mean of the unit-norm features of the class's prompts."""
        features, rows = self.encode_texts(class_prompts(names, templates))
        per_class = features[torch.tensor(rows, device=features.device)].unflatten(0, (len(names), len(templates)))
        return F.normalize(per_class.mean(dim=1), dim=-1)

    def map_samples(
        self, samples: Sequence[Sample], dataset: DatasetConfig, head: Callable[[Tensor], Tensor],
        measure: Callable[[Tensor, Tensor], Tensor], shape: Sequence[int] = (),
    ) -> tuple[Tensor, list[int]]:  # fmt: skip
        """Return what `measure` finds in the map (K, H, W) and the mask of each picture, and the pictures' positions.

        `head` maps features (..., D) to scores (..., K). For `shape` see `score_maps`; for errors, `encode_samples`.
        """
        modality, found = self.protocol.reader.modality, dict[int, Any]()
        if not hasattr(self.model, "encode_dense") or modality.input_shape[1] > 1:
            raise UserError("segmentation is of pictures, by models with `encode_dense`")

        def score(windows: Tensor) -> Tensor:
            x = self._run(self.model.encode_dense, windows)
            if not bool(x.isfinite().all()):
                raise UserError(f"the model returns NaN or infinity for {samples[i].key}")
            return head(x)

        for (i,) in _progress(_own_batches(len(samples), 1), "samples"):
            try:
                raw = modality.load(samples[i].load(1))
                mask = read_mask(samples[i].masks[0], raw.shape[-2:], len(class_names(dataset)), dataset.void)
                found[i] = measure(score_maps(score, modality, raw, shape=shape)[0], mask)
            except (DecodeError, OSError) as error:  # of the sample, or of its mask
                found[i] = f"{samples[i].key}: {getattr(error, 'reason', error)}"
            except UserError as error:  # raised below, on every rank
                found[i] = error
                break
        found = {i: x for part in gather_objects(found) for i, x in part.items()}
        if wrong := [x for x in found.values() if isinstance(x, UserError)]:
            raise wrong[0]
        _check_bad({i: x for i, x in found.items() if isinstance(x, str)}, len(samples), self.options.skip_bad)
        kept = [i for i in sorted(found) if isinstance(found[i], Tensor)]
        return torch.stack([found[i] for i in kept]), kept

    def describe(self) -> dict[str, Any]:
        """Return the settings of the encoder that a result's protocol records."""
        return {
            "precision": self.options.precision,
            "batch_size": self.options.batch_size,
            "text_fingerprint": self.model.text_fingerprint(),
            "versions": {"languagebind": __version__, "torch": torch.__version__},
            **({"reranked": RERANKED} if self.pairs else {}),
        }

    def _run(self, encode: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        """Return the float32 features (B, D) of a batch, encoded in eval mode and without gradients."""
        training = self.model.training
        self.model.eval()
        try:
            # no_grad, not inference_mode: tensors that a model caches here may be used in training
            with torch.no_grad(), autocast(self.device, self.options.precision):
                x = encode(_to(inputs, self.device)).float()
        finally:
            self.model.train(training)
        if not self.protocol.unit or self.pairs:
            return x
        # A norm that overflows float32 gives NaN, which is reported as an error, and not silent zeros
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / norm.masked_fill(norm.isinf(), torch.nan).clamp_min(1e-12)

    def _gather(self, own: dict[int, Tensor], names: Sequence[str]) -> Tensor:
        """Return the features (N, D) of all ranks, from each batch's features by first row. `names` name the inputs."""
        shared = gather_objects({start: x.cpu() for start, x in own.items()}) if world_size() > 1 else [own]
        parts = {start: x for part in shared for start, x in part.items()}
        features = torch.cat([parts[start].to(self.device) for start in sorted(parts)])
        wrong = (~features.isfinite()).any(dim=1).nonzero()
        if len(wrong):
            count, first = f"{len(wrong)} of {len(names)} inputs", names[int(wrong[0])]
            raise UserError(f"the model returns NaN or infinity for {count}, first for {first!r}")
        return features


def class_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return the prompts: every template filled in with the first class, then with the second class, ..."""
    return [template.replace("{c}", name) for name in names for template in templates]


class _Batches(Dataset):
    """Reads batches: the inputs (B * V, C, T, H, W), or B files, and why each unreadable sample failed, as text."""

    def __init__(self, samples: Sequence[Sample], reader: Reader, as_files: bool):
        self.samples, self.reader, self.as_files = samples, reader, as_files

    def __getitem__(self, batch: range) -> tuple[Tensor | list[Any], dict[int, str]]:
        inputs: list[Any] = []
        unreadable: dict[int, str] = {}
        for index in batch:
            sample = self.samples[index]
            try:
                source = sample.load(self.reader.modality.input_shape[1])
                with _one_thread():
                    inputs.append(source if self.as_files else self.reader.read(source))
            except DecodeError as error:
                unreadable[index] = f"{sample.key}: {error.reason}"
        return torch.cat(inputs) if inputs and not self.as_files else inputs, unreadable


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, as loader workers do, because the number of threads changes how sums are rounded."""
    threads = torch.get_num_threads()
    if get_worker_info() is None:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _progress(batches: Any, unit: str) -> Iterable[Any]:
    """Iterate with a progress bar on a terminal, or else a line now and then. Only the first rank prints."""
    terminal = sys.stderr.isatty()
    seconds = 0.1 if terminal else SECONDS_BETWEEN_LINES
    line = None if terminal else "{desc}: {n_fmt} of {total_fmt} batches, about {remaining} left\n"
    return tqdm(
        batches, unit, unit="batch", leave=False, disable=rank() > 0, mininterval=seconds, miniters=1, delay=seconds,
        bar_format=line,
    )  # fmt: skip


def _to(value: Any, device: torch.device) -> Any:
    """Return a value with its tensors moved to a device; files and texts stay as they are."""
    if isinstance(value, Mapping):
        return {key: _to(each, device) for key, each in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _own_batches(total: int, size: int) -> list[range]:
    """Return this rank's batches. A batch's contents, and so its bits, do not depend on the number of ranks."""
    batches = [range(start, min(start + size, total)) for start in range(0, total, size)]
    return batches[rank() :: world_size()]


def _check_bad(bad: dict[int, str], total: int, skip_bad: bool) -> None:
    """Raise or, with `skip_bad`, warn if samples are unreadable. A result must not leave samples out silently."""
    if not bad:
        return
    reasons = [bad[i] for i in sorted(bad)][:BAD_SAMPLES_LISTED]
    more = [f"... and {len(bad) - BAD_SAMPLES_LISTED} more"] if len(bad) > BAD_SAMPLES_LISTED else []
    found, listed = f"{len(bad)} of {total} samples cannot be read", "\n  ".join(["", *reasons, *more])
    if not skip_bad or len(bad) == total:
        advice = " (--skip-bad continues without them)" if len(bad) < total else ""
        raise UserError(f"{found}{advice}:{listed}")
    log.warning("%s; the result leaves them out:%s", found, listed)
