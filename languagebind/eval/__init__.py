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
from .datasets import DatasetConfig, load_dataset_config
from .features import EncodeOptions, encode_samples, encode_texts
from .retrieval import retrieve
from .samples import Sample, class_names, read_samples
from .zero_shot import build_classifier, classify, label_targets

__all__ = ["DatasetConfig", "EncodeOptions", "check_dataset", "evaluate", "load_dataset_config"]

log = logging.getLogger(__name__)

# Enough to tell files of another modality from a damaged one.
PROBED_SAMPLES = 16


def evaluate(model, modality: Modality, dataset: DatasetConfig, **options: Any) -> dict[str, Any]:
    """Evaluate a model on a dataset. The same model and data give the same result, bit for bit.

    Where torch.distributed is initialised, every rank must call this; each encodes its share, and all get the result.

    Args:
        model: a `DualEncoder`; its mode is left as it was.
        modality: how the model's inputs are read.
        dataset: what to evaluate on.
        **options: fields of `EncodeOptions`: batch_size, workers, precision, device, skip_bad.

    Returns:
        The result file's object: dataset, model, pretrained (None here), task, metrics, language and protocol.

    Raises:
        UserError: the data is missing or incomplete, a label is no class, a sample cannot be read, or the model gives
            NaN.
    """
    encoding = EncodeOptions(**options)
    samples = read_samples(dataset, modality)
    log.info("%s: %s on %d samples", dataset.name, dataset.task, len(samples))
    run = _retrieval if dataset.task == "retrieval" else _classification
    found = run(model, modality, dataset, samples, encoding)
    return {
        "dataset": dataset.name,
        "model": modality_name(modality),
        "pretrained": None,
        "task": dataset.task,
        "metrics": found["metrics"],
        "language": dataset.language,
        "protocol": _protocol(model, modality, dataset, samples, encoding) | found["protocol"],
    }


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


def _classification(model, modality, dataset: DatasetConfig, samples: list[Sample], options: EncodeOptions):
    classes = class_names(dataset)
    # (N, K), and before anything is encoded, so that a wrong label stops the run at once.
    targets = label_targets(samples, classes, dataset.name)
    if len(set(classes.values())) < len(classes):
        log.warning("%s: several classes have the same name, so they always tie", dataset.name)
    features, kept = encode_samples(model, modality, samples, options)
    classifier = build_classifier(model, list(classes.values()), dataset.templates, options)
    found = classify(features, classifier, model.logit_scale, targets[kept], dataset.task)
    prompts = [template.replace("{c}", name) for name in classes.values() for template in dataset.templates]
    details = {"templates": list(dataset.templates), "prompts": len(prompts), "prompts_sha256": _digest(prompts)}
    return found | {"protocol": _counts(samples, kept) | details | found["protocol"]}


def _retrieval(model, modality, dataset: DatasetConfig, samples: list[Sample], options: EncodeOptions):
    features, kept = encode_samples(model, modality, samples, options)
    captions = [(i, caption) for i, position in enumerate(kept) for caption in samples[position].captions]
    text_features, rows = encode_texts(model, (caption for _, caption in captions), options)
    rows = torch.tensor(rows, device=features.device)
    owners = torch.tensor([i for i, _ in captions], device=features.device)
    found = retrieve(features, text_features, rows, owners)
    return found | {"protocol": _counts(samples, kept) | found["protocol"]}


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
