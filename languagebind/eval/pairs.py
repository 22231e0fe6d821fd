"""Between modalities: python -m languagebind.eval.pairs --model depth=PATH infrared=PATH --config FILE.yaml

Retrieval between modalities that met no other in training than text, and fusions of several modalities of a sample.
`pairing.py` says what the YAML file holds.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import __version__
from ..config import UserError, digest, gather_flags, parse, run, to_dict
from ..distributed import joined
from ..fusion import fuse
from ..hub.checkpoint import checkpoint_name
from ..hub.encoders import TEXT, Encoders, load
from ..modalities import Modality
from ..model import DualEncoder
from .cache import FeatureCache, weights_digest
from .data.pairing import PairsConfig, load_pairs_config, match_samples, renamed, sample_key, sample_labels
from .data.readers import EvalProtocol, choose_protocol
from .data.samples import Sample, count_missing, digest_of_samples
from .data.shards import list_shards
from .features import EncodeOptions, build_classifier, class_prompts, encode_samples, encode_texts, open_cache
from .models import checkpoint_of
from .results import table, writable, write_result
from .score.retrieval import Captioned, describe_retrieval, retrieve
from .score.statistics import settings
from .score.zero_shot import classify, describe_classification, label_targets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairsOptions:
    """Evaluate checkpoints on comparisons between modalities."""

    model: tuple[str, ...] = ()
    """MODALITY=CHECKPOINT, one a modality; a checkpoint as `python -m languagebind.eval --checkpoint` takes it"""
    config: tuple[Path, ...] = ()
    """YAML files that describe comparisons, see configs/eval/pairs/"""
    output: Path = Path("results")
    """folder for the result files, <name>_<checkpoints>.json"""
    data_root: Path | None = None
    """folder that the data paths in the configs start from; default: each config's own folder"""
    overwrite: bool = False
    """replace result files that exist"""
    encode: EncodeOptions = field(default_factory=EncodeOptions)


@dataclass(frozen=True)
class Encoded:
    """The samples that every modality could be read of, in the same order in each."""

    features: dict[str, Tensor]
    """(N, D) by modality, unit norm"""
    samples: dict[str, list[Sample]]
    """N by modality"""
    skipped: int
    """samples that lack a partner, or could not be read"""
    unpaired: int
    """those that lack one"""


class Encoder(NamedTuple):
    """What encodes one modality."""

    model: DualEncoder
    protocol: EvalProtocol
    cache: FeatureCache | None


def evaluate_pairs(encoders: Encoders, config: PairsConfig, options: EncodeOptions) -> dict[str, Any]:
    """Evaluate encoders on a comparison. Where torch.distributed is initialised, every rank must call this.

    Returns:
        The result file's object, with the keys of an evaluation's.

    Raises:
        UserError: an encoder is missing, the data does not fit together, or a sample cannot be read.
    """
    models = {name: encoders.encoders[name] for name in config.used if name in encoders.encoders}
    if absent := config.used.keys() - models.keys() - {TEXT}:
        raise UserError(f"{config.name} needs an encoder: --model {min(absent)}=CHECKPOINT")
    if not models:
        raise UserError(f"{config.name} compares texts alone: name a modality")
    # Before anything is encoded, so that what is wrong with the data stops the run at once.
    matched, unpaired = match_samples(
        config, {name: modality for name, (_, modality) in models.items()}, options.skip_bad
    )
    samples = {name: [[x.key, x.id, x.labels, x.captions] for x in own] for name, own in matched.items()}
    identity = digest_of_samples(samples, config.name)
    own = {data.data: data for data in config.data.values()}  # several modalities may be of the same data
    missing = sum(count_missing(data) or 0 for data in own.values())
    targets = None
    if config.task == "classification":
        targets = label_targets(sample_labels(config, matched), config.class_names, config.name)
    used = {name: _encoder(f"{config.name}_{name}", *loaded, options) for name, loaded in models.items()}
    encoded, kept = _encode(used, matched, unpaired, options)
    query = _fuse(config, encoded, config.query)
    if targets is None:
        found, details = _retrieval(config, encoded, query)
    else:
        found, details = _classification(config, encoded, query, targets[kept], used, options)
    protocol = _protocol(config, models, identity, options) | {
        "samples": len(query), "skipped_samples": encoded.skipped, "unpaired_samples": encoded.unpaired,
        "missing_samples": missing,
    }  # fmt: skip
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
    return Encoder(model, protocol, open_cache(model, name, protocol, options))


def _encode(
    used: Mapping[str, Encoder], matched: Mapping[str, list[Sample]], unpaired: int, options: EncodeOptions
) -> tuple[Encoded, list[int]]:
    """Features of what all modalities can be read of, and its positions among the matched samples."""
    features, positions = {}, {}
    for name, samples in matched.items():
        model, protocol, cache = used.get(name) or next(iter(used.values()))
        if name == TEXT:
            features[name] = _encode_captions(model, samples, options, cache)
            positions[name] = list(range(len(samples)))
        else:
            features[name], positions[name] = encode_samples(model, protocol.reader, samples, options, cache=cache)
    kept = sorted(set.intersection(*map(set, positions.values())))
    if not kept:
        raise UserError("no sample can be read in all of its modalities")
    for name, own in positions.items():
        rows = {position: row for row, position in enumerate(own)}
        features[name] = features[name][[rows[position] for position in kept]]
    samples = {name: [matched[name][position] for position in kept] for name in matched}
    lost = len(next(iter(matched.values()))) - len(kept)
    return Encoded(features, samples, unpaired + lost, unpaired), kept


def _encode_captions(model, samples: Sequence[Sample], options: EncodeOptions, cache: FeatureCache | None) -> Tensor:
    """(N, D): of a sample's several captions the mean of their unit-norm features, at unit norm again."""
    captions = (caption for sample in samples for caption in sample.captions)
    texts, rows = encode_texts(model, captions, options, cache=cache)
    counts = torch.tensor([len(sample.captions) for sample in samples])
    owners = torch.arange(len(samples)).repeat_interleave(counts).to(texts.device)
    total = texts.new_zeros(len(samples), texts.shape[1]).index_add(0, owners, texts[rows])
    return F.normalize(total, dim=-1)


def _fuse(config: PairsConfig, encoded: Encoded, weights: Mapping[str, float]) -> Tensor:
    try:
        return fuse(encoded.features, weights)
    except ValueError as error:
        raise UserError(f"{config.name}: {error}") from error


def _retrieval(config: PairsConfig, encoded: Encoded, query: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and protocol, and all else in the result, of both directions."""
    rows = torch.arange(len(query), device=query.device)
    compared = Captioned(_fuse(config, encoded, config.gallery), query, rows, rows)
    found, ranked = retrieve(compared)
    # Examples show the gallery's first modality that has files; the query is named by its key.
    shown = encoded.samples[next((name for name in config.gallery if name != TEXT), next(iter(config.gallery)))]
    first = next(iter(config.query))
    in_shard = bool(list_shards(config.data[first].data))
    keys = [sample_key(sample, in_shard) for sample in encoded.samples[first]]
    details = describe_retrieval(compared, ranked, shown, keys)
    details |= {key: _renamed(details[key]) for key in ("intervals", "curves")}
    protocol = {"relevance": "the sample of the same key alone", "chance": _renamed(found["protocol"]["chance"])}
    return {"metrics": _renamed(found["metrics"]), "protocol": protocol}, details


def _classification(
    config: PairsConfig,
    encoded: Encoded,
    query: Tensor,
    targets: Tensor,
    used: Mapping[str, Encoder],
    options: EncodeOptions,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and protocol, and all else in the result."""
    first, (model, protocol, cache) = next(iter(used.items()))
    names = list(config.class_names.values())
    classifier = build_classifier(model, names, config.templates, options, cache)
    scores, logits = protocol.class_scores(query, classifier, model.logit_scale)
    targets = targets.to(query.device)  # (N, K), as the scores
    found = classify(scores, targets, "classification")
    prompts = {"templates": list(config.templates), "prompts_sha256": digest(class_prompts(names, config.templates))}
    found["protocol"] |= prompts | {"labels": config.labels, "logit_scale": first}
    samples = encoded.samples[first]
    return found, describe_classification(scores, targets, logits, config.class_names, samples)


def _protocol(config: PairsConfig, models, identity: str, options: EncodeOptions):
    """What must agree before two results can be compared."""
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
    words = gather_flags(sys.argv[1:] if argv is None else argv, "--model", "--config")
    options = parse(PairsOptions, words, prog="python -m languagebind.eval.pairs", description=PairsOptions.__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    checkpoints = dict(_named(word) for word in options.model)
    if len(checkpoints) < len(options.model) or not options.model or not options.config:
        raise UserError("give --model MODALITY=CHECKPOINT, once a modality, and --config FILE.yaml")
    configs = [load_pairs_config(file, options.data_root) for file in options.config]
    names = [
        "+".join(checkpoint_name(checkpoints[name]) for name in config.used if name in checkpoints)
        for config in configs
    ]
    paths = [options.output / f"{config.name}_{name}.json" for config, name in zip(configs, names, strict=True)]
    if len(set(paths)) < len(paths):
        raise UserError("two configs have the same name")
    if not writable(options.output):
        raise UserError(f"--output {options.output} cannot be written")
    for path in paths:
        if path.exists() and not options.overwrite:
            raise UserError(f"{path} exists: --overwrite replaces it")
    with joined(options.encode.device) as process:
        encoders = load(checkpoints, device=process.device)
        weights = {name: weights_digest(model) for name, (model, _) in encoders.encoders.items()}
        encode = replace(options.encode, device=str(process.device))
        results = []
        for config, path, name in zip(configs, paths, names, strict=True):
            found = evaluate_pairs(encoders, config, encode)
            identity = {
                "checkpoint": {name: checkpoint_of(checkpoints[name]) for name in weights if name in config.used},
                "weights_sha256": {name: value for name, value in weights.items() if name in config.used},
            }
            results.append(found | {"pretrained": name} | identity)
            if process.is_main:
                write_result(results[-1], path)
                log.info("wrote %s", path)
        if process.is_main:
            print(table(results))


def _named(word: str) -> tuple[str, str]:
    name, _, checkpoint = word.partition("=")
    if not name or not checkpoint:
        raise UserError(f"--model {word}: write MODALITY=CHECKPOINT")
    return name, checkpoint


if __name__ == "__main__":
    run(main)
