"""Linear probe and few-shot: python -m languagebind.eval.probe --model PATH --config FILE.yaml --train A --test B

`linear.py` says how the probe is fitted.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..config import UserError, parse, run, to_dict
from ..distributed import joined
from ..hub.checkpoint import checkpoint_name
from ..hub.encoders import load_model
from ..modalities import Modality, modality_name
from .cache import weights_digest
from .data.datasets import DatasetConfig, load_dataset_config, naming
from .data.readers import choose_protocol
from .data.samples import Sample, check_data, class_names, digest_of_samples, read_samples
from .features import EncodeOptions, encode_samples, open_cache
from .models import checkpoint_of
from .results import table, writable, write_result
from .score.linear import HELD_OUT, HELD_OUT_SHOTS, Labelled, check_shots, logistic_regression, probe
from .score.statistics import settings
from .score.zero_shot import label_targets, single_labels

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeOptions:
    """Fit a linear classifier to a checkpoint's features of labelled data."""

    model: str
    """a training checkpoint, a run's folder, a folder in the published layout, or a hub id"""
    config: Path
    """an evaluation's YAML file, task classification; its class names count, its data is not read"""
    train: str
    """the data to fit to: class folders, a manifest or shards"""
    test: str
    """the data to score"""
    shots: tuple[int, ...] = ()
    """also fit to so many samples of each class"""
    seeds: int = 3
    """draws of the shots and of the held-out part"""
    output: Path = Path("results")
    """folder for the result file, <config's name>_probe_<checkpoint>.json"""
    data_root: Path | None = None
    """folder that the paths in a manifest are looked for in, after the manifest's own"""
    overwrite: bool = False
    """replace a result file that exists"""
    encode: EncodeOptions = field(default_factory=EncodeOptions)

    def __post_init__(self):
        if self.seeds < 1 or any(shots < 1 for shots in self.shots):
            raise UserError("--seeds and --shots should be at least 1")
        if os.path.realpath(self.train) == os.path.realpath(self.test):
            raise UserError(f"--train and --test are both {self.train}")


def evaluate_probe(
    model, modality: Modality, parts: Mapping[str, DatasetConfig], options: ProbeOptions, encode: EncodeOptions
) -> dict[str, Any]:
    """The result file's object, of the data in `parts`, train and test. Every rank must call this.

    Raises:
        UserError: the data is wrong, a sample cannot be read, or there are too few for the shots.
    """
    classes = class_names(parts["train"])
    samples = {name: read_samples(part, modality) for name, part in parts.items()}
    labels = {
        name: single_labels(label_targets(samples[name], classes, part.name)).numpy() for name, part in parts.items()
    }
    with naming(parts["train"].data):
        check_shots(labels["train"], options.shots, list(map(repr, classes)))  # before any is encoded
    read = {
        name: encode_labelled(model, modality, part, samples[name], labels[name], encode)
        for name, part in parts.items()
    }
    found, details = probe(read["train"][0], read["test"][0], len(classes), options.shots, options.seeds)
    protocol = {
        "probe": "logistic regression (L-BFGS, L2) on unit-norm features of the shared space",
        "C_chosen_on": f"{HELD_OUT} of the training data; of k shots min(k, {HELD_OUT_SHOTS}) others a class",
        "seeds": options.seeds,
        "shots": list(options.shots),
        **read["test"][1],
        "train": read["train"][1],
        "split": parts["test"].split,
        "input_shape": list(modality.input_shape),
        "inputs": to_dict(modality),
        "ties": "count against the model",
        "precision": encode.precision,
        "versions": {"languagebind": __version__, "torch": torch.__version__},
    }
    return {
        "dataset": f"{parts['test'].name}_probe",
        "model": modality_name(modality),
        "pretrained": None,
        "task": "classification",
        "metrics": found["metrics"],
        "language": parts["test"].language,
        "protocol": protocol | found["protocol"],
        "statistics": settings(),
        **details,
    }


def encode_labelled(
    model,
    modality: Modality,
    dataset: DatasetConfig,
    samples: Sequence[Sample],
    labels: np.ndarray,
    options: EncodeOptions,
) -> tuple[Labelled, dict[str, Any]]:
    """Features and labels of a dataset's samples, and what the protocol says of it."""
    protocol = choose_protocol("ours", None, dataset.clip, modality)
    cache = open_cache(model, dataset.name, protocol, options)
    features, kept = encode_samples(model, protocol.reader, samples, options, cache=cache)
    counts = {"samples": len(kept), "skipped_samples": len(samples) - len(kept)}
    identity = digest_of_samples([[sample.key, sample.labels] for sample in samples], dataset.name)
    facts = counts | {"data_sha256": identity} | ({"clip": list(dataset.clip)} if dataset.clip else {})
    return Labelled(features.double().cpu().numpy(), labels[kept]), facts


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(ProbeOptions, arguments, prog="python -m languagebind.eval.probe", description=ProbeOptions.__doc__)
    logistic_regression()  # before the model has seen every sample
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    dataset = load_dataset_config(options.config, options.data_root)
    if dataset.task != "classification":
        raise UserError(f"{options.config}: a probe is a classification, not {dataset.task}")
    root = str(options.data_root) if options.data_root else None
    parts = {"train": options.train, "test": options.test}
    parts = {name: replace(dataset, data=data, data_root=root, expect={}) for name, data in parts.items()}
    parts["train"] = replace(parts["train"], limit=None)  # it is of the data that is scored
    for part in parts.values():
        check_data(part)
    class_names(parts["train"])
    name = checkpoint_name(options.model)
    path = options.output / f"{dataset.name}_probe_{name}.json"
    if path.exists() and not options.overwrite:
        raise UserError(f"{path} exists: --overwrite replaces it")
    if not writable(options.output):
        raise UserError(f"--output {options.output} cannot be written")
    with joined(options.encode.device) as process:
        model, modality = load_model(options.model, process.device)
        encode = replace(options.encode, device=str(process.device))
        identity = {"checkpoint": checkpoint_of(options.model), "weights_sha256": weights_digest(model)}
        result = evaluate_probe(model, modality, parts, options, encode) | {"pretrained": name} | identity
        if process.is_main:
            write_result(result, path)
            log.info("wrote %s", path)
            print(table([result]))


if __name__ == "__main__":
    run(main)
