"""What one loader worker makes of its shards: samples in their order, prepared, and put into batches."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, groupby, islice
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from languagebind.config import UserError, at_least, first_line
from languagebind.data.members import media_members, read_captions, stream_samples
from languagebind.data.text_features import TextFeaturesMode
from languagebind.data.vidal import MissingCaption, choose_caption
from languagebind.modalities import DecodeError, Modality

# A worker whose first so many samples are all bad gives up; fewer bad ones are weighed over all ranks.
HOPELESS = 100


class Skipped(NamedTuple):
    """A sample that was left out."""

    shard: str
    key: str
    reason: str


class Prepared(NamedTuple):
    """A sample as it goes into a batch."""

    key: str
    inputs: torch.Tensor
    """(C, T, H, W)"""
    caption: str
    feature: torch.Tensor | None
    """(D,) of the caption, where it was encoded before"""
    group: int | None


@dataclass
class Batch:
    """What a worker sends to the trainer for one step."""

    inputs: torch.Tensor
    """(B, C, T, H, W)"""
    text: dict[str, torch.Tensor]
    """token ids of the captions that differ, (U, L), and `caption`, (B,), which of them each sample has; or `features`
    of the text tower, (B, D)"""
    groups: torch.Tensor | None
    """(B,): samples of one number match one another; None: each matches itself"""
    keys: list[str]
    skipped: list[Skipped]
    """left out since the worker's batch before"""
    worker: int
    epoch: int
    drawn: int
    """samples the worker has drawn in this epoch"""

    def pin_memory(self) -> "Batch":
        return self._each(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """On a device; from pinned memory without waiting for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> list[torch.Tensor]:
        """All there are."""
        return [self.inputs, *self.text.values(), *([] if self.groups is None else [self.groups])]

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        text = {key: change(value) for key, value in self.text.items()}
        groups = None if self.groups is None else change(self.groups)
        return replace(self, inputs=change(self.inputs), text=text, groups=groups)


class WorkerStream:
    """What one worker draws in one epoch."""

    def __init__(self, dataset: "ShardBatches", epoch: int, worker: int, workers: int, drawn: int):
        self.modality, self.tokenizer, self.features = dataset.modality, dataset.tokenizer, dataset.features
        self.config, self.plan, self.shards = dataset.config, dataset.plan, dataset.shards
        self.epoch, self.worker, self.workers = epoch, worker, workers
        self.drawn = self.resumed_at = drawn
        self.used, self.reasons, self.skipped = 0, Counter(), []
        self.samples = self._usable(islice(self._draw(), drawn, None))

    def next_batch(self) -> Batch:
        samples = list(islice(self.samples, self.config.batch_size))
        skipped, self.skipped = self.skipped, []
        if self.features is None:
            number = {caption: i for i, caption in enumerate(dict.fromkeys(x.caption for x in samples))}
            text = self.tokenizer(list(number)) | {"caption": torch.tensor([number[x.caption] for x in samples])}
        else:
            text = {"features": torch.stack([x.feature for x in samples])}
        return Batch(
            inputs=torch.stack([x.inputs for x in samples]),
            text=text,
            groups=None if self.config.positives == "pair" else torch.tensor([x.group for x in samples]),
            keys=[x.key for x in samples],
            skipped=skipped,
            worker=self.worker,
            epoch=self.epoch,
            drawn=self.drawn,
        )

    def _usable(self, draws: Iterator[dict | Skipped]) -> Iterator[Prepared]:
        for sample in draws:
            self.drawn += 1
            outcome = sample if isinstance(sample, Skipped) else self._prepare(sample)
            if not isinstance(outcome, Skipped):
                self.used += 1
                yield outcome
                continue
            self.skipped.append(outcome)
            self.reasons[outcome.reason] += 1
            if not self.used and self.reasons.total() >= HOPELESS:
                self._fail(f"not one of the first {HOPELESS} samples can be used")

    def _prepare(self, sample: dict) -> Prepared | Skipped:
        key, shard = sample["__key__"], sample["__url__"]
        # Seeded by the sample, not by the worker: what is drawn for it does not depend on how many workers there are.
        rng = random.Random(f"{self.plan.seed} {self.epoch} {sample['__lap__']} {key}")
        try:
            caption, frame = choose_caption(read_captions(sample), self.config.caption_source, rng)
            source = select_input(sample, self.modality, rng, frame)
            x = self.modality.preprocess(source, torch.Generator().manual_seed(rng.getrandbits(63)))
            feature = None if self.features is None else self.features.find(shard, caption)
        except (DecodeError, MissingCaption) as error:
            return Skipped(shard, key, getattr(error, "reason", str(error)))
        except UserError:
            raise
        except Exception as error:  # a fault of the code, not of the data: it must not pass for a bad sample
            error.add_note(f"while reading sample {key} of {shard}")
            raise
        return Prepared(key, x, caption, feature, self._group(sample, caption))

    def _group(self, sample: dict, caption: str) -> int | None:
        if self.config.positives == "pair":
            return None
        return _number(caption if self.config.positives == "caption" else _sample_id(sample))

    def _draw(self) -> Iterator[dict | Skipped]:
        drawn = 0
        for lap in count():
            used, first = self.used, drawn
            rng = random.Random(f"{self.plan.seed} {self.epoch} {self.plan.rank} {self.worker} {lap}")
            for sample in _shuffled(self._read(lap, rng), self.config.shuffle_buffer, rng):
                drawn += 1
                yield sample
            # A lap that a resumed run passed over, or a part of one, says nothing.
            if self.used == used and first >= self.resumed_at:
                self._fail("not one usable sample")

    def _read(self, lap: int, rng: random.Random) -> Iterator[dict | Skipped]:
        for shard, first, last in self._parts_of_lap(lap, rng):
            errors: list[Exception] = []

            def note(error: Exception, errors=errors) -> bool:
                errors.append(error)
                return True  # go on with what can be read

            samples, read = stream_samples(shard, note, {*self.modality.extensions, "json", "txt"}), first
            for sample in islice(samples, first, last):
                read += 1
                yield {**sample, "__lap__": lap}
            if errors:  # one fault is reported by several of webdataset's layers
                lost = 1 if last is None else max(1, last - read)
                yield from [Skipped(shard, "", f"broken shard: {first_line(errors[0])}")] * lost

    def _parts_of_lap(self, lap: int, rng: random.Random) -> Iterator[tuple[str, int, int | None]]:
        """(shard, first sample, end) of what this worker reads."""
        if self.config.dataset_resampled:
            while True:
                yield rng.choice(list(self.shards)), 0, None
        order = list(self.shards)
        random.Random(f"{self.plan.seed} {self.epoch}").shuffle(order)  # the same on every rank
        own = self._fair_parts(order) if None not in self.shards.values() else self._whole_shards(order)
        if lap:
            rng.shuffle(own)
        yield from own

    def _fair_parts(self, order: list[str]) -> list[tuple[str, int, int | None]]:
        """The samples of all shards, one after another, cut where each worker's batches of the epoch begin and end."""
        plan, steps = (
            self.plan,
            range(self.epoch * self.plan.steps_per_epoch, (self.epoch + 1) * self.plan.steps_per_epoch),
        )
        batches = [len([step for step in steps if step % self.workers == worker]) for worker in range(self.workers)]
        before = plan.rank * len(steps) + sum(batches[: self.worker])
        total = sum(self.shards.values())
        begin, end = (total * at // (plan.world_size * len(steps)) for at in (before, before + batches[self.worker]))
        parts, offset = [], 0
        for shard in order:
            first, last = max(begin - offset, 0), min(end - offset, self.shards[shard])
            if first < last:
                parts.append((shard, first, last))
            offset += self.shards[shard]
        return parts

    def _whole_shards(self, order: list[str]) -> list[tuple[str, int, int | None]]:
        """Where nobody counted the samples, each worker has shards of its own."""
        own = order[self.plan.rank * self.workers + self.worker :: self.plan.world_size * self.workers]
        return [(shard, 0, None) for shard in own]

    def _fail(self, what: str) -> None:
        reasons = "; ".join(f"{number} x {reason}" for reason, number in self.reasons.most_common(5))
        names = ", ".join(f"<key>.{extension}" for extension in self.modality.extensions)
        raise UserError(f"{what}, in {len(self.shards)} shards. {reasons or f'No member is named {names}'}")


def select_input(sample: dict[str, Any], modality: Modality, rng: random.Random, frame: int | None) -> Any:
    """The member of a sample that holds the modality, or the frames where they are members of their own.

    Args:
        frame: the frame that the caption describes; without one, `rng` draws among those there are.

    Raises:
        DecodeError: there is none.
    """
    members = media_members((name for name in sample if not name.startswith("__")), modality.extensions)
    if members is None:
        raise DecodeError(sample["__key__"], f"no member is named {' or '.join(modality.extensions)}")
    if isinstance(members, str):
        return sample[members]
    if modality.input_shape[1] > 1:
        return [sample[name] for name in members.values()]
    return sample[members[frame] if frame in members else members[rng.choice(list(members))]]


def _sample_id(sample: dict[str, Any]) -> str:
    """The id in a sample's `.json`, or its key."""
    record = json.loads(sample["json"]) if "json" in sample else {}
    return str(record.get("id", sample["__key__"])) if isinstance(record, dict) else sample["__key__"]


def _number(text: str) -> int:
    """The same 64 bits for the same text, on every rank."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _shuffled(samples: Iterator, size: int, rng: random.Random) -> Iterator:
    """Each sample changes places with one drawn from the `size` that wait."""
    waiting: list = []
    for sample in samples:
        if len(waiting) < size:
            waiting.append(sample)
            continue
        if size:
            place = rng.randrange(size)
            waiting[place], sample = sample, waiting[place]
        yield sample
    rng.shuffle(waiting)
    yield from waiting


@dataclass(frozen=True)
class DataConfig:
    """Training data."""

    train_data: str | None = None
    """shards: a brace pattern, a glob or a folder, on the disk or a URL (s3://...); several joined by `::`"""
    train_num_samples: int | None = None
    """samples of an epoch; by default those in the index beside the shards"""
    batch_size: int = 64
    """samples a step on each rank"""
    workers: int = 1
    """processes that decode, on each rank; 0: the training process itself"""
    dataset_resampled: bool = False
    """draw shards with replacement, in place of passing through all of them"""
    caption_source: str = "mix"
    """raw, mplug, polish_mplug, sound_mplug, ofa, another key of the samples' captions, or `mix` of VIDAL's"""
    text_features: TextFeaturesMode = "auto"
    """`cached`: those that scripts/embed_text.py wrote beside the shards; `live`: the tower encodes the captions of
    each batch; `auto`: cached where they are"""
    shuffle_buffer: int = 1000
    """samples that wait in each worker to be drawn at random; 0: the order of the shards"""
    positives: Literal["pair", "caption", "id"] = "pair"
    """what matches in the loss: a sample and its own caption, or also others of the same caption (which changes siglip
    alone: a softmax gives equal captions equal shares anyway), or of the same id"""
    max_bad_share: float = 0.1
    """stop when more than this share of the samples cannot be used"""

    def __post_init__(self):
        at_least(1, batch_size=self.batch_size, train_num_samples=self.train_num_samples)
        at_least(0, workers=self.workers, shuffle_buffer=self.shuffle_buffer)
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"max_bad_share is a share in [0, 1], got {self.max_bad_share}")


@dataclass(frozen=True)
class Plan:
    """Which part of which steps this rank's loader is to fill. A step is one batch: micro-batches count singly."""

    seed: int
    rank: int
    world_size: int
    steps_per_epoch: int
    total_steps: int
    first_step: int = 0
    drawn: dict[int, int] = field(default_factory=dict)
    """samples that each worker has drawn already in the epoch of `first_step`"""


class ShardBatches(IterableDataset):
    """The batches of one worker of one rank. A data set that cannot be used comes as a message in place of a batch."""

    def __init__(self, shards: dict[str, int | None], modality: Modality, tokenizer, config, plan, features=None):
        self.shards, self.modality, self.tokenizer, self.features = shards, modality, tokenizer, features
        self.config, self.plan = config, plan

    def __iter__(self) -> Iterator[Batch | str]:
        plan, info = self.plan, get_worker_info()
        workers = info.num_workers if info else 1
        # The loader asks its workers in turn: step k is worker k modulo workers, in a resumed run as well.
        first = plan.first_step + (info.id if info else 0)
        steps = range(first, plan.total_steps, workers)
        for epoch, steps_of_epoch in groupby(steps, key=lambda step: step // plan.steps_per_epoch):
            resumed = epoch == plan.first_step // plan.steps_per_epoch
            drawn = plan.drawn.get(first % workers, 0) if resumed else 0
            stream = WorkerStream(self, epoch, first % workers, workers, drawn)
            try:
                for _ in steps_of_epoch:
                    yield stream.next_batch()
            except UserError as error:  # as a value: an exception would arrive with the worker's traceback in it
                yield str(error)
                return
