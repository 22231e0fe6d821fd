"""Zero-shot classification and retrieval of one model on one dataset."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import UserError, digest, to_dict
from ..distributed import rank
from ..modalities import DecodeError, Modality, modality_name
from .data.datasets import DatasetConfig, naming
from .data.readers import EvalProtocol, Reader, choose_protocol, clip4clip_protocol
from .data.samples import Sample, class_names, count_missing, digest_of_samples, read_samples, warn_of_count
from .export import Features, export_features
from .features import EncodeOptions, FeatureEncoder, class_prompts
from .results import Result, ceiling_note, new_result
from .score.retrieval import Captioned, describe_retrieval, retrieve
from .score.segmentation import MAP, count_pixels, describe_segmentation, pick_pictures, score_segmentation, take_maps
from .score.zero_shot import classify, describe_classification, describe_multilabel, label_targets

log = logging.getLogger(__name__)

PROBED_SAMPLES = 16  # enough to distinguish files of another modality from a damaged file


@dataclass(frozen=True)
class ListedDataset:
    """A dataset with its samples, which `check_dataset` lists once for any number of evaluations."""

    config: DatasetConfig
    samples: list[Sample]


# Metrics and protocol; a function that computes everything else, which takes longer; and the features
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
) -> Result:
    """Evaluate a model on a dataset. The same model and data give the same result, bit for bit.

    If torch.distributed is initialised, every rank must call this. Each rank encodes its share, and all get the result.

    Args:
        model: a `DualEncoder`, or any other `languagebind.eval.models.Model`. Its train or eval mode is restored.
        modality: the modality that reads the model's inputs.
        dataset: the dataset to evaluate on. The samples of a `ListedDataset` are not listed again.
        statistics: also compute intervals, classes, curves and examples. Training leaves them out.
        dual_softmax: for retrieval, also compute the metrics of the dual softmax, named `dual_softmax/...`.
        export: file for the features, .safetensors or .parquet, see `export_features`.
        **options: fields of `EncodeOptions`: batch_size, workers, precision, device, skip_bad, feature_cache.

    Returns:
        The contents of the result file: dataset, model, pretrained (None here), task, metrics, language and protocol.
        `statistics` adds intervals and their settings, ties and examples. Both kinds of classification also get
        classes, single-label classification gets confusion and calibration, and retrieval gets curves.

    Raises `UserError` if data is missing or unreadable, a label is not a class, or the model returns NaN or infinity.
    """
    config = dataset.config if isinstance(dataset, ListedDataset) else dataset
    encoder = FeatureEncoder(model, _choose(config, modality), EncodeOptions(**options), config.name)
    _check_support(encoder, config, dual_softmax, export)
    samples = dataset.samples if isinstance(dataset, ListedDataset) else read_samples(config, modality)
    facts = [[x.key, x.labels, x.captions, *(mask.name for mask in x.masks)] for x in samples]
    identity = digest_of_samples(facts, config.name)
    log.info("%s: %s on %d samples", config.name, config.task, len(samples))
    usable = [sample for sample in samples if sample.captions or not sample.bad_captions]
    with naming(config.name):
        if config.task == "retrieval":
            twins, by_sample = config.relevant == "caption", encoder.protocol.by_sample
            found, describe, features = _retrieval(encoder, usable, dual_softmax, twins=twins, by_sample=by_sample)
        else:
            kind = _segmentation if config.task == "segmentation" else _classification
            found, describe, features = kind(encoder, config, samples)
    if export is not None and not rank():
        export_features(features, export)
    counts = {"samples": len(features.samples), "skipped_samples": len(samples) - len(features.samples)}
    counts["bad_captions"] = sum(sample.bad_captions for sample in samples)
    found["protocol"] = _protocol(encoder, config, identity) | counts | found["protocol"]
    return new_result(config, modality_name(modality), found, describe() if statistics else None)


def list_dataset(dataset: DatasetConfig, modality: Modality, skip_bad: bool = False) -> ListedDataset:
    """Return a dataset with its samples, without reading media; for arguments and errors see `check_dataset`."""
    samples = read_samples(dataset, modality, skip_bad)
    if dataset.task in ("classification", "multilabel"):
        label_targets(samples, class_names(dataset), dataset.name)
    return ListedDataset(dataset, samples)


def check_dataset(dataset: DatasetConfig, modality: Modality, skip_bad: bool = False) -> ListedDataset:
    """Return a dataset with its samples, for `evaluate`.

    With `skip_bad`, leave out samples without labels or captions, with a warning, and warn of missing files. Raises
    `UserError` if data is missing, a label is wrong, captions are missing, or the files are of another modality.
    """
    reader = _choose(dataset, modality).reader
    listed = list_dataset(dataset, modality, skip_bad)
    samples = listed.samples
    if skip_bad and (absent := [sample.key for sample in samples if not sample.is_there()]):
        counts = dataset.name, len(absent), len(samples), absent[0]
        log.warning("%s: the files of %d of %d samples are missing, first of %s", *counts)
    for sample in samples[:PROBED_SAMPLES]:
        try:
            reader.read(sample.load(modality.input_shape[1]))
            return listed
        except DecodeError as error:
            reason = error
    raise UserError(f"{dataset.name}: none of the first samples can be read as {modality_name(modality)}: {reason}")


def _choose(dataset: DatasetConfig, modality: Modality) -> EvalProtocol:
    if dataset.modality not in (None, modality_name(modality)):
        raise UserError(f"{dataset.name} is {dataset.modality}, but the model reads {modality_name(modality)}")
    with naming(dataset.name):
        if dataset.protocol == "clip4clip" and dataset.clip4clip:
            return clip4clip_protocol(dataset.clip4clip, dataset.clip, modality)
        return choose_protocol(dataset.protocol, dataset.paper, dataset.clip, modality, dataset.clips, dataset.crops)


def _check_support(encoder: FeatureEncoder, dataset: DatasetConfig, dual_softmax: bool, export: Path | None) -> None:
    """Raise `UserError` if the protocol or the model does not support what the user asks for."""
    model, unit, reader = encoder.model, encoder.protocol.unit, encoder.protocol.reader
    takes_files, cached = getattr(model, "takes_files", False), encoder.cache is not None
    can_project = hasattr(model, "project")
    one_each = unit and (reader.views == 1 or reader.pooled)
    unknown = cached and not getattr(model, "known", True)
    own_rule = type(reader) is not Reader or reader.clip is not None
    padded = getattr(reader.modality, "frames_per_second", 0) and getattr(model, "temporal_head", None) is None
    faults = {
        "short clips are padded, which needs a model with a temporal head (clip4clip:FILE or --temporal-head)": padded,
        "this protocol cuts texts, which this model's text tower does not support": (
            encoder.protocol.words and not (encoder.tokenizer and encoder.tokenizer.cut)
        ),
        "a model that scores pairs is for retrieval by cosine alone, without export or dual softmax": (
            encoder.pairs and (dataset.task != "retrieval" or not unit or dual_softmax or export)
        ),
        "the dual softmax needs cosines, which this protocol does not use": dual_softmax and not unit,
        "this protocol has no single unit-norm feature per sample to export": export is not None and not one_each,
        "the paper's similarity needs unnormalised features, which this model lacks": not unit and not can_project,
        "segmentation has no features to export or to cache": dataset.task == "segmentation" and (export or cached),
        "this model reads files itself, so the dataset's own reading rule cannot be used": takes_files and own_rule,
        "--feature-cache does not work with models that read files themselves": cached and takes_files,
        "--feature-cache: give the model a `fingerprint` that changes with its weights": unknown,
    }
    for fault, found in faults.items():
        if found:
            raise UserError(f"{dataset.name}: {fault}")


def _classification(encoder: FeatureEncoder, dataset: DatasetConfig, samples: Sequence[Sample]) -> _Found:
    classes = class_names(dataset)
    warn_of_count(dataset, "classes", len(classes))
    # Before anything is encoded, so that a wrong label stops the run at once
    targets = label_targets(samples, classes, dataset.name)  # (N, K)
    names = list(classes.values())
    if len(set(names)) < len(names):
        log.warning("%s: several classes have the same name, so they always tie", dataset.name)
    features, kept = encoder.encode_samples(samples)
    seen = [samples[i] for i in kept]
    classifier = encoder.build_classifier(names, dataset.templates)
    scores, logits = encoder.protocol.class_scores(features, classifier, encoder.model.logit_scale)
    targets = targets[kept].to(features.device)  # (M, K), like the scores
    found = classify(scores, targets, dataset.task)
    found["protocol"] = _prompt_facts(names, dataset) | found["protocol"]
    if dataset.task == "multilabel":
        describe = partial(describe_multilabel, scores, targets, classes, seen)
    else:
        describe = partial(describe_classification, scores, targets, logits, classes, seen)
    texts = [{"label": label, "text": name} for label, name in classes.items()]
    return found, describe, Features(features, seen, classifier, texts)


def _segmentation(encoder: FeatureEncoder, dataset: DatasetConfig, samples: Sequence[Sample]) -> _Found:
    classes = class_names(dataset)
    classifier = encoder.build_classifier(list(classes.values()), dataset.templates)
    head = partial(torch.matmul, other=classifier.T)
    counts, kept = encoder.map_samples(samples, dataset, head, partial(count_pixels, void=dataset.void))
    found = score_segmentation(counts)
    found["protocol"] = _prompt_facts(list(classes.values()), dataset) | {"dense": "qq"} | found["protocol"]
    seen = [samples[i] for i in kept]

    def describe() -> dict[str, Any]:
        draw = partial(take_maps, void=dataset.void)
        examples = pick_pictures(counts, seen, lambda chosen: encoder.map_samples(chosen, dataset, head, draw, MAP)[0])
        return describe_segmentation(counts, classes) | {"examples": examples}

    return found, describe, Features(classifier, seen, classifier, [])


def _prompt_facts(names: Sequence[str], dataset: DatasetConfig) -> dict[str, Any]:
    prompts = class_prompts(names, dataset.templates)
    return {"templates": list(dataset.templates), "prompts": len(prompts), "prompts_sha256": digest(prompts)}


def _retrieval(encoder: FeatureEncoder, samples: Sequence[Sample], dual_softmax: bool, **rules: bool) -> _Found:
    features, kept = encoder.encode_samples(samples)
    seen = [samples[i] for i in kept]
    captions = [caption for sample in seen for caption in sample.captions]
    owners = [i for i, sample in enumerate(seen) for _ in sample.captions]
    text_features, rows = encoder.encode_texts(captions)
    places = torch.tensor([rows, owners], device=features.device)
    captioned = Captioned(features, text_features, places[0], places[1], **rules, pairs=encoder.pairs)
    found, ranked = retrieve(captioned, encoder.model.logit_scale.to(features.device) if dual_softmax else None)
    if not rank() and (note := ceiling_note(found["protocol"])):
        log.warning(note)
    texts = [{"text": text} for text in dict.fromkeys(captions)]
    describe = partial(describe_retrieval, captioned, ranked, seen, captions)
    return found, describe, Features(features, seen, text_features, texts)


def _protocol(encoder: FeatureEncoder, dataset: DatasetConfig, identity: str) -> dict[str, Any]:
    """Return the settings that must agree before two results can be compared."""
    modality = encoder.protocol.reader.modality
    return {
        "split": dataset.split,
        "limit": dataset.limit,
        "expected": dict(dataset.expect),
        "data_sha256": identity,
        "missing_samples": count_missing(dataset),
        "input_shape": list(modality.input_shape),
        "inputs": to_dict(modality),
        "frames": modality.input_shape[1],
        "caption_source": dataset.caption_source,
        **encoder.protocol.describe(),
        "ties": "count against the model",
        **encoder.describe(),
    }
