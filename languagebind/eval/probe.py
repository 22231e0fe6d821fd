"""Linear probe and few-shot: languagebind probe --model PATH --config NAME --train A --test B"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import UserError, at_least, package, run, to_dict
from ..hub.checkpoint import checkpoint_name
from ..modalities import Modality, modality_name
from .cache import weights_digest
from .command import CommandOptions, evaluate_each, parse_command
from .data.datasets import DatasetConfig, load_dataset_config, naming
from .data.readers import choose_protocol
from .data.samples import check_data, class_names, digest_of_samples, read_samples
from .features import EncodeOptions, FeatureEncoder
from .models import Model, checkpoint_of, load_eval_model
from .results import Result, new_result, result_path
from .score.linear import HELD_OUT, HELD_OUT_SHOTS, Labelled, check_shots, probe
from .score.segmentation import POINTS, take_points
from .score.zero_shot import label_targets, single_labels


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(CommandOptions):
    """Fit a linear classifier to the features of a checkpoint on labelled data."""

    model: str
    """a training checkpoint, a run's folder, a folder in the published layout, or a hub id"""
    modality: str | None = None
    """modality to probe of a run of several"""
    config: Path
    """name or YAML file of a classification dataset, for its class names; its `data` is not read"""
    train: str
    """data to fit the probe to: class folders, a manifest or shards"""
    test: str
    """data to score, of the same kinds"""
    shots: tuple[int, ...] = ()
    """numbers of samples per class for additional few-shot probes"""
    seeds: int = 3
    """number of random draws of the shots and of the held-out part"""
    dense: bool = False
    """classify points of pictures by the features of patches; the data are for segmentation"""
    data_root: Path | None = None
    """second folder for the paths in a manifest, after the manifest's own folder"""

    def __post_init__(self):
        at_least(1, seeds=self.seeds, shots=min(self.shots, default=None))
        if os.path.realpath(self.train) == os.path.realpath(self.test):
            raise UserError(f"--train and --test are both {self.train}: use different data to test on")


def evaluate_probe(
    model: Model, modality: Modality, parts: Mapping[str, DatasetConfig], options: ProbeOptions, encode: EncodeOptions
) -> Result:
    """Return the contents of the result file. `parts` has the keys train and test. Every rank must call this.

    Raises `UserError` if the data is wrong, a sample cannot be read, or there are too few samples for the shots.
    """
    classes = class_names(parts["train"])
    samples = {name: read_samples(part, modality) for name, part in parts.items()}
    data, facts, labels = {}, {}, {}
    if not options.dense:
        targets = {name: label_targets(samples[name], classes, part.name) for name, part in parts.items()}
        labels = {name: single_labels(target).numpy() for name, target in targets.items()}
        with naming(parts["train"].data):
            check_shots(labels["train"], options.shots, list(map(repr, classes)))  # before anything is encoded
    test = parts["test"]  # the training part is read in the same way
    encoder = FeatureEncoder(model, choose_protocol("ours", None, test.clip, modality), encode, test.name)
    for name, part in parts.items():
        if options.dense:
            x, kept = encoder.map_samples(samples[name], part, lambda x: x, take_points, POINTS)
            x = x.flatten(0, 1)[x[..., -1].flatten() != part.void].double()
            data[name] = Labelled(x[:, :-1].numpy(), x[:, -1].long().numpy())
        else:
            features, kept = encoder.encode_samples(samples[name])
            data[name] = Labelled(features.double().cpu().numpy(), labels[name][kept])
        counts = {"samples": len(kept), "skipped_samples": len(samples[name]) - len(kept)}
        identity = digest_of_samples([[sample.key, sample.labels] for sample in samples[name]], part.name)
        facts[name] = counts | {"data_sha256": identity} | ({"clip": list(part.clip)} if part.clip else {})
    found, details = probe(data["train"], data["test"], len(classes), options.shots, options.seeds)
    details = {} if options.dense else details  # points of one picture are alike: intervals would be too narrow
    settings = encoder.describe()
    found["protocol"] = {
        "probe": "logistic regression (L-BFGS, L2) on unit-norm features of the shared space",
        **({"points": POINTS} if options.dense else {}),
        "C_chosen_on": f"{HELD_OUT} of the training data; of k shots min(k, {HELD_OUT_SHOTS}) others a class",
        "seeds": options.seeds,
        "shots": list(options.shots),
        **facts["test"],
        "train": facts["train"],
        "split": test.split,
        "input_shape": list(modality.input_shape),
        "inputs": to_dict(modality),
        "ties": "count against the model",
        "precision": settings["precision"],
        "versions": settings["versions"],
        **found["protocol"],
    }
    return new_result(test, modality_name(modality), found, details) | {"dataset": f"{test.name}_probe"}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_command(ProbeOptions, argv, "probe")
    package("sklearn", "a probe", "'languagebind[eval]'")  # fail before encoding if scikit-learn is missing
    dataset = load_dataset_config(options.config, options.data_root)
    wanted = "segmentation" if options.dense else "classification"
    if dataset.task != wanted:
        raise UserError(f"{options.config}: a probe needs a dataset for {wanted}, not {dataset.task}")
    dataset = replace(dataset, data_root=str(options.data_root) if options.data_root else None, expect={})
    parts = {"train": replace(dataset, data=options.train, limit=None), "test": replace(dataset, data=options.test)}
    for part in parts.values():
        check_data(part)
    class_names(parts["train"])
    name = checkpoint_name(options.model)

    def evaluate(loaded: tuple[Model, Modality], encode: EncodeOptions) -> Result:
        identity = {"checkpoint": checkpoint_of(options.model), "weights_sha256": weights_digest(loaded[0])}
        return evaluate_probe(*loaded, parts, options, encode) | {"pretrained": name} | identity

    path = result_path(options.output, f"{dataset.name}_probe", name)
    evaluate_each(options, lambda device: load_eval_model(options.model, device, options.modality), [(path, evaluate)])


if __name__ == "__main__":
    run(main)
