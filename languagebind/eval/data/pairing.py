"""What is compared between modalities: a YAML file, and the samples of each modality matched by their keys.

    name: depth_infrared            # of the result; default: the file's name
    task: retrieval                 # retrieval | classification
    query: depth                    # a modality, `text`, or a fusion: {depth: 1.0, text: 0.5}, weights may be negative
    gallery: infrared               # retrieval alone: another modality or fusion
    data:                           # of every modality named above; several may name the same data
      depth: shards/test            # a folder of files or class folders, a .csv or .jsonl manifest, or shards
      infrared: shards/test
      text: shards/test             # read for its captions alone
    caption_source: ofa             # where the samples hold captions of several sources
    labels: depth                   # classification: whose labels count, where those of the query's data differ
    class_names: names.txt          # classification: as in an evaluation's config, and so are the templates
    templates: templates.txt
    split: test                     # for the record
    metric: query_to_gallery/R@1    # the one to quote; and `source`, `published`: as in an evaluation's config

The key of a sample: in a manifest its `id`, where it has one; in shards what webdataset takes for it; else the path
(as the manifest has it, or below the folder) up to the first dot of the file's name.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...config import UserError, load_yaml
from ...files import files_below
from ...hub.encoders import TEXT
from ...modalities import Modality
from . import datasets
from .datasets import DIRECTIONS, DatasetConfig, read_class_names, read_templates, resolve
from .samples import Sample, check_data, list_samples
from .shards import list_shards
from .values import published_figures, refuse_unknown

TASKS = ("retrieval", "classification")
# `retrieve` ranks captions and samples; here the captions' place is the query's.
NAMES = dict(zip(DIRECTIONS, ("query_to_gallery", "gallery_to_query"), strict=True))


def renamed(metric: str) -> str:
    """`text_to_modality/R@1` to `query_to_gallery/R@1`."""
    way, slash, name = metric.partition("/")
    return NAMES[way] + slash + name


METRICS = datasets.METRICS | {"retrieval": tuple(map(renamed, datasets.METRICS["retrieval"]))}
LISTED = 5
# Of a weight, but for its sign: beyond these a fusion is rounded to one of its parts, or to nothing.
SMALLEST, LARGEST = 1e-3, 1e3


@dataclass(frozen=True)
class PairsConfig:
    """What a YAML file says, with the paths resolved and the text files read."""

    name: str
    query: Mapping[str, float]  # modality, or text -> weight
    data: Mapping[str, DatasetConfig]  # by modality, or text
    gallery: Mapping[str, float] = dataclasses.field(default_factory=dict)
    task: str = "retrieval"
    labels: str | None = None
    class_names: Mapping[str, str] | None = None
    templates: tuple[str, ...] = ("{c}",)
    caption_source: str | None = None
    split: str = "test"
    language: str = "en"
    metric: str | None = None
    source: str | None = None
    published: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self):
        if self.task not in TASKS:
            raise UserError(f"{self.name}: task {self.task!r} is not one of {', '.join(TASKS)}")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(f"the name {self.name!r} becomes a file name: use letters, digits and _ . -")
        if both := self.query.keys() & self.gallery.keys():
            raise UserError(f"{self.name}: {min(both)} is on both sides, where each sample would find itself")
        if (self.task == "retrieval") != bool(self.gallery):
            raise UserError(f"{self.name}: retrieval needs a gallery, classification has none")
        if (self.task == "classification") != bool(self.class_names):
            raise UserError(f"{self.name}: classification needs class_names, retrieval has none")
        refuse_unknown([self.metric] if self.metric else [], METRICS[self.task], self.name, "metric")
        if self.data.keys() != self.used.keys():
            raise UserError(
                f"{self.name}: data should name {', '.join(self.used)}, and names {', '.join(self.data) or 'nothing'}"
            )
        if self.labels is not None and self.labels not in self.query:
            raise UserError(f"{self.name}: labels is {self.labels!r}, which is not in the query")

    @property
    def used(self) -> dict[str, float]:
        """The weights of both sides."""
        return {**self.query, **self.gallery}


def load_pairs_config(path: Path, data_root: Path | None = None, there: bool = True) -> PairsConfig:
    """The comparison that a YAML file describes; data is looked for below the root, by default beside the file.

    Args:
        path: the YAML file.
        data_root: where its data is looked for.
        there: False does not ask whether it is there.

    Raises:
        UserError: the file, its data or what it names is missing, or a key or a value is wrong.
    """
    path = Path(path)
    values = {"name": path.stem} | {key: value for key, value in load_yaml(path).items() if value is not None}
    refuse_unknown(values, [field.name for field in dataclasses.fields(PairsConfig)], str(path))
    for key in ("query", "data"):
        if not values.get(key):
            raise UserError(f"{path}: no {key}")
    for key in values.keys() - {"query", "gallery", "data", "class_names", "templates", "published"}:
        if not isinstance(values[key], str):
            raise UserError(f"{path}: {key} {values[key]!r} is not text, put it in quotes")
    folders = (path.parent, *([Path(data_root)] if data_root else []))
    for side in ("query", "gallery"):
        if side in values:
            values[side] = _weights(values[side], f"{path}: {side}")
    if not isinstance(values["data"], dict) or not all(isinstance(place, str) for place in values["data"].values()):
        raise UserError(f"{path}: data should be `modality: path` lines")
    values["data"] = {
        name: DatasetConfig(
            name=values["name"],
            # Captions are read for retrieval alone: of other data, nobody needs to say which source is meant.
            task="retrieval" if name == TEXT else "classification",
            data=resolve(place, folders[-1]),
            caption_source=values.get("caption_source"),
            source=values.get("source"),
            data_root=str(data_root) if data_root else None,
        )
        for name, place in values["data"].items()
    }
    if "templates" in values:
        values["templates"] = read_templates(values["templates"], path, folders)
    if "class_names" in values:
        first = next(iter(values["data"].values()))
        values["class_names"] = read_class_names(values["class_names"], path, folders, first)
    if "published" in values:
        values["published"] = published_figures(values["published"], f"{path}: published")
    config = PairsConfig(**values)
    for data in config.data.values() if there else ():
        check_data(data)
    return config


def match_samples(
    config: PairsConfig, modalities: Mapping[str, Modality], skip_bad: bool
) -> tuple[dict[str, list[Sample]], int]:
    """The samples that all the modalities have, in the same order in each, and how many lack a partner.

    Raises:
        UserError: a sample lacks a partner and `skip_bad` is off, no two match, or two of a modality have one key.
    """
    anyone = next(iter(modalities.values()))  # lists texts as well as another would, as no media is read
    listed = {name: _by_key(config, name, modalities.get(name, anyone)) for name in config.used}
    first = next(iter(listed.values()))
    keys = [key for key in first if all(key in samples for samples in listed.values())]
    everything = list(dict.fromkeys(key for samples in listed.values() for key in samples))
    if not keys:
        examples = ", ".join(f"{next(iter(samples))!r} of {name}" for name, samples in listed.items())
        raise UserError(
            f"{config.name}: no key is in all of {', '.join(listed)}; the first are {examples}."
            " In a manifest, `id` says what belongs together"
        )
    missing = [f"{key} has no {name}" for key in everything for name in listed if key not in listed[name]]
    unpaired = len(everything) - len(keys)
    if missing and not skip_bad:
        lines = "".join(f"\n  {line}" for line in missing[:LISTED])
        more = f"\n  ... and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise UserError(
            f"{config.name}: {unpaired} of {len(everything)} samples lack a partner (--skip-bad goes on without"
            f" them):{lines}{more}"
        )
    return {name: [samples[key] for key in keys] for name, samples in listed.items()}, unpaired


def sample_key(sample: Sample, in_shard: bool) -> str:
    """What a sample is matched by."""
    if sample.id is not None:
        return sample.id
    if in_shard:
        return sample.key.partition("/")[2]
    path = PurePosixPath(sample.key)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def sample_labels(config: PairsConfig, samples: Mapping[str, Sequence[Sample]]) -> list[Sample]:
    """The samples of one modality of the query: those whose labels are the right classes.

    Raises:
        UserError: the labels of two modalities differ, and the config does not say which count; or one is missing.
    """
    labelled = {name: samples[name] for name in config.query if any(sample.labels for sample in samples[name])}
    names = [config.labels] if config.labels else list(labelled)
    if not names or names[0] not in labelled:
        raise UserError(f"{config.name}: the data of {', '.join(names or config.query)} holds no labels")
    for name in names[1:]:
        for one, other in zip(labelled[names[0]], labelled[name], strict=True):
            if one.labels != other.labels:
                raise UserError(
                    f"{config.name}: {one.key} is {one.labels} by {names[0]} and {other.labels} by {name}: say whose"
                    " labels count with `labels: ...`"
                )
    for sample in labelled[names[0]]:
        if len(sample.labels) != 1:
            raise UserError(f"{config.name}: {sample.key} has {len(sample.labels)} labels, it needs one")
    return list(labelled[names[0]])


def _by_key(config: PairsConfig, name: str, modality: Modality) -> dict[str, Sample]:
    data = config.data[name]
    in_shard = bool(list_shards(data.data))
    folder = Path(data.data)
    samples = _folder(folder) if folder.is_dir() and not in_shard else list_samples(data, modality)
    found: dict[str, Sample] = {}
    for sample in samples:
        if name == TEXT and not sample.captions:
            continue  # no text, as a sample that is not there
        key = sample_key(sample, in_shard)
        if key in found:
            raise UserError(f"{config.name}: {found[key].key} and {sample.key} of {name} have the same key, {key!r}")
        found[key] = sample
    if not found:
        raise UserError(f"{config.name}: no {'captions' if name == TEXT else 'samples'} in {data.data}")
    return found


def _folder(folder: Path) -> list[Sample]:
    """Every file below a folder; the first folder on the way to it is its label."""
    paths = [(file, file.relative_to(folder)) for file in files_below(folder)]
    return [Sample(path.as_posix(), file, path.parts[:-1][:1]) for file, path in paths]


def _weights(value: Any, where: str) -> dict[str, float]:
    if isinstance(value, str):
        return {value: 1.0}
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where} should be a modality, or `modality: weight` lines, not {value!r}")
    found = {}
    for name, weight in value.items():
        try:
            found[name] = float(weight)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: the weight of {name}, {weight!r}, is not a number") from error
        if not SMALLEST <= abs(found[name]) <= LARGEST:
            size = f"of {SMALLEST:g} to {LARGEST:g} but for its sign"
            raise UserError(f"{where}: the weight of {name} should be a number other than 0, {size}, not {weight}")
    return found
