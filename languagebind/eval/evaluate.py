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
from .cache import FeatureCache, open_cache
from .data.datasets import DatasetConfig, naming
from .data.readers import EvalProtocol, Reader, choose_protocol
from .data.samples import Sample, class_names, count_missing, digest_of_samples, read_samples, warn_of_count
from .export import Features, export_features
from .features import EncodeOptions, build_classifier, class_prompts, encode_samples, encode_texts
from .score.retrieval import Captioned, describe_retrieval, retrieve
from .score.statistics import settings
from .score.zero_shot import classify, describe_classification, describe_multilabel, label_targets

log = logging.getLogger(__name__)

PROBED_SAMPLES = 16  # enough to tell files of another modality from a damaged file


@dataclass(frozen=True)
class ListedDataset:
    """A dataset and its samples. `check_dataset` lists them once, for any number of evaluations."""

    config: DatasetConfig
    samples: list[Sample]


@dataclass(frozen=True)
class _Work:
    """What to encode, and with what."""

    model: Any
    protocol: EvalProtocol
    dataset: DatasetConfig
    samples: list[Sample]
    options: EncodeOptions
    cache: FeatureCache | None


# What a task adds: metrics and protocol, a function that computes everything else, which takes longer, and the features
_Found = tuple[dict[str, Any], Callable[[], dict[str, Any]], Features]


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

    Where torch.distributed is initialised, every rank must call this. Each encodes its share, and all get the result.

    Args:
        model: a `DualEncoder`, or any other `languagebind.eval.models.Model`; its mode is restored.
        modality: how the model's inputs are read.
        dataset: what to evaluate on. A `ListedDataset`, which `check_dataset` returns, is not listed again.
        statistics: also compute intervals, classes, curves and examples, which training leaves out.
        dual_softmax: for retrieval, also compute the metrics of the dual softmax, named `dual_softmax/...`.
        export: write the features to this file, .safetensors or .parquet, see `export_features`.
        **options: fields of `EncodeOptions`: batch_size, workers, precision, device, skip_bad, feature_cache.

    Returns:
        The contents of the result file: dataset, model, pretrained (None here), task, metrics, language and protocol.
        `statistics` adds intervals and how they are made, ties and examples; classes for both kinds of classification;
        confusion and calibration where each sample has one class; curves for retrieval.

    Raises:
        UserError: the data is missing or incomplete, a label is not a class, a sample cannot be read, or the model
            returns NaN or infinity.
    """
    encoding = EncodeOptions(**options)
    listed, dataset = (dataset, dataset.config) if isinstance(dataset, ListedDataset) else (None, dataset)
    protocol = _choose(dataset, modality)
    _check_support(model, protocol, dataset, encoding, dual_softmax, export)
    samples = listed.samples if listed else read_samples(dataset, modality)
    identity = digest_of_samples([[x.key, x.labels, x.captions] for x in samples], dataset.name)
    log.info("%s: %s on %d samples", dataset.name, dataset.task, len(samples))
    cache = open_cache(encoding.feature_cache, model, dataset.name, protocol, encoding.precision)
    work = _Work(model, protocol, dataset, samples, encoding, cache)
    with naming(dataset.name):
        found, describe, features = (
            _retrieval(work, dual_softmax) if dataset.task == "retrieval" else _classification(work)
        )
    if export is not None and not rank():
        export_features(features, export)
    result = {
        "dataset": dataset.name,
        "model": modality_name(modality),
        "pretrained": None,
        "task": dataset.task,
        "metrics": found["metrics"],
        "language": dataset.language,
        "protocol": _protocol(work, identity) | found["protocol"],
    }
    return result | ({"statistics": settings()} | describe() if statistics else {})


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
        raise UserError(f"{dataset.name} is {dataset.modality}, but the model reads {modality_name(modality)}")
    with naming(dataset.name):
        return choose_protocol(dataset.protocol, dataset.paper, dataset.clip, modality, dataset.clips, dataset.crops)


def _check_support(
    model, protocol: EvalProtocol, dataset: DatasetConfig, options: EncodeOptions, dual_softmax: bool,
    export: Path | None,
) -> None:  # fmt: skip
    """Raise `UserError` where the protocol or the model cannot do what is asked for."""
    reader, cached = protocol.reader, options.feature_cache is not None
    takes_files, unit_only = getattr(model, "takes_files", False), not hasattr(model, "project")
    one_each = protocol.unit and (reader.views == 1 or reader.pooled)
    own_rule = type(reader) is not Reader or reader.clip is not None
    faults = {
        "the dual softmax needs cosines, which this protocol does not use": dual_softmax and not protocol.unit,
        "this protocol does not have one unit-norm feature a sample to export": export is not None and not one_each,
        "this model has only unit-norm features, unlike the paper's similarity": unit_only and not protocol.unit,
        "this model reads files itself, so the dataset's own reading rule cannot be used": takes_files and own_rule,
        "--feature-cache does not work with models that read files themselves": cached and takes_files,
        "--feature-cache: give the model a `fingerprint` that changes with its weights": (
            cached and not getattr(model, "known", True)
        ),
    }
    for fault, found in faults.items():
        if found:
            raise UserError(f"{dataset.name}: {fault}")


def _classification(work: _Work) -> _Found:
    model, protocol, dataset, samples = work.model, work.protocol, work.dataset, work.samples
    classes = class_names(dataset)
    warn_of_count(dataset, "classes", len(classes))
    # (N, K), and before anything is encoded, so that a wrong label stops the run at once
    targets = label_targets(samples, classes, dataset.name)
    names = list(classes.values())
    if len(set(names)) < len(names):
        log.warning("%s: several classes have the same name, so they always tie", dataset.name)
    features, kept = encode_samples(model, protocol.reader, samples, work.options, cache=work.cache)
    seen = [samples[i] for i in kept]
    classifier = build_classifier(model, names, dataset.templates, work.options, work.cache)
    scores, logits = protocol.class_scores(features, classifier, model.logit_scale)
    targets = targets[kept].to(features.device)  # (N, K), as the scores
    found = classify(scores, targets, dataset.task)
    prompts = class_prompts(names, dataset.templates)
    found["protocol"] = _counts(samples, kept) | {
        "templates": list(dataset.templates), "prompts": len(prompts), "prompts_sha256": digest(prompts),
    } | found["protocol"]  # fmt: skip
    if dataset.task == "multilabel":
        describe = partial(describe_multilabel, scores, targets, classes, seen)
    else:
        describe = partial(describe_classification, scores, targets, logits, classes, seen)
    texts = [{"label": label, "text": name} for label, name in classes.items()]
    return found, describe, Features(features, seen, classifier, texts)


def _retrieval(work: _Work, dual_softmax: bool) -> _Found:
    model, unit, samples = work.model, work.protocol.unit, work.samples
    features, kept = encode_samples(model, work.protocol.reader, samples, work.options, unit, work.cache)
    captions = [(i, caption) for i, position in enumerate(kept) for caption in samples[position].captions]
    text_features, rows = encode_texts(model, (text for _, text in captions), work.options, unit, work.cache)
    owners = torch.tensor([i for i, _ in captions], device=features.device)
    captioned = Captioned(features, text_features, torch.tensor(rows, device=features.device), owners)
    found, ranked = retrieve(captioned, model.logit_scale.to(features.device) if dual_softmax else None)
    seen, queries = [samples[i] for i in kept], [caption for _, caption in captions]
    found["protocol"] = _counts(samples, kept) | found["protocol"]
    texts = [{"text": text} for text in dict.fromkeys(queries)]
    describe = partial(describe_retrieval, captioned, ranked, seen, queries)
    return found, describe, Features(features, seen, text_features, texts)


def _counts(samples: Sequence[Sample], kept: Sequence[int]) -> dict[str, int]:
    return {"samples": len(kept), "skipped_samples": len(samples) - len(kept)}


def _protocol(work: _Work, identity: str) -> dict[str, Any]:
    """Return what must agree before two results can be compared."""
    modality, dataset = work.protocol.reader.modality, work.dataset
    return {
        "split": dataset.split,
        "limit": dataset.limit,
        "data_sha256": identity,
        "missing_samples": count_missing(dataset),
        "input_shape": list(modality.input_shape),
        "inputs": to_dict(modality),
        "frames": modality.input_shape[1],
        "caption_source": dataset.caption_source,
        **work.protocol.describe(),
        "ties": "count against the model",
        "precision": work.options.precision,
        "batch_size": work.options.batch_size,
        "text_fingerprint": work.model.text_fingerprint(),
        "versions": {"languagebind": __version__, "torch": torch.__version__},
    }
