"""Evaluate between modalities: languagebind pairs --model depth=PATH infrared=PATH --config NAME

Most modalities were trained with text only, never with each other; a result says which pairs were. A query or gallery
may also fuse several modalities of each sample. `data/pairing.py` describes the YAML file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import UserError, digest, run, to_dict
from ..fusion import fuse
from ..hub.checkpoint import checkpoint_name
from ..hub.encoders import TEXT, Encoders, load
from .cache import weights_digest
from .command import CommandOptions, evaluate_each, parse_command
from .data.pairing import PairsConfig, load_pairs_config, match_samples, renamed, sample_key, sample_labels
from .data.readers import choose_protocol
from .data.samples import Sample, count_missing, digest_of_samples
from .data.shards import list_shards
from .features import EncodeOptions, FeatureEncoder, class_prompts
from .models import checkpoint_of
from .results import Result, new_result, result_path
from .score.metrics import modality_gap
from .score.retrieval import Captioned, describe_retrieval, retrieve
from .score.zero_shot import classify, describe_classification, label_targets, single_labels


@dataclass(frozen=True, kw_only=True)
class PairsOptions(CommandOptions):
    """Evaluate checkpoints on comparisons between modalities."""

    model: tuple[str, ...] = ()
    """one MODALITY=CHECKPOINT per modality; CHECKPOINT is anything that `languagebind eval` accepts"""
    config: tuple[Path, ...] = ()
    """comparisons: names (see `languagebind configs`), or YAML files"""


def evaluate_pairs(encoders: Encoders, config: PairsConfig, options: EncodeOptions) -> Result:
    """Evaluate encoders on a comparison. If torch.distributed is initialised, every rank must call this.

    Returns:
        The contents of the result file, with the same keys as the result of `evaluate`.

    Raises `UserError` if an encoder is missing, the modalities' samples do not match, or a sample cannot be read.
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
    used = {
        name: FeatureEncoder(model, choose_protocol("ours", None, None, modality), options, f"{config.name}_{name}")
        for name, (model, modality) in models.items()
    }
    towers = {name: encoder.model.text_fingerprint() for name, encoder in used.items()}
    partners = _text_partners(config, towers)
    features, samples, kept = _encode(used, matched, partners)
    query = fuse(features, config.query)
    if targets is None:
        found, details = _retrieval(config, query, fuse(features, config.gallery), samples)
    else:
        found, details = _classification(config, query, targets[kept], used, partners, samples)
    lost = len(next(iter(matched.values()))) - len(query)
    counts = {"samples": len(query), "skipped_samples": unpaired + lost, "unpaired_samples": unpaired}
    bad = sum(sample.bad_captions for own in matched.values() for sample in own)
    counts |= {"missing_samples": missing, "bad_captions": bad}
    found["protocol"] = _protocol(config, used, towers, identity) | counts | found["protocol"]
    return new_result(config, "+".join(models), found, details)


def _text_partners(config: PairsConfig, towers: Mapping[str, str]) -> dict[str, str]:
    """Return the modalities that are compared with texts, and for each the first of them with the same text tower."""
    opposite = config.gallery if TEXT in config.query else {}
    side = config.query if config.class_names or TEXT in config.gallery else opposite
    first: dict[str, str] = {}
    return {name: first.setdefault(towers[name], name) for name in side if name != TEXT}


def _encode(
    used: Mapping[str, FeatureEncoder], matched: Mapping[str, list[Sample]], partners: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, list[Sample]], list[int]]:
    """Return features (N, D) and samples per modality, and the positions (N,) of the samples that all can read."""
    features: dict[str, Tensor] = {}
    rows: dict[str, dict[int, int]] = {}  # position among the matched samples -> row of the features
    # Texts get a block of columns for each text tower. A modality that is compared with them is 0 outside the block of
    # its own tower, so products leave out the other towers.
    firsts = list(dict.fromkeys(partners.values()))  # a modality for each tower
    for name, samples in matched.items():
        if name == TEXT:
            positions = list(range(len(samples)))
            blocks = [_encode_captions(used[one], samples) for one in firsts]
        else:
            x, positions = used[name].encode_samples(samples)
            empty = {one: x.new_zeros(len(x), used[one].model.embed_dim) for one in firsts}
            blocks = [x if partners.get(name, one) == one else empty[one] for one in firsts] or [x]
        features[name] = torch.cat(blocks, dim=1)
        rows[name] = {position: row for row, position in enumerate(positions)}
    kept = sorted(set.intersection(*map(set, rows.values())))
    if not kept:
        raise UserError(f"no sample can be read in all of {', '.join(matched)}")
    features = {name: x[[rows[name][position] for position in kept]] for name, x in features.items()}
    return features, {name: [samples[i] for i in kept] for name, samples in matched.items()}, kept


def _encode_captions(encoder: FeatureEncoder, samples: Sequence[Sample]) -> Tensor:
    """Return the normalised mean of the unit-norm features of each sample's captions (N, D)."""
    texts, rows = encoder.encode_texts(caption for sample in samples for caption in sample.captions)
    counts = torch.tensor([len(sample.captions) for sample in samples])
    owners = torch.arange(len(samples)).repeat_interleave(counts).to(texts.device)
    total = texts.new_zeros(len(samples), texts.shape[1]).index_add(0, owners, texts[rows])
    return F.normalize(total, dim=-1)


def _retrieval(
    config: PairsConfig, query: Tensor, gallery: Tensor, samples: Mapping[str, list[Sample]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metrics and protocol of both directions, and the other statistics of the result."""
    if query.shape[1] != gallery.shape[1]:
        problem = f"features of {query.shape[1]} and {gallery.shape[1]} dimensions cannot be compared"
        raise UserError(f"{config.name}: {problem}; choose models of one embedding size")
    rows = torch.arange(len(query), device=query.device)
    compared = Captioned(gallery, query, rows, rows)
    found, ranked = retrieve(compared)
    # Examples show the first modality of the gallery that has files, and name the query by its key
    shown = samples[next((name for name in config.gallery if name != TEXT), next(iter(config.gallery)))]
    first = next(iter(config.query))
    in_shard = bool(list_shards(config.data[first].data))
    details = describe_retrieval(compared, ranked, shown, [sample_key(sample, in_shard) for sample in samples[first]])
    details |= {key: _renamed(details[key]) for key in ("intervals", "curves")}
    details["gap"] = modality_gap(query, gallery, rows)
    protocol = {"relevance": "the sample of the same key alone", "chance": _renamed(found["protocol"]["chance"])}
    return {"metrics": _renamed(found["metrics"]), "protocol": protocol}, details


def _classification(
    config: PairsConfig, query: Tensor, targets: Tensor, used: Mapping[str, FeatureEncoder],
    partners: Mapping[str, str], samples: Mapping[str, list[Sample]],
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Return the metrics and protocol, and the other statistics of the result."""
    first, encoder = next(iter(used.items()))
    classes = config.class_names or {}
    names = list(classes.values())
    blocks = [used[one].build_classifier(names, config.templates) for one in dict.fromkeys(partners.values())]
    classifier = torch.cat(blocks, dim=1) / len(blocks) ** 0.5  # unit norm
    scores, logits = encoder.protocol.class_scores(query, classifier, encoder.model.logit_scale)
    targets = targets.to(query.device)  # (N, K), like the scores
    found = classify(scores, targets, "classification")
    prompts = {"templates": list(config.templates), "prompts_sha256": digest(class_prompts(names, config.templates))}
    found["protocol"] |= prompts | {"labels": config.labels, "logit_scale": first}
    gap = modality_gap(query, classifier, single_labels(targets))
    return found, {"gap": gap} | describe_classification(scores, targets, logits, classes, samples[first])


def _protocol(
    config: PairsConfig, used: Mapping[str, FeatureEncoder], towers: Mapping[str, str], identity: str
) -> dict[str, Any]:
    """Return the settings that must agree before two results can be compared."""
    sides = {"query": dict(config.query)} | ({"gallery": dict(config.gallery)} if config.gallery else {})
    modalities = {name: encoder.protocol.reader.modality for name, encoder in used.items()}
    met = {name: encoder.model.trained_with for name, encoder in used.items()}
    return {
        **sides,
        "fusion": "weighted sum of unit-norm features, at unit norm again",
        "text": "mean of the unit-norm features of a sample's captions, at unit norm again",
        "caption_source": config.caption_source,
        "pairs": {
            f"{one} and {other}": "trained" if other in met.get(one, ()) or one in met.get(other, ()) else "emergent"
            for one, other in product(config.query, config.gallery or (TEXT,))
            if one != other
        },
        "split": config.split,
        "data_sha256": identity,
        "input_shape": {name: list(modality.input_shape) for name, modality in modalities.items()},
        "inputs": {name: to_dict(modality) | dict(modality.details) for name, modality in modalities.items()},
        "similarity": "cosine",
        "ties": "count against the model",
        **next(iter(used.values())).describe(),
        **({"text_fingerprint": dict(towers)} if len(set(towers.values())) > 1 else {}),
    }


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {renamed(key): value for key, value in values.items()}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_command(PairsOptions, argv, "pairs", "--model", "--config")
    checkpoints = dict(word.split("=", 1) for word in options.model if "=" in word)
    if not options.config or not options.model or len(checkpoints) < len(options.model):
        raise UserError("pass one --model MODALITY=CHECKPOINT per modality, and --config NAME_OR_FILE")

    def evaluate(
        config: PairsConfig, name: str, used: dict[str, str], encoders: Encoders, encode: EncodeOptions
    ) -> Result:
        return evaluate_pairs(encoders, config, encode) | {
            "pretrained": name,
            "checkpoint": {key: checkpoint_of(checkpoint) for key, checkpoint in used.items()},
            "weights_sha256": {key: weights_digest(encoders.encoders[key][0]) for key in used},
        }

    jobs = []
    for config in (load_pairs_config(file, options.data_root) for file in options.config):
        used = {name: checkpoints[name] for name in config.used if name in checkpoints}
        name = "+".join(map(checkpoint_name, used.values()))
        jobs.append((result_path(options.output, config.name, name), partial(evaluate, config, name, used)))
    evaluate_each(options, lambda device: load(checkpoints, device=device), jobs)


if __name__ == "__main__":
    run(main)
