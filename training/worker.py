"""Read, shuffle, prepare and batch one loader worker's share of the shards."""

import hashlib
import json
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from languagebind.config import UserError
from languagebind.data.feature_store import FeatureStore
from languagebind.data.members import (
    choose_frame,
    dotted,
    held_members,
    media_sources,
    pick_samples,
    read_captions,
    stream_samples,
)
from languagebind.data.shards import why_unreadable
from languagebind.data.vidal import NEGATIVES, MissingCaption, all_captions, choose_caption
from languagebind.files import decode_text
from languagebind.modalities import DecodeError, Modality
from languagebind.partner import Partner

from .batch import Batch, DataConfig, Plan, Skipped

# A worker stops if its first HOPELESS samples are all bad. Otherwise --max-bad-share decides, over all ranks.
HOPELESS = 100

Part = tuple[str, int, int | None]  # shard, first sample, end (exclusive; None: all)


class Prepared(NamedTuple):
    """A sample that is ready for a batch."""

    key: str
    inputs: torch.Tensor  # (C, T, H, W)
    texts: list[str]  # the caption and --negatives K hard negatives, "" for those that the sample lacks
    features: torch.Tensor | None  # cached features (1 + K, D) of the texts, zeros for none
    group: int | None
    anchor: torch.Tensor | None = None  # the partner's feature (D,) or input (C, T, H, W)


@dataclass(eq=False)
class ShardBatches(IterableDataset):
    """The batches of one worker of one rank. If the data cannot be used, an error message replaces a batch."""

    shards: dict[str, int | None]  # number of samples per shard; None if unknown
    modality: Modality
    tokenizer: Callable[[list[str]], dict[str, torch.Tensor]]
    config: DataConfig
    plan: Plan
    features: FeatureStore | None = None  # cached text features; without them, batches contain token ids
    partner: Partner | None = None  # without its model

    def __iter__(self) -> Iterator[Batch | str]:
        plan, info = self.plan, get_worker_info()
        workers = info.num_workers if info else 1
        # The loader asks its workers in turn. Step k comes from worker k modulo workers, even after a resume.
        first = plan.first_step + (info.id if info else 0)
        steps = range(first, plan.total_steps, workers)
        for epoch, steps_of_epoch in groupby(steps, key=lambda step: step // plan.steps_per_epoch):
            resumed = epoch == plan.first_step // plan.steps_per_epoch
            stream = WorkerStream(self, epoch, first % workers, workers, resumed)
            try:
                for _ in steps_of_epoch:
                    yield stream.next_batch()
            except UserError as error:  # sent as a value: raising it would add the worker's traceback
                yield str(error)
                return


class WorkerStream:
    """The samples of one worker in one epoch, if it is `resumed` without those that the plan says were drawn."""

    def __init__(self, dataset: ShardBatches, epoch: int, worker: int, workers: int, resumed: bool):
        self.modality, self.tokenizer, self.features = dataset.modality, dataset.tokenizer, dataset.features
        self.config, self.plan, self.shards = dataset.config, dataset.plan, dataset.shards
        self.partner = dataset.partner
        self.epoch, self.worker, self.workers = epoch, worker, workers
        self.drawn = self.resumed_at = self.plan.drawn.get(worker, 0) if resumed else 0
        lengths = self.plan.lengths if resumed else None
        self.passes = 0 if lengths is None else self.resumed_at  # samples that are passed over without reading
        self.known = (lengths or {}).get(worker, {})
        self.given = self.passed = self.used = 0  # samples drawn, passed over and used by this process
        self.parts: list[tuple[int, int, Part]] = []  # parts read or passed over: `passed` before them, lap, part
        self.picked: dict[int, dict | Skipped] = {}
        self.lengths: dict[int, int] = {}
        self.reasons: Counter[str] = Counter()
        self.skipped: list[Skipped] = []
        self.samples = self._usable(islice(self._draw(), self.resumed_at, None))

    def next_batch(self) -> Batch:
        """Return the next batch, with a record of the samples skipped before it."""
        samples = list(islice(self.samples, self.config.batch_size))
        skipped, self.skipped = self.skipped, []
        lengths, self.lengths = self.lengths, {}
        if self.features is None:
            distinct = dict.fromkeys(text for x in samples for text in x.texts if text)
            number = {text: i for i, text in enumerate(distinct)}
            texts = torch.tensor([[number.get(text, -1) for text in x.texts] for x in samples])  # (B, 1 + K)
            text = self.tokenizer(list(number)) | {"caption": texts[:, 0]}
        else:
            texts = torch.stack([x.features for x in samples if x.features is not None])  # (B, 1 + K, D)
            text = {"features": texts[:, 0]}
        if self.config.negatives:
            text["negatives"] = texts[:, 1:]
        return Batch(
            inputs=default_collate([x.inputs for x in samples]),  # straight into memory shared with the trainer
            text=text,
            groups=None if self.config.positives == "pair" else torch.tensor([x.group for x in samples]),
            keys=[x.key for x in samples],
            captions=[x.texts[0] for x in samples],
            skipped=skipped,
            worker=self.worker,
            epoch=self.epoch,
            drawn=self.drawn,
            lengths=lengths,
            anchor=torch.stack([x.anchor for x in samples if x.anchor is not None]) if self.partner else None,
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
        # Seeded per sample: the random choices do not depend on the number of workers.
        rng = random.Random(f"{self.plan.seed} {self.epoch} {sample['__lap__']} {key}")
        try:
            captions = read_captions(sample)
            caption, frame = choose_caption(captions, self.config.caption_source, rng)
            sources = media_sources(sample, self.modality)
            picked = choose_frame(sources, rng, frame)
            x = self.modality.preprocess(sources[picked], torch.Generator().manual_seed(rng.getrandbits(63)))
            others = [text for text in dict.fromkeys(all_captions(captions, NEGATIVES)) if text != caption]
            texts = [caption, *rng.sample(others, min(self.config.negatives, len(others)))]
            lacking, features = 1 + self.config.negatives - len(texts), None
            if self.features is not None:
                found = torch.stack([self.features.find(shard, text) for text in texts])
                features = pad(found, (0, 0, 0, lacking))
            anchor = self.partner.read(sample, rng, picked, frame) if self.partner else None  # drawn last
        except (DecodeError, MissingCaption) as error:
            return Skipped(shard, key, getattr(error, "reason", str(error)) + dotted(sample))
        except Exception as error:  # a bug in our code must not count as a bad sample
            error.add_note(f"while reading sample {key} of {shard}")
            raise
        texts += [""] * lacking
        return Prepared(key, x, texts, features, _group(sample, caption, self.config.positives), anchor)

    def _draw(self) -> Iterator[dict | Skipped]:
        for lap in count():
            used, first = self.used, self.given
            rng = random.Random(f"{self.plan.seed} {self.epoch} {self.plan.rank} {self.worker} {lap}")
            waiting: list[dict | Skipped | int] = []
            for sample in _shuffled(self._read(lap, rng), waiting, self.config.shuffle_buffer, rng):
                self.given += 1
                yield self._pick(sample, waiting) if self.given > self.passes and isinstance(sample, int) else sample
            # A lap that a resumed run skips, even in part, says nothing about the samples.
            if self.used == used and first >= self.resumed_at:
                self._fail("not one sample can be used")

    def _read(self, lap: int, rng: random.Random) -> Iterator[dict | Skipped | int]:
        """Yield the samples of a lap, or their numbers while those that are given were used before a resume."""
        for part in self._parts_of_lap(lap, rng):
            shard, first, last = part
            expected = self.shards[shard] if last is None else last - first
            number, start, place = len(self.parts), self.passed, 0
            length = self.known.get(number, expected)
            self.parts.append((start, lap, part))
            while self.given < self.passes and (length is None or place < length):
                yield start + place
                place += 1
            self.passed += place
            if self.given < self.passes:  # the run before went on to the next part
                continue
            for sample in islice(self._read_part(lap, part), place, None):
                place += 1
                if expected is not None and place > expected:
                    self.lengths[number] = place  # so far
                yield sample
            if place != expected:
                self.lengths[number] = place

    def _read_part(self, lap: int, part: Part) -> Iterator[dict | Skipped]:
        shard, first, last = part
        errors: list[Exception] = []

        def note(error: Exception) -> bool:
            errors.append(error)
            return True  # keep reading what is readable

        samples, read = stream_samples(shard, note, self._extensions()), first
        for sample in islice(samples, first, last):
            read += 1
            yield {**sample, "__lap__": lap}
        lost = 0 if last is None else last - read
        if errors:  # several layers of webdataset report the same fault
            yield from [Skipped(shard, "", f"broken shard: {why_unreadable(shard, errors[0])}")] * max(1, lost)
        elif lost or (last == self.shards[shard] and next(samples, None)):
            reason = f"it has {'fewer' if lost else 'more'} samples than its index.json or sizes.json says"
            yield from [Skipped(shard, "", f"{reason}: {self.shards[shard]}")] * max(1, lost)

    def _pick(self, unread: int, waiting: list) -> dict | Skipped:
        """Return a sample by its number among those passed over, and read those of its part that are waiting."""
        if unread not in self.picked:
            number = bisect_right(self.parts, unread, key=itemgetter(0))
            start, lap, (shard, first, last) = self.parts[number - 1]
            end = self.parts[number][0] if number < len(self.parts) else self.passed
            needed = {x - start for x in (unread, *waiting) if isinstance(x, int) and start <= x < end}
            found: dict[int, dict | Skipped] = {}
            with suppress(Exception):  # whatever is wrong with the shard is found again below
                places = {first + place for place in needed if last is None or first + place < last}
                samples = pick_samples(shard, places, self._extensions())
                found = {place - first: {**sample, "__lap__": lap} for place, sample in samples}
            if len(found) < len(needed):
                whole = islice(self._read_part(lap, (shard, first, last)), max(needed) + 1)
                found = {place: sample for place, sample in enumerate(whole) if place in needed}
            gone = Skipped(shard, "", "it has fewer samples than when they were used, before the run resumed")
            self.picked |= {start + place: found.get(place, gone) for place in needed}
        return self.picked.pop(unread)

    def _extensions(self) -> set[str]:
        others = self.partner.modality.extensions if self.partner else ()
        return {*self.modality.extensions, *others, "json", "txt"}

    def _parts_of_lap(self, lap: int, rng: random.Random) -> Iterator[Part]:
        if self.config.dataset_resampled:
            while True:
                yield rng.choice(list(self.shards)), 0, None
        order = list(self.shards)
        random.Random(f"{self.plan.seed} {self.epoch}").shuffle(order)  # the same on every rank
        counts = {shard: number for shard, number in self.shards.items() if number is not None}
        if len(counts) == len(order):
            own = self._fair_parts(order, counts)
        else:  # each worker gets whole shards
            number, readers = self.plan.rank * self.workers + self.worker, self.plan.world_size * self.workers
            own = [(shard, 0, None) for shard in order[number::readers]]
        if lap:
            rng.shuffle(own)
        yield from own

    def _fair_parts(self, order: list[str], counts: dict[str, int]) -> list[Part]:
        """Return the parts of shards for this worker: a share of all samples in proportion to its batches."""
        plan = self.plan
        steps = range(self.epoch * plan.steps_per_epoch, (self.epoch + 1) * plan.steps_per_epoch)
        batches = [len([step for step in steps if step % self.workers == worker]) for worker in range(self.workers)]
        before = plan.rank * len(steps) + sum(batches[: self.worker])
        total = sum(counts.values())
        begin, end = (total * at // (plan.world_size * len(steps)) for at in (before, before + batches[self.worker]))
        parts: list[Part] = []
        offset = 0
        for shard in order:
            first, last = max(begin - offset, 0), min(end - offset, counts[shard])
            if first < last:
                parts.append((shard, first, last))
            offset += counts[shard]
        return parts

    def _fail(self, what: str) -> None:
        reasons = "; ".join(f"{number} x {reason}" for reason, number in self.reasons.most_common(5))
        first = next(iter(self.shards))
        if not reasons or "no member is named" in reasons:
            absent = f"no member is named {' or '.join(self.modality.extensions)}"
            sample = next(stream_samples(first, lambda error: True), {})  # with all of its members
            reasons = f"{reasons or absent}. The first sample: {held_members(sample)}"
        raise UserError(f"{what} in {len(self.shards)} shards, the first is {first}. {reasons}")


def _group(sample: dict[str, Any], caption: str, positives: str) -> int | None:
    """Return a 64-bit hash of the caption or the id that matching samples share. All ranks agree on it."""
    if positives == "pair":
        return None
    shared = caption if positives == "caption" else sample["__key__"]
    if positives == "id":
        with suppress(ValueError, KeyError, TypeError):  # without an id, the key is used
            shared = str(json.loads(decode_text(sample["json"]))["id"])
    return int.from_bytes(hashlib.blake2b(shared.encode(), digest_size=8).digest(), "big", signed=True)


def _shuffled(samples: Iterator, waiting: list, size: int, rng: random.Random) -> Iterator:
    """Yield the samples, shuffled with the buffer `waiting` of `size` samples."""
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
