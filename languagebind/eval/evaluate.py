"""Zero-shot classification and retrieval of one model on one dataset."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import UserError, digest, to_dict
from ..distributed import rank
from ..modalities import DecodeError, Modality, modality_name
from .data.datasets import DatasetConfig, naming
from .data.readers import EvalProtocol, Reader, choose_protocol
from .data.samples import Sample, class_names, count_missing, digest_of_samples, read_samples, warn_of_count
from .export import Features, export_features
from .features import EncodeOptions, build_classifier, class_prompts, encode_samples, encode_texts, open_cache
from .score.retrieval import Captioned, describe_retrieval, retrieve
from .score.statistics import settings
from .score.zero_shot import (
    classify,
    describe_classification,
    describe_multilabel,
    label_targets,
)

log = logging.getLogger(__name__)
# Enough to tell files of another modality from a damaged one.
PROBED_SAMPLES = 16


@dataclass(frozen=True)
class ListedDataset:
    """A dataset and its samples. `check_dataset` lists them once, for any number of evaluations."""

    config: DatasetConfig
    samples: list[Sample]


def evaluate(
    model,
    modality: Modality,
    dataset: DatasetConfig | ListedDataset,
    *,
    statistics: bool = True,
    dual_softmax: bool = False,
    export: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on a dataset. The same model and data give the same result, bit for bit.

    Where torch.distributed is initialised, every rank must call this; each encodes its share, and all get the result.

    Args:
        model: a `DualEncoder`, or any other `languagebind.eval.models.Model`; its mode is left as it was.
        modality: how the model's inputs are read.
        dataset: what to evaluate on. A `ListedDataset`, which `check_dataset` returns, is not listed again.
        statistics: whether the result holds more than metrics: intervals, classes, curves, examples. Training leaves
            them out.
        dual_softmax: for retrieval, the metrics of the dual softmax too, named `dual_softmax/...`.
        export: write the features to this file, .safetensors or .parquet, see `export_features`.
        **options: fields of `EncodeOptions`: batch_size, workers, precision, device, skip_bad, feature_cache.

    Returns:
        The result file's object: dataset, model, pretrained (None here), task, metrics, language and protocol. With
        `statistics` also intervals, statistics (how the intervals were made), ties (how many queries or samples have
        a wrong item that scores exactly as the best right one) and examples; classes for both kinds of
        classification; confusion and calibration where a sample has one class; curves for retrieval.

    Raises:
        UserError: the data is missing or incomplete, a label is no class, a sample cannot be read, or the model gives
            NaN or infinity.
    """
    encoding = EncodeOptions(**options)
    listed, dataset = (dataset, dataset.config) if isinstance(dataset, ListedDataset) else (None, dataset)
    protocol = _choose(dataset, modality)
    _check_features(dataset.name, protocol, dual_softmax, export)
    _check_model(model, dataset.name, protocol, encoding)
    samples = listed.samples if listed else read_samples(dataset, modality)
    identity = digest_of_samples([[x.key, x.labels, x.captions] for x in samples], dataset.name)
    log.info("%s: %s on %d samples", dataset.name, dataset.task, len(samples))
    cache = open_cache(model, dataset.name, protocol, encoding)
    with naming(dataset.name):
        if dataset.task == "retrieval":
            found = _retrieval(model, protocol, samples, encoding, cache, dual_softmax)
        else:
            found = _classification(model, protocol, dataset, samples, encoding, cache)
    if export is not None and not rank():
        export_features(found.features, export)
    result = {
        "dataset": dataset.name,
        "model": modality_name(modality),
        "pretrained": None,
        "task": dataset.task,
        "metrics": found.metrics,
        "language": dataset.language,
        "protocol": _protocol(model, protocol, dataset, identity, encoding) | found.protocol,
    }
    return result | ({"statistics": settings()} | found.describe() if statistics else {})


def check_dataset(dataset: DatasetConfig, modality: Modality) -> ListedDataset:
    """Find what would stop an evaluation: missing data, wrong labels, no captions, files of another modality.

    Returns:
        The dataset with its samples, for `evaluate`.

    Raises:
        UserError: with what is wrong.
    """
    reader = _choose(dataset, modality).reader
    samples = read_samples(dataset, modality)
    if dataset.task != "retrieval":
        label_targets(samples, class_names(dataset), dataset.name)
    for sample in samples[:PROBED_SAMPLES]:
        try:
            reader.read(sample.load(modality.input_shape[1]))
            return ListedDataset(dataset, samples)
        except DecodeError as error:
            reason = error
    raise UserError(f"{dataset.name}: none of the first samples can be read as {modality_name(modality)}: {reason}")


def _choose(dataset: DatasetConfig, modality: Modality) -> EvalProtocol:
    if dataset.modality not in (None, modality_name(modality)):
        raise UserError(f"{dataset.name} is of {dataset.modality}, the model reads {modality_name(modality)}")
    with naming(dataset.name):
        return choose_protocol(dataset.protocol, dataset.paper, dataset.clip, modality, dataset.clips, dataset.crops)


def _check_features(name: str, protocol: EvalProtocol, dual_softmax: bool, export: Path | None) -> None:
    """What needs features of unit norm."""
    if dual_softmax and not protocol.unit:
        raise UserError(f"{name}: the dual softmax is of cosines, which this protocol has none of")
    several = protocol.reader.views > 1 and not protocol.reader.pooled
    if export is not None and (not protocol.unit or several):
        raise UserError(f"{name}: this protocol has no features of unit norm, one a sample, to export")


def _check_model(model, name: str, protocol: EvalProtocol, options: EncodeOptions) -> None:
    """What cannot be had of a model that reads files itself, or whose weights cannot be told from others."""
    files = getattr(model, "takes_files", False)
    if files and (type(protocol.reader) is not Reader or protocol.reader.clip):
        raise UserError(f"{name}: the model reads files itself, so the protocol's own way of reading is not to be had")
    if files and options.feature_cache is not None:
        raise UserError("--feature-cache: what a model that reads files itself makes of them cannot be told apart")
    if options.feature_cache is not None and not getattr(model, "known", True):
        raise UserError("--feature-cache: give the model a `fingerprint` that changes with its weights")


@dataclass(frozen=True)
class _Found:
    """What a task adds to the result."""

    metrics: dict[str, float]
    protocol: dict[str, Any]
    describe: Callable[[], dict[str, Any]]
    """makes all else, which takes longer"""
    features: Features


def _classification(
    model, protocol: EvalProtocol, dataset: DatasetConfig, samples: list[Sample], options, cache
) -> _Found:
    classes = class_names(dataset)
    warn_of_count(dataset, "classes", len(classes))
    # (N, K), and before anything is encoded, so that a wrong label stops the run at once.
    targets = label_targets(samples, classes, dataset.name)
    if len(set(classes.values())) < len(classes):
        log.warning("%s: several classes have the same name, so they always tie", dataset.name)
    features, kept = encode_samples(model, protocol.reader, samples, options, cache=cache)
    seen = [samples[i] for i in kept]
    classifier = build_classifier(model, list(classes.values()), dataset.templates, options, cache)
    scores, logits = protocol.class_scores(features, classifier, model.logit_scale)
    targets = targets[kept].to(features.device)  # (N, K), as the scores
    if not targets.any():
        raise UserError("none of the samples that can be read has a label")
    found = classify(scores, targets, dataset.task)
    prompts = class_prompts(list(classes.values()), dataset.templates)
    asked = {"templates": list(dataset.templates), "prompts": len(prompts), "prompts_sha256": digest(prompts)}
    if dataset.task == "multilabel":
        describe = partial(describe_multilabel, scores, targets, classes, seen)
    else:
        describe = partial(describe_classification, scores, targets, logits, classes, seen)
    texts = [{"label": label, "text": name} for label, name in classes.items()]
    return _Found(
        found["metrics"],
        _counts(samples, kept) | asked | found["protocol"],
        describe,
        Features(features, seen, classifier, texts),
    )


def _retrieval(model, protocol: EvalProtocol, samples: list[Sample], options, cache, dual_softmax: bool) -> _Found:
    features, kept = encode_samples(model, protocol.reader, samples, options, protocol.unit, cache)
    captions = [(i, caption) for i, position in enumerate(kept) for caption in samples[position].captions]
    text_features, rows = encode_texts(model, (text for _, text in captions), options, protocol.unit, cache)
    rows = torch.tensor(rows, device=features.device)
    owners = torch.tensor([i for i, _ in captions], device=features.device)
    captioned = Captioned(features, text_features, rows, owners)
    found, ranked = retrieve(captioned, model.logit_scale.to(features.device) if dual_softmax else None)
    seen, queries = [samples[i] for i in kept], [caption for _, caption in captions]
    return _Found(
        found["metrics"],
        _counts(samples, kept) | found["protocol"],
        partial(describe_retrieval, captioned, ranked, seen, queries),
        Features(features, seen, text_features, [{"text": text} for text in dict.fromkeys(queries)]),
    )


def _counts(samples: Sequence[Sample], kept: Sequence[int]) -> dict[str, int]:
    return {"samples": len(kept), "skipped_samples": len(samples) - len(kept)}


def _protocol(model, protocol: EvalProtocol, dataset: DatasetConfig, identity: str, options: EncodeOptions):
    """What must agree before two results can be compared."""
    modality = protocol.reader.modality
    return {
        "split": dataset.split,
        "limit": dataset.limit,
        "data_sha256": identity,
        "missing_samples": count_missing(dataset),
        "input_shape": list(modality.input_shape),
        "inputs": to_dict(modality),
        "frames": modality.input_shape[1],
        "caption_source": dataset.caption_source,
        **protocol.describe(),
        "ties": "count against the model",
        "precision": options.precision,
        "batch_size": options.batch_size,
        "text_fingerprint": model.text_fingerprint(),
        "versions": {"languagebind": __version__, "torch": torch.__version__},
    }
