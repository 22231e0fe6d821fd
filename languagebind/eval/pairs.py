"""Evaluate between modalities: python -m languagebind.eval.pairs --model depth=PATH infrared=PATH --config FILE.yaml

Retrieval between modalities that were trained with text only, never with each other, and fusions of several modalities
of a sample. `data/pairing.py` describes the YAML file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import __version__
from ..config import UserError, digest, run, to_dict
from ..fusion import fuse
from ..hub.checkpoint import checkpoint_name
from ..hub.encoders import TEXT, Encoders, load
from ..modalities import Modality
from ..model import DualEncoder
from .cache import FeatureCache, open_cache, weights_digest
from .command import CommandOptions, evaluate_each, parse_command
from .data.pairing import PairsConfig, load_pairs_config, match_samples, renamed, sample_key, sample_labels
from .data.readers import EvalProtocol, choose_protocol
from .data.samples import Sample, count_missing, digest_of_samples
from .data.shards import list_shards
from .features import EncodeOptions, build_classifier, class_prompts, encode_samples, encode_texts
from .models import checkpoint_of
from .results import Result
from .score.retrieval import Captioned, describe_retrieval, retrieve
from .score.statistics import settings
from .score.zero_shot import classify, describe_classification, label_targets


@dataclass(frozen=True, kw_only=True)
class PairsOptions(CommandOptions):
    """Evaluate checkpoints on comparisons between modalities."""

    model: tuple[str, ...] = ()
    """MODALITY=CHECKPOINT for each modality; a checkpoint as for `python -m languagebind.eval --checkpoint`"""
    config: tuple[Path, ...] = ()
    """YAML files that describe comparisons, see configs/eval/pairs/"""


@dataclass(frozen=True)
class Encoded:
    """The samples that could be read in every modality, in the same order in each."""

    features: dict[str, Tensor]
    """(N, D) by modality, unit norm"""
    samples: dict[str, list[Sample]]
    """N samples by modality"""
    positions: list[int]
    """position of each sample among the matched ones"""


class Encoder(NamedTuple):
    """What encodes one modality."""

    model: DualEncoder
    protocol: EvalProtocol
    cache: FeatureCache | None


def evaluate_pairs(encoders: Encoders, config: PairsConfig, options: EncodeOptions) -> Result:
    """Evaluate encoders on a comparison. Where torch.distributed is initialised, every rank must call this.

    Returns:
        The contents of the result file, with the keys of an evaluation's.

    Raises:
        UserError: an encoder is missing, the data does not fit together, or a sample cannot be read.
    """
    models = {name: encoders.encoders[name] for name in config.used if name in encoders.encoders}
    if absent := config.used.keys() - models.keys() - {TEXT}:
        raise UserError(f"{config.name} needs an encoder: --model {min(absent)}=CHECKPOINT")
    # Before anything is encoded, so that faulty data stops the run at once
    modalities = {name: modality for name, (_, modality) in models.items()}
    matched, unpaired = match_samples(config, modalities, options.skip_bad)
    facts = {name: [[x.key, x.id, x.labels, x.captions] for x in own] for name, own in matched.items()}
    identity = digest_of_samples(facts, config.name)
    datasets = {data.data: data for data in config.data.values()}  # several modalities may share their data
    missing = sum(count_missing(data) or 0 for data in datasets.values())
    targets = None
    if config.task == "classification":
        targets = label_targets(sample_labels(config, matched), config.class_names or {}, config.name)
    used = {name: _encoder(f"{config.name}_{name}", *loaded, options) for name, loaded in models.items()}
    encoded = _encode(used, matched, options)
    query = fuse(encoded.features, config.query)
    if targets is None:
        found, details = _retrieval(config, encoded, query)
    else:
        found, details = _classification(config, encoded, query, targets[encoded.positions], used, options)
    lost = len(next(iter(matched.values()))) - len(query)
    counts = {"samples": len(query), "skipped_samples": unpaired + lost, "unpaired_samples": unpaired}
    protocol = _protocol(config, models, identity, options) | counts | {"missing_samples": missing}
    return {
        "dataset": config.name,
        "model": "+".join(models),
        "pretrained": None,
        "task": config.task,
        "metrics": found["metrics"],
        "language": config.language,
        "protocol": protocol | found["protocol"],
        "statistics": settings(),
        **details,
    }


def _encoder(name: str, model: DualEncoder, modality: Modality, options: EncodeOptions) -> Encoder:
    protocol = choose_protocol("ours", None, None, modality)
    return Encoder(model, protocol, open_cache(options.feature_cache, model, name, protocol, options.precision))


def _encode(used: Mapping[str, Encoder], matched: Mapping[str, list[Sample]], options: EncodeOptions) -> Encoded:
    """Encode what can be read in all modalities."""
    features: dict[str, Tensor] = {}
    rows: dict[str, dict[int, int]] = {}  # position among the matched samples -> row of the features
    for name, samples in matched.items():
        model, protocol, cache = used.get(name) or next(iter(used.values()))
        if name == TEXT:
            features[name], positions = _encode_captions(model, samples, options, cache), list(range(len(samples)))
        else:
            features[name], positions = encode_samples(model, protocol.reader, samples, options, cache=cache)
        rows[name] = {position: row for row, position in enumerate(positions)}
    kept = sorted(set.intersection(*map(set, rows.values())))
    return Encoded(
        {name: features[name][[rows[name][position] for position in kept]] for name in matched},
        {name: [samples[position] for position in kept] for name, samples in matched.items()},
        kept,
    )


def _encode_captions(model, samples: Sequence[Sample], options: EncodeOptions, cache: FeatureCache | None) -> Tensor:
    """Return (N, D): the mean of the unit-norm features of each sample's captions, normalised again."""
    captions = (caption for sample in samples for caption in sample.captions)
    texts, rows = encode_texts(model, captions, options, cache=cache)
    counts = torch.tensor([len(sample.captions) for sample in samples])
    owners = torch.arange(len(samples)).repeat_interleave(counts).to(texts.device)
    total = texts.new_zeros(len(samples), texts.shape[1]).index_add(0, owners, texts[rows])
    return F.normalize(total, dim=-1)


def _retrieval(config: PairsConfig, encoded: Encoded, query: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return metrics and protocol of both directions, and everything else in the result."""
    rows = torch.arange(len(query), device=query.device)
    compared = Captioned(fuse(encoded.features, config.gallery), query, rows, rows)
    found, ranked = retrieve(compared)
    # Examples show the gallery's first modality that has files, and name the query by its key
    shown = encoded.samples[next((name for name in config.gallery if name != TEXT), next(iter(config.gallery)))]
    first = next(iter(config.query))
    in_shard = bool(list_shards(config.data[first].data))
    keys = [sample_key(sample, in_shard) for sample in encoded.samples[first]]
    details = describe_retrieval(compared, ranked, shown, keys)
    details |= {key: _renamed(details[key]) for key in ("intervals", "curves")}
    protocol = {"relevance": "the sample of the same key alone", "chance": _renamed(found["protocol"]["chance"])}
    return {"metrics": _renamed(found["metrics"]), "protocol": protocol}, details


def _classification(
    config: PairsConfig, encoded: Encoded, query: Tensor, targets: Tensor, used: Mapping[str, Encoder],
    options: EncodeOptions,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Return metrics and protocol, and everything else in the result."""
    first, (model, protocol, cache) = next(iter(used.items()))
    classes = config.class_names or {}
    names = list(classes.values())
    classifier = build_classifier(model, names, config.templates, options, cache)
    scores, logits = protocol.class_scores(query, classifier, model.logit_scale)
    targets = targets.to(query.device)  # (N, K), as the scores
    found = classify(scores, targets, "classification")
    prompts = {"templates": list(config.templates), "prompts_sha256": digest(class_prompts(names, config.templates))}
    found["protocol"] |= prompts | {"labels": config.labels, "logit_scale": first}
    return found, describe_classification(scores, targets, logits, classes, encoded.samples[first])


def _protocol(
    config: PairsConfig, models: Mapping[str, tuple[DualEncoder, Modality]], identity: str, options: EncodeOptions
) -> dict[str, Any]:
    """Return what must agree before two results can be compared."""
    sides = {"query": dict(config.query)} | ({"gallery": dict(config.gallery)} if config.gallery else {})
    return {
        **sides,
        "fusion": "weighted sum of unit-norm features, at unit norm again",
        "text": "mean of the unit-norm features of a sample's captions, at unit norm again",
        "caption_source": config.caption_source,
        "split": config.split,
        "data_sha256": identity,
        "input_shape": {name: list(modality.input_shape) for name, (_, modality) in models.items()},
        "inputs": {name: to_dict(modality) for name, (_, modality) in models.items()},
        "similarity": "cosine",
        "ties": "count against the model",
        "precision": options.precision,
        "batch_size": options.batch_size,
        "text_fingerprint": next(iter(models.values()))[0].text_fingerprint(),
        "versions": {"languagebind": __version__, "torch": torch.__version__},
    }


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {renamed(key): value for key, value in values.items()}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_command(PairsOptions, argv, "languagebind.eval.pairs", "--model", "--config")
    checkpoints = dict(word.split("=", 1) for word in options.model if "=" in word)
    if not options.config or not options.model or len(checkpoints) < len(options.model):
        raise UserError("give --model MODALITY=CHECKPOINT, once for each modality, and --config FILE.yaml")
    jobs = []
    for config in (load_pairs_config(file, options.data_root) for file in options.config):
        used = {name: checkpoints[name] for name in config.used if name in checkpoints}
        stem = f"{config.name}_{'+'.join(map(checkpoint_name, used.values()))}"
        jobs.append((options.output / f"{stem}.json", (config, used)))
    evaluate_each(options, jobs, partial(_load, checkpoints), _evaluate)


def _load(checkpoints: Mapping[str, str], device: torch.device) -> tuple[Encoders, dict[str, str]]:
    """Return the encoders and the digests of their weights."""
    encoders = load(checkpoints, device=device)
    return encoders, {name: weights_digest(model) for name, (model, _) in encoders.encoders.items()}


def _evaluate(
    loaded: tuple[Encoders, dict[str, str]], job: tuple[PairsConfig, dict[str, str]], options: EncodeOptions
) -> Result:
    (encoders, weights), (config, used) = loaded, job
    return evaluate_pairs(encoders, config, options) | {
        "pretrained": "+".join(map(checkpoint_name, used.values())),
        "checkpoint": {name: checkpoint_of(checkpoint) for name, checkpoint in used.items()},
        "weights_sha256": {name: weights[name] for name in used},
    }


if __name__ == "__main__":
    run(main)
