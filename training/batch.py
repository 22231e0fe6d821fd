"""What training reads, and what it gets: the data options, the plan of a rank's steps, and a batch."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from languagebind.config import UserError, at_least
from languagebind.data.text_features import TextFeaturesMode


@dataclass(frozen=True)
class DataConfig:
    """Training data."""

    train_data: str | None = None
    """shards: a brace pattern, a glob or a folder, on disk or at a URL (s3://...); join several with `::`"""
    train_num_samples: int | None = None
    """samples per epoch; by default the number in the index beside the shards"""
    batch_size: int = 64
    """samples per step on each rank"""
    workers: int = 1
    """loader processes per rank; 0: load in the training process"""
    dataset_resampled: bool = False
    """draw shards with replacement instead of reading each once per epoch"""
    caption_source: str = "mix"
    """raw, mplug, polish_mplug, sound_mplug, ofa, another key of the samples' captions, or `mix` of VIDAL's"""
    text_features: TextFeaturesMode = "auto"
    """`cached`: read the features that scripts/embed_text.py wrote beside the shards; `live`: encode the captions of
    each batch; `auto`: cached if there are any"""
    shuffle_buffer: int = 1000
    """samples in each worker's shuffle buffer; 0: keep the order of the shards"""
    positives: Literal["pair", "caption", "id"] = "pair"
    """which texts match a sample: only its own caption (pair), or also those of samples with the same caption or id.
    `caption` changes only siglip: a softmax gives equal captions equal shares anyway"""
    max_bad_share: float = 0.1
    """stop if more than this share of the samples cannot be used"""

    def __post_init__(self):
        at_least(1, batch_size=self.batch_size, train_num_samples=self.train_num_samples)
        at_least(0, workers=self.workers, shuffle_buffer=self.shuffle_buffer)
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"max_bad_share should be in [0, 1], got {self.max_bad_share}")


@dataclass(frozen=True)
class Plan:
    """The steps that this rank's loader fills. A step is one batch: with --accum-freq, one micro-batch."""

    seed: int
    rank: int
    world_size: int
    steps_per_epoch: int
    total_steps: int
    first_step: int = 0
    drawn: dict[int, int] = field(default_factory=dict)
    """samples that each worker has already drawn in the epoch of `first_step`"""


class Skipped(NamedTuple):
    """A sample that cannot be used."""

    shard: str
    key: str
    reason: str


@dataclass
class Batch:
    """What a loader worker sends to the trainer for one step."""

    inputs: torch.Tensor
    """(B, C, T, H, W)"""
    text: dict[str, torch.Tensor]
    """token ids of the distinct captions, (U, L), and `caption`, (B,), the caption of each sample; or `features` of the
    text tower, (B, D)"""
    groups: torch.Tensor | None
    """(B,): samples with the same number match; None: each matches only itself"""
    keys: list[str]
    skipped: list[Skipped]
    """samples skipped since the worker's previous batch"""
    worker: int
    epoch: int
    drawn: int
    """samples that the worker has drawn in this epoch"""

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; the DataLoader calls this."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; from pinned memory without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors of the batch."""
        return [self.inputs, *self.text.values(), *([] if self.groups is None else [self.groups])]

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        text = {key: change(value) for key, value in self.text.items()}
        groups = None if self.groups is None else change(self.groups)
        return replace(self, inputs=change(self.inputs), text=text, groups=groups)
