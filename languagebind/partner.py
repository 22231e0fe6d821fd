"""A partner in training: a frozen encoder of another modality of the same samples.

With a partner, features are compared with the partner's features of each sample, too, in a second contrastive loss.
`languagebind embed-anchor --train-data shards/ --anchor logs/depth` writes its features beside the shards, where
training finds them. Run it again to resume a stopped run. Under torchrun each rank processes its share of the shards.
"""

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
from tqdm import tqdm

from .config import UserError, digest, parse, to_dict
from .data.feature_store import FeaturesMode, FeatureStore, hash_item, local_shards, samples_in
from .data.members import choose_frame, media_sources
from .distributed import Precision, autocast, joined
from .eval.cache import weights_digest
from .eval.models import load_eval_model
from .modalities import DecodeError, Modality, modality_name


@dataclass(frozen=True)
class PartnerConfig:
    """Partner: a frozen encoder of another modality of each sample, whose features also pull the trained encoder."""

    anchor: str | None = None
    """checkpoint of the partner, open_clip:NAME/TAG, or a modality of the same run; none: train with captions alone"""
    anchor_modality: str | None = None
    """modality of a partner that reads several; default: image"""
    anchor_features: FeaturesMode = "auto"
    """cached: read the files of languagebind embed-anchor; live: encode each batch; auto: cached if there are files"""
    anchor_weight: float = 0.5
    """weight of the loss against the partner's features, beside the loss against captions"""


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
    precision: Precision = "fp32"
    device: str | None = None
    """device to use; None: a GPU if there is one"""


@dataclass(frozen=True)
class Partner:
    """A frozen encoder of another modality, or its stored features. Loader workers have neither, and read inputs."""

    modality: Modality
    weight: float  # of its loss
    store: FeatureStore
    stored: bool = False  # the features beside the shards are used
    model: Any = None  # a frozen `languagebind.eval.models.Model`

    def read(self, sample: Mapping[str, Any], rng: random.Random, picked: int | None, described: int | None) -> Tensor:
        """Return the stored feature (D,) of a sample, or the partner's input (C, T, H, W). May raise `DecodeError`.

        It is of the frame `picked` for the trained modality; where that reads the whole, of the frame `described`.
        """
        try:
            sources = media_sources(sample, self.modality)
            if picked is not None and None not in sources and picked not in sources:
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
        """Return the partner with the features beside the shards in place of its model, if `mode` wants them."""
        inputs = torch.ones(1, *self.modality.input_shape, device=self.model.logit_scale.device)
        if (own := self.encode(inputs, "fp32").shape[1]) != embed_dim:
            sizes = f"{own} dimensions, but the text tower {embed_dim}"
            raise UserError(f"the partner of --anchor has {sizes}: choose models of one embedding size")
        return replace(self, model=None, stored=True) if self.store.serves(mode, shards) else self


def load_partner(config: PartnerConfig, device: torch.device) -> Partner:
    """Return the partner that the options name. Raises `UserError` if it cannot be used."""
    model, kind = load_eval_model(str(config.anchor), device, config.anchor_modality, default_modality="image")
    model.requires_grad_(False)
    name = modality_name(kind)
    store = FeatureStore(digest([weights_digest(model), name, to_dict(kind)]), name)
    model.text_model, model.text_projection = nn.Identity(), nn.Identity()  # free their memory
    return Partner(kind, config.anchor_weight, store, model=model)


def write_features(shard: str, partner: Partner, options: EmbedAnchorOptions) -> tuple[int, int] | None:
    """Write the features of all media in a local shard that training may read for the partner; zeros for bad media.

    Returns the numbers of media and of those that cannot be decoded, or None if an earlier run has written the file.
    """
    modality, found, features = partner.modality, dict[Any, Any](), []
    if partner.store.sources(shard) is not None:
        return None
    for sample in samples_in(shard, modality.extensions):
        with suppress(DecodeError):  # without the member
            found |= {hash_item(source): source for source in media_sources(sample, modality).values()}
    if not found:
        raise UserError(f"{shard} has no member named {' or '.join(modality.extensions)}: is --modality right?")
    sources, n = list(found.values()), options.batch_size
    with ThreadPoolExecutor(options.workers) as pool:
        reading = (pool.map(partial(_read, modality), sources[i : i + n]) for i in range(0, len(sources), n))
        for part, _ in pairwise(chain(reading, [()])):  # the pool already reads the next part
            inputs, usable = zip(*part, strict=True)
            encoded = partner.encode(torch.stack(inputs).to(partner.model.logit_scale.device), options.precision)
            features.append(encoded.half().cpu() * torch.tensor(usable)[:, None])
    partner.store.write(shard, sources, table := torch.cat(features))
    return len(sources), int((table == 0).all(dim=1).sum())


def _read(modality: Modality, source: Any) -> tuple[Tensor, bool]:
    try:
        return modality.preprocess(source), True
    except DecodeError:
        return torch.zeros(modality.input_shape), False


def main(argv: Sequence[str] | None = None) -> None:
    """Write the features, with the options of the command line."""
    options = parse(EmbedAnchorOptions, argv, prog="languagebind embed-anchor")
    shards = local_shards(options.train_data)
    with joined(options.device) as process:
        partner = load_partner(PartnerConfig(options.anchor, options.modality), process.device)
        own = shards[process.rank :: process.world_size]
        counts = [write_features(x, partner, options) for x in tqdm(own, unit="shard", disable=not process.is_main)]
    written = [count for count in counts if count is not None]
    inputs, bad = (sum(count[i] for count in written) for i in range(2))
    name, done = f"{partner.store.modality} partner {partner.store.fingerprint[:12]}", counts.count(None)
    print(f"{inputs} inputs of {len(written)} shards, {name}; {bad} cannot be read; {done} shards were complete")
