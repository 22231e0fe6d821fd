"""A partner in training: a frozen encoder of another modality of the same samples.

Text alone binds modalities loosely. With a partner, the trained encoder's features are also compared with the partner's
features of each sample, in a second contrastive loss. The partner is a checkpoint, or open_clip:NAME/TAG.

    languagebind embed-anchor --train-data shards/ --anchor logs/depth

writes its features beside the shards, where training with --anchor finds them. Run the command again to resume a
stopped run. Under torchrun each rank processes its share of the shards.
"""

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UserError, at_least, digest, parse, to_dict
from .data.feature_store import FeaturesMode, FeatureStore, embed_shards, hash_item, local_shards, samples_in
from .data.members import choose_frame, media_sources
from .distributed import Precision, autocast, joined
from .eval.cache import weights_digest
from .eval.models import load_eval_model
from .modalities import UNUSED, DecodeError, Modality, modality_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartnerConfig:
    """Partner: a frozen encoder of another modality of each sample, whose features also pull the trained encoder."""

    anchor: str | None = None
    """checkpoint of the partner, or open_clip:NAME/TAG; none: train with captions alone"""
    anchor_modality: str | None = None
    """modality of a partner that reads several; default: image"""
    anchor_features: FeaturesMode = "auto"
    """the partner's features: read the files of languagebind embed-anchor beside the shards (cached), encode each batch
    (live), or use the files if they exist (auto)"""
    anchor_weight: float = 0.5
    """weight of the loss against the partner's features, beside the loss against captions"""

    def __post_init__(self):
        at_least(0, anchor_weight=self.anchor_weight)


@dataclass(frozen=True)
class EmbedAnchorOptions:
    """Write a partner's features beside the shards."""

    train_data: str
    """shards: a brace pattern, a glob or a folder; several joined by `::`"""
    anchor: str
    """checkpoint of the partner, or open_clip:NAME/TAG"""
    modality: str | None = None
    """modality of a partner that reads several; default: image"""
    batch_size: int = 64
    workers: int = 4
    """threads that read and decode"""
    precision: Precision = "fp32"
    device: str | None = None
    """device to use (default: a GPU if there is one)"""

    def __post_init__(self):
        at_least(1, batch_size=self.batch_size, workers=self.workers)


@dataclass(frozen=True)
class Partner:
    """A frozen encoder of another modality, its stored features, or (without both, in loader workers) its inputs."""

    modality: Modality
    weight: float
    """of its loss"""
    embed_dim: int
    store: FeatureStore
    stored: bool = False
    """the features beside the shards are used"""
    model: Any = None
    """a frozen `languagebind.eval.models.Model`"""

    def read(self, sample: Mapping[str, Any], rng: random.Random, picked: int | None, described: int | None) -> Tensor:
        """Return the stored feature (D,) of a sample, or the partner's input (C, T, H, W).

        Args:
            picked: number of the frame that the trained modality reads; the partner reads the same moment.
            described: number of the frame that the caption describes, for samples where the other reads the whole.

        Raises `DecodeError` if the partner cannot read the sample.
        """
        try:
            sources = media_sources(sample, self.modality)
            if picked is not None and not {None, picked} & sources.keys():
                raise DecodeError(sample["__key__"], f"there is no frame {picked}")
            source = sources[choose_frame(sources, rng, described if picked is None else picked)]
            if not self.stored:
                return self.modality.preprocess(source)
            if not (feature := self.store.find(sample["__url__"], source)).any():
                raise DecodeError(source, "it could not be read when features were written")
            return feature
        except DecodeError as error:
            raise DecodeError(sample["__key__"], f"partner: {error.reason}") from error

    @torch.no_grad()
    def encode(self, x: Tensor, precision: Precision) -> Tensor:
        """Return unit-norm float32 features (B, D) of inputs (B, C, T, H, W), or of stored features (B, D)."""
        if x.ndim > 2:
            with autocast(x.device, precision):
                x = self.model.encode(x)
        return F.normalize(x.float(), dim=-1)

    def ready(self, mode: FeaturesMode, shards: Iterable[str], embed_dim: int) -> "Partner":
        """Return the partner with the features beside the shards in place of its model, if `mode` wants them.

        Raises `UserError` if they belong to another partner, or the partner's features have not `embed_dim` dimensions.
        """
        if self.embed_dim != embed_dim:
            dimensions = f"{self.embed_dim} dimensions, but the text tower {embed_dim}"
            raise UserError(f"the partner of --anchor has {dimensions}: choose models of one embedding size")
        stored = self.store.serves(mode, shards)
        how = "read from beside the shards" if stored else "encoded at each step"
        log.info("partner's %s features: %s, weight %g", self.store.kind, how, self.weight)
        return replace(self, model=None, stored=True) if stored else self

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint records."""
        return {"modality": self.store.kind, "fingerprint": self.store.fingerprint, "weight": self.weight}


def load_partner(config: PartnerConfig, device: torch.device) -> Partner:
    """Return the partner that the options name. Raises `UserError` if it cannot be used."""
    model, kind = load_eval_model(str(config.anchor), device, config.anchor_modality, default_modality="image")
    model.requires_grad_(False)
    default = to_dict(type(kind)())
    changed = {key: x for key, x in to_dict(kind).items() if key not in UNUSED and x != default[key]}
    fingerprint = digest([weights_digest(model), modality_name(kind), changed])
    model.text_model, model.text_projection = nn.Identity(), nn.Identity()  # free their memory
    with torch.no_grad():
        embed_dim = model.encode(torch.ones(1, *kind.input_shape, device=device)).shape[1]
    return Partner(kind, config.anchor_weight, embed_dim, FeatureStore(fingerprint, modality_name(kind)), model=model)


def write_features(shard: str, partner: Partner, options: EmbedAnchorOptions) -> tuple[int, int] | None:
    """Encode all media in a local shard that training may read for the partner, and write the features to one file.

    The feature of media that cannot be decoded is zero; training skips such samples and counts them.

    Returns:
        The numbers of media and of those that cannot be decoded, or None if an earlier run has written the file.
    """
    store, modality, found = partner.store, partner.modality, dict[Any, Any]()
    if store.sources(shard) is not None:
        return None
    for sample in samples_in(shard, modality.extensions):
        with suppress(DecodeError):  # without the member
            found |= {hash_item(source): source for source in media_sources(sample, modality).values()}
    if not found:
        raise UserError(f"{shard} has no member named {' or '.join(modality.extensions)}: is --modality right?")
    sources = list(found.values())
    features = torch.zeros(len(sources), partner.embed_dim, dtype=torch.float16)
    parts = torch.arange(len(sources)).split(options.batch_size)
    with ThreadPoolExecutor(options.workers) as pool:
        reading = (pool.map(partial(_read, modality), [sources[i] for i in part]) for part in parts)
        ahead = pairwise(chain(reading, [()]))  # the pool already reads the next part
        for part, (inputs, _) in zip(parts, ahead, strict=True):
            usable = {int(i): x for i, x in zip(part, inputs, strict=True) if x is not None}
            if usable:
                x = torch.stack(list(usable.values())).to(partner.model.logit_scale.device)
                features[list(usable)] = partner.encode(x, options.precision).half().cpu()
    store.write(shard, sources, features)
    return len(sources), int((features == 0).all(dim=1).sum())


def _read(modality: Modality, source: Any) -> Tensor | None:
    try:
        return modality.preprocess(source)
    except DecodeError:
        return None


def main(argv: Sequence[str] | None = None) -> None:
    """Write the features, with the options of the command line."""
    options = parse(EmbedAnchorOptions, argv, prog="languagebind embed-anchor")
    shards = local_shards(options.train_data)
    with joined(options.device) as process:
        partner = load_partner(PartnerConfig(options.anchor, options.modality), process.device)
        counts = embed_shards(shards, process, partial(write_features, partner=partner, options=options))
    written = [count for count in counts if count is not None]
    inputs, bad = (sum(count[i] for count in written) for i in range(2))
    name, done = f"{partner.store.kind} partner {partner.store.fingerprint[:12]}", counts.count(None)
    print(f"{inputs} inputs of {len(written)} shards, {name}; {bad} cannot be read; {done} shards were complete")
