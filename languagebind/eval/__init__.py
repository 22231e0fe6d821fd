"""Zero-shot classification and retrieval: `python -m languagebind.eval`, or `evaluate` from a training loop."""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch

from .. import __version__
from ..config import UserError, to_dict
from ..modalities import DecodeError, Modality, modality_name
from .datasets import DatasetConfig, load_dataset_config, naming
from .features import EncodeOptions, encode_samples, encode_texts
from .retrieval import Captioned, describe_retrieval, retrieve
from .samples import Sample, class_names, read_samples
from .statistics import overlaps, settings
from .zero_shot import build_classifier, classify, describe_classification, describe_multilabel, label_targets

__all__ = ["DatasetConfig", "EncodeOptions", "check_dataset", "evaluate", "load_dataset_config", "overlaps"]

log = logging.getLogger(__name__)

# Enough to tell files of another modality from a damaged one.
PROBED_SAMPLES = 16


def evaluate(
    model,
    modality: Modality,
    dataset: DatasetConfig,
    *,
    statistics: bool = True,
    dual_softmax: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on a dataset. The same model and data give the same result, bit for bit.

    Where torch.distributed is initialised, every rank must call this; each encodes its share, and all get the result.

    Args:
        model: a `DualEncoder`; its mode is left as it was.
        modality: how the model's inputs are read.
        dataset: what to evaluate on.
        statistics: whether the result holds more than metrics: intervals, classes, curves, examples. Training leaves
            them out.
        dual_softmax: for retrieval, the metrics of the dual softmax too, named `dual_softmax/...`.
        **options: fields of `EncodeOptions`: batch_size, workers, precision, device, skip_bad.

    Returns:
        The result file's object: dataset, model, pretrained (None here), task, metrics, language and protocol. With
        `statistics` also intervals, statistics (how the intervals were made), ties (how many queries or samples have
        a wrong item that scores exactly as the best right one) and examples; classes for both kinds of
        classification; confusion and calibration where a sample has one class; curves for retrieval.

    Raises:
        UserError: the data is missing or incomplete, a label is no class, a sample cannot be read, or the model gives
            NaN.
    """
    encoding = EncodeOptions(**options)
    samples = read_samples(dataset, modality)
    log.info("%s: %s on %d samples", dataset.name, dataset.task, len(samples))
    with naming(dataset.name):
        if dataset.task == "retrieval":
            found, details = _retrieval(model, modality, samples, encoding, statistics, dual_softmax)
        else:
            found, details = _classification(model, modality, dataset, samples, encoding, statistics)
    result = {
        "dataset": dataset.name,
        "model": modality_name(modality),
        "pretrained": None,
        "task": dataset.task,
        "metrics": found["metrics"],
        "language": dataset.language,
        "protocol": _protocol(model, modality, dataset, samples, encoding) | found["protocol"],
    }
    return result | ({"statistics": settings()} | details if statistics else {})


def check_dataset(dataset: DatasetConfig, modality: Modality) -> None:
    """Find what would stop an evaluation: missing data, wrong labels, no captions, files of another modality.

    Raises:
        UserError: with what is wrong.
    """
    samples = read_samples(dataset, modality)
    if dataset.task != "retrieval":
        label_targets(samples, class_names(dataset), dataset.name)
    for sample in samples[:PROBED_SAMPLES]:
        try:
            modality.preprocess(sample.load(modality.input_shape[1]))
            return
        except DecodeError as error:
            reason = error
    raise UserError(f"{dataset.name}: none of the first samples can be read as {modality_name(modality)}: {reason}")


def _classification(model, modality, dataset, samples: list[Sample], options: EncodeOptions, statistics: bool):
    """Metrics and protocol, and all else in the result."""
    classes = class_names(dataset)
    # (N, K), and before anything is encoded, so that a wrong label stops the run at once.
    targets = label_targets(samples, classes, dataset.name)
    if len(set(classes.values())) < len(classes):
        log.warning("%s: several classes have the same name, so they always tie", dataset.name)
    features, kept = encode_samples(model, modality, samples, options)
    classifier = build_classifier(model, list(classes.values()), dataset.templates, options)
    scores, targets = features @ classifier.T, targets[kept].to(features.device)  # (N, K) both
    found = classify(scores, targets, dataset.task)
    prompts = [template.replace("{c}", name) for name in classes.values() for template in dataset.templates]
    details = {"templates": list(dataset.templates), "prompts": len(prompts), "prompts_sha256": _digest(prompts)}
    found["protocol"] = _counts(samples, kept) | details | found["protocol"]
    if not statistics:
        return found, {}
    seen = [samples[i] for i in kept]
    if dataset.task == "multilabel":
        return found, describe_multilabel(scores, targets, classes, seen)
    return found, describe_classification(scores, targets, model.logit_scale, classes, seen)


def _retrieval(model, modality, samples: list[Sample], options: EncodeOptions, statistics: bool, dual_softmax: bool):
    """Metrics and protocol, and all else in the result."""
    features, kept = encode_samples(model, modality, samples, options)
    captions = [(i, caption) for i, position in enumerate(kept) for caption in samples[position].captions]
    text_features, rows = encode_texts(model, (caption for _, caption in captions), options)
    rows = torch.tensor(rows, device=features.device)
    owners = torch.tensor([i for i, _ in captions], device=features.device)
    captioned = Captioned(features, text_features, rows, owners)
    found, ranked = retrieve(captioned, model.logit_scale.to(features.device) if dual_softmax else None)
    found["protocol"] = _counts(samples, kept) | found["protocol"]
    if not statistics:
        return found, {}
    seen = [samples[i] for i in kept]
    return found, describe_retrieval(captioned, ranked, seen, [caption for _, caption in captions])


def _counts(samples: Sequence[Sample], kept: Sequence[int]) -> dict[str, int]:
    return {"samples": len(kept), "skipped_samples": len(samples) - len(kept)}


def _protocol(model, modality, dataset: DatasetConfig, samples: list[Sample], options: EncodeOptions):
    """What must agree before two results can be compared."""
    return {
        "split": dataset.split,
        "limit": dataset.limit,
        "data_sha256": _digest([[sample.key, sample.labels, sample.captions] for sample in samples]),
        "input_shape": list(modality.input_shape),
        "inputs": to_dict(modality),
        "frames": modality.input_shape[1],
        "caption_source": dataset.caption_source,
        "similarity": "cosine",
        "ties": "count against the model",
        "precision": options.precision,
        "text_fingerprint": model.text_fingerprint(),
        "versions": {"languagebind": __version__, "torch": torch.__version__},
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
