"""Comparisons between modalities: read a YAML file, and match the samples of the modalities by their keys.

docs/evaluation_pairs.md explains the keys of the file; others are as in `datasets.py`. The key of a sample is its `id`
in a manifest if it has one, and webdataset's key in shards. Otherwise the key is the path (as in the manifest, or below
the folder) up to the first dot of the file's name.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator
from pydantic.dataclasses import dataclass

from ... import configs
from ...config import UserError
from ...hub.encoders import TEXT
from ...modalities import Modality
from . import datasets
from .datasets import ClassNames, DatasetConfig, FileName, NotEmpty, Published, Templates, read_values
from .samples import Sample, check_data, list_files, list_samples
from .shards import list_shards
from .validation import CONFIG, Number, must_be, refuse, unknown, validate

# `retrieve` ranks captions and samples; here queries take the captions' place
NAMES = {"text_to_modality": "query_to_gallery", "modality_to_text": "gallery_to_query"}
LISTED = 5


def renamed(metric: str) -> str:
    """Return `query_to_gallery/R@1` for `text_to_modality/R@1`."""
    direction, slash, name = metric.partition("/")
    return NAMES[direction] + slash + name


METRICS = datasets.METRICS | {"retrieval": tuple(map(renamed, datasets.METRICS["retrieval"]))}
# With larger or smaller weights, rounding could drop a part of the fusion
Weight = Annotated[Number, must_be(lambda x: 1e-3 <= abs(x) <= 1e3, "from 0.001 to 1000, or the negative of that")]
Weights = Annotated[Mapping[str, Weight], BeforeValidator(lambda x: {x: 1.0} if isinstance(x, str) else x)]


@dataclass(frozen=True, config=CONFIG)
class PairsConfig:
    """A comparison between modalities. Paths are resolved, and text files are read."""

    name: FileName
    query: Annotated[Weights, NotEmpty]  # by modality, or text
    data: Mapping[str, DatasetConfig]  # by modality, or text
    gallery: Weights = field(default_factory=dict)
    task: Literal["retrieval", "classification"] = "retrieval"
    labels: str | None = None
    class_names: ClassNames | None = None
    templates: Templates = ("{c}",)
    caption_source: str | None = None
    split: str | None = None
    language: str = "en"
    metric: str | None = None
    source: str | None = None
    published: tuple[Published, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        both, retrieval = self.query.keys() & self.gallery.keys(), self.task == "retrieval"
        named = f"data should name {', '.join(self.used)}, but names {', '.join(self.data) or 'nothing'}"
        mistakes = {
            f"{', '.join(both)} is on both sides, where each sample would find itself": both,
            "retrieval needs a gallery, and classification has none": retrieval != bool(self.gallery),
            "classification needs class_names, and retrieval has none": retrieval == bool(self.class_names),
            "classification needs a modality besides text in its query": not retrieval and set(self.query) == {TEXT},
            unknown("metric", self.metric, METRICS[self.task]): self.metric not in (None, *METRICS[self.task]),
            named: self.data.keys() != self.used.keys(),
            f"labels is {self.labels!r}, which is not in the query": self.labels not in (None, *self.query),
        }
        refuse(mistakes)
        return self

    @property
    def used(self) -> dict[str, float]:
        """The weights of the modalities on both sides."""
        return {**self.query, **self.gallery}


def load_pairs_config(path: str | Path, data_root: Path | None = None, there: bool = True) -> PairsConfig:
    """Return the comparison of a YAML file or a name. Its data is below `data_root`, or below the file's own folder.

    Raises `UserError` if a file or (with `there`) the data is missing, or if a key or value is wrong.
    """
    path = configs.find(path, "comparison")
    values, folders = read_values(path, data_root)
    if isinstance(values.get("data"), dict):
        shared: dict[str, Any] = {key: values[key] for key in ("name", "caption_source", "source") if key in values}
        shared["data_root"] = data_root
        # Only retrieval reads captions, so the other data need no caption source
        values["data"] = {
            name: shared | {"data": place, "task": "retrieval" if name == TEXT else "classification"}
            for name, place in values["data"].items()
        }
    config = validate(PairsConfig, values, str(path), folders)
    for data in config.data.values() if there else ():
        check_data(data)
    return config


def match_samples(
    config: PairsConfig, modalities: Mapping[str, Modality], skip_bad: bool
) -> tuple[dict[str, list[Sample]], int]:
    """Return the samples that all modalities have, in the same order, and the number of samples without a partner.

    Raises `UserError` if a sample lacks a partner and `skip_bad` is off, no keys match, or a modality repeats a key.
    """
    default = next(iter(modalities.values()))  # any modality can list the texts, since no media are read
    listed = {name: _by_key(config, name, modalities.get(name, default)) for name in config.used}
    everything = list(dict.fromkeys(key for samples in listed.values() for key in samples))
    keys = [key for key in everything if all(key in samples for samples in listed.values())]
    if not keys:
        examples = ", ".join(f"{next(iter(samples))!r} of {name}" for name, samples in listed.items())
        problem = f"{', '.join(listed)} have no key in common; the first keys are {examples}"
        raise UserError(f"{config.name}: {problem}. Set `id` in the manifests to match samples")
    missing = [f"{key} has no {name}" for key in everything for name in listed if key not in listed[name]]
    unpaired = len(everything) - len(keys)
    if missing and not skip_bad:
        more = [f"... and {len(missing) - LISTED} more"] if len(missing) > LISTED else []
        count = f"{unpaired} of {len(everything)} samples lack a partner (--skip-bad leaves them out):"
        raise UserError("\n  ".join([f"{config.name}: {count}", *missing[:LISTED], *more]))
    return {name: [samples[key] for key in keys] for name, samples in listed.items()}, unpaired


def sample_key(sample: Sample, in_shard: bool) -> str:
    """Return the key by which a sample is matched."""
    if sample.id is not None:
        return sample.id
    if in_shard:
        return sample.key.partition("/")[2]
    path = PurePosixPath(sample.key)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def sample_labels(config: PairsConfig, samples: Mapping[str, Sequence[Sample]]) -> list[Sample]:
    """Return the samples of the modality whose labels are used: `labels` in the config, or the first with labels.

    Raises `UserError` if two modalities have different labels and the config does not choose, or a label is missing.
    """
    labelled = {name: samples[name] for name in config.query if any(sample.labels for sample in samples[name])}
    names = [config.labels] if config.labels else list(labelled)
    if not names or names[0] not in labelled:
        raise UserError(f"{config.name}: the data of {', '.join(names or config.query)} has no labels")
    first = labelled[names[0]]
    for name in names[1:]:
        for one, other in zip(first, labelled[name], strict=True):
            if one.labels != other.labels:
                labels = f"the labels {one.labels} in {names[0]}, but {other.labels} in {name}"
                raise UserError(f"{config.name}: {one.key} has {labels}; choose with `labels: MODALITY`")
    if odd := [sample for sample in first if len(sample.labels) != 1]:
        raise UserError(f"{config.name}: {odd[0].key} has {len(odd[0].labels)} labels, but needs exactly one")
    return list(first)


def _by_key(config: PairsConfig, name: str, modality: Modality) -> dict[str, Sample]:
    """Return the samples of one modality by key. For text, only samples with captions are returned."""
    data = config.data[name]
    in_shard = bool(list_shards(data.data))
    is_folder = os.path.isdir(data.data) and not in_shard  # with or without class folders
    found: dict[str, Sample] = {}
    for sample in list_files(Path(data.data)) if is_folder else list_samples(data, modality):
        if name == TEXT and not sample.captions:
            continue
        key = sample_key(sample, in_shard)
        if key in found:
            raise UserError(f"{config.name}: {found[key].key} and {sample.key} of {name} have the same key, {key!r}")
        found[key] = sample
    if not found:
        raise UserError(f"{config.name}: no {'captions' if name == TEXT else 'samples'} in {data.data}")
    return found
