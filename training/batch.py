"""Data options, the plan of a rank's steps, and batches."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from languagebind.config import UserError, at_least
from languagebind.data.feature_store import FeaturesMode


@dataclass(frozen=True)
class DataConfig:
    """Training data."""

    train_data: str | None = None
    """training shards: a brace pattern, a glob or a folder, on disk or at a URL (s3://...); join several with `::`"""
    train_num_samples: int | None = None
    """samples per epoch; by default the total of the index beside the shards"""
    batch_size: int = 64
    """samples per step on each rank"""
    workers: int = 1
    """loader processes per rank; 0 loads in the training process"""
    dataset_resampled: bool = False
    """draw shards with replacement instead of reading each once per epoch"""
    caption_source: str = "mix"
    """source of the captions: raw, mplug, polish_mplug, sound_mplug, ofa, another name, or VIDAL's `mix`"""
    text_features: FeaturesMode = "auto"
    """text features: read the files of languagebind embed-text beside the shards (cached), encode the captions of each
    batch (live), or use the files if they exist (auto)"""
    shuffle_buffer: int = 1000
    """size of each worker's shuffle buffer; 0 keeps the order of the shards"""
    positives: Literal["pair", "caption", "id"] = "pair"
    """texts that match a sample: its own caption (pair), or also the captions of samples with the same caption or id.
    `caption` only changes siglip, since a softmax always treats equal captions equally"""
    negatives: int = 0
    """hard negatives per step and sample: texts drawn from `negatives` beside its captions, which match no sample"""
    max_bad_share: float = 0.1
    """share of unusable samples above which training stops"""

    def __post_init__(self):
        at_least(1, batch_size=self.batch_size, train_num_samples=self.train_num_samples)
        at_least(0, workers=self.workers, shuffle_buffer=self.shuffle_buffer, negatives=self.negatives)
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"max_bad_share should be in [0, 1], got {self.max_bad_share}")


@dataclass(frozen=True)
class Plan:
    """The steps of this rank's loader. Each step is one batch; with --accum-freq, one micro-batch."""

    seed: int
    rank: int
    world_size: int
    steps_per_epoch: int
    total_steps: int
    first_step: int = 0
    drawn: dict[int, int] = field(default_factory=dict)  # samples that each worker has drawn in the first step's epoch
    # For each worker, `Batch.lengths` of that epoch so far; None: unknown, so that what was drawn is read again.
    lengths: dict[int, dict[int, int]] | None = None


class Skipped(NamedTuple):
    """A sample that cannot be used."""

    shard: str
    key: str
    reason: str


@dataclass
class Batch:
    """The inputs and texts of one step, with the loader worker's progress."""

    inputs: torch.Tensor  # (B, C, T, H, W)
    # Token ids (U, L) of the distinct texts and each sample's index `caption` (B,); or text `features` (B, D). With
    # --negatives K, also `negatives`: indices (B, K), -1 for none, or features (B, K, D), zeros for none
    text: dict[str, torch.Tensor]
    groups: torch.Tensor | None  # (B,): samples with the same number match; None: each matches only its own caption
    keys: list[str]
    captions: list[str]
    skipped: list[Skipped]  # since the previous batch of the worker
    worker: int
    epoch: int
    drawn: int  # number of samples that the worker has drawn in this epoch
    # Number of samples by part, numbered in the order of reading, for those parts that the worker has read since the
    # previous batch and whose number of samples the index does not say
    lengths: dict[int, int]
    anchor: torch.Tensor | None = None  # the partner's features (B, D) or inputs (B, C, T, H, W), if there is one

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; the DataLoader calls this."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device. The copy from pinned memory is asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors of the batch."""
        return [self.inputs, *self.text.values(), *(x for x in (self.groups, self.anchor) if x is not None)]

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        text = {key: change(value) for key, value in self.text.items()}
        groups, anchor = (None if x is None else change(x) for x in (self.groups, self.anchor))
        return replace(self, inputs=change(self.inputs), text=text, groups=groups, anchor=anchor)
