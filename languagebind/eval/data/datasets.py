"""What to evaluate on: one small YAML file a dataset.

    name: nyu_v2                        # of the result; default: the file's name
    task: classification                # classification | multilabel | retrieval
    modality: depth                     # of the samples; `--all` takes the datasets of the model's modality
    data: Depth/nyuv2/data/val          # a folder of class folders, a .csv or .jsonl manifest, or shards
    split: val                          # for the record; and `language`
    templates: templates/depth.txt      # one prompt a line with {c} for the class; default: the bare class name
    class_names: [bathroom, bedroom]    # or a file, one a line, `label` or `label<TAB>name`; or `label: name` lines
    metric: top1                        # the one to quote
    source: https://...                 # where to get the data; and `licence`, `layout`: what should lie where
    limit: 500                          # no more samples than this, evenly spaced
    caption_source: ofa                 # which captions, where the samples hold those of several sources
    clip: [0, 31]                       # the part of each video that counts, in seconds
    clips: 4                            # and crops: 3; of each video, whose features are averaged
    protocol: ours                      # or paper: evaluate as the original did
    paper: {inputs: seconds, similarity: dot} # how that was; {}: as ours is. protocols.py has the rules
    expect: {samples: 654, classes: 10} # and captions; `prepare` refuses other counts
    published:                          # what others report, fractions
    - {model: LanguageBind, values: {top1: 0.651}, where: Table 4}
    prepare: {kind: table, ...}         # how `python -m languagebind.eval.prepare` makes `data` of the download

Data is looked for under the data root where there is one, else beside the YAML file; text files beside the YAML
file first. `samples.py` says what the three kinds of data look like.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...config import UserError, load_yaml
from ...files import check_regular, text_lines, twice
from ...modalities import modality_names
from ...remote import is_url
from .values import (
    counts,
    find,
    paper_rules,
    published_figures,
    read_lines,
    refuse_unknown,
    seconds,
    texts,
    whole_number,
)

RECALL_AT = (1, 5, 10)
_RANKS = (*(f"R@{k}" for k in RECALL_AT), "median_rank", "mean_rank")
METRICS = {
    "classification": ("top1", "top5", "mean_per_class"),
    "multilabel": ("mAP", "mAUC", "d_prime"),
    "retrieval": tuple(f"{way}/{name}" for way in ("text_to_modality", "modality_to_text") for name in _RANKS),
}
DIRECTIONS = ("text_to_modality", "modality_to_text")


TASKS = ("classification", "multilabel", "retrieval")
PROTOCOLS = ("ours", "paper")
SHARDS, TYPE = "nshards.txt", "dataset_type.txt"  # of CLIP_benchmark's folders
LONGEST_NAME = 100  # characters, as the model's name comes behind it in that of a result file
# As many entries of a folder as tell what it is.
SHOWN_ENTRIES = 8


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset with its prompts, paths resolved and text files read."""

    name: str
    task: str
    data: str  # a path, or a brace pattern of shards
    modality: str | None = None  # what the samples are, for `--all`
    class_names: Mapping[str, str] | None = None  # label -> name in prompts, in class order; None: the class folders
    templates: tuple[str, ...] = ("{c}",)
    split: str = "test"
    language: str = "en"
    caption_source: str | None = None  # which captions, where the samples hold several sources
    limit: int | None = None  # this many samples, evenly spaced over the data
    clip: tuple[float, float] | None = None  # of each video, start and end in seconds
    clips: int = 1  # of each video, and crops of each clip, whose features are averaged
    crops: int = 1
    protocol: str = "ours"
    paper: Mapping[str, str] | None = None  # rules for inputs and similarity; None: the original has no such evaluation
    metric: str | None = None  # the metric to quote, a key of the result's `metrics`
    source: str | None = None  # where to get the data
    licence: str | None = None
    layout: str | None = None  # the files that are expected below the data root
    expect: Mapping[str, int] = field(default_factory=dict)  # how many samples, captions, classes
    published: tuple[Mapping[str, Any], ...] = ()  # {model, values: {metric: fraction}, where}
    prepare: Mapping[str, Any] = field(default_factory=dict)  # kind, and the options of the kind
    data_root: str | None = None  # where the paths in a manifest are looked for, after the manifest's own folder

    def __post_init__(self):
        if self.task not in TASKS:
            raise UserError(f"{self.name}: task {self.task!r} is not one of {', '.join(TASKS)}")
        if not re.fullmatch(rf"[\w.-]{{1,{LONGEST_NAME}}}", self.name):
            message = f"becomes a file name: use letters, digits and _ . -, {LONGEST_NAME} at most"
            raise UserError(f"the dataset name {self.name[: 2 * LONGEST_NAME]!r} {message}")
        for key in ("limit", "clips", "crops"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"{self.name}: {key} should be at least 1")
        refuse_unknown([self.metric] if self.metric else [], METRICS[self.task], self.name, "metric")
        if self.protocol not in PROTOCOLS:
            raise UserError(f"{self.name}: protocol {self.protocol!r} is not one of {', '.join(PROTOCOLS)}")
        if self.protocol == "paper" and self.paper is None:
            raise UserError(f"{self.name}: there is no paper protocol, as its config has no `paper: ...`; use ours")
        misfits = {"inputs": "views"} if self.task != "classification" else {}
        misfits |= {"similarity": "dot"} if self.task != "retrieval" else {}
        for key, rule in misfits.items():
            if (self.paper or {}).get(key) == rule:
                raise UserError(f"{self.name}: paper: {key}: {rule} is not for {self.task}")
        if self.clip is not None and not 0 <= self.clip[0] < self.clip[1] < math.inf:
            raise UserError(f"{self.name}: clip {list(self.clip)} should be a start and a later end, in seconds")
        if self.class_names is not None and not self.class_names:
            raise UserError(f"{self.name}: class_names is empty")
        if not self.templates:
            raise UserError(f"{self.name}: templates is empty")
        for template in self.templates:
            if "{c}" not in template:
                raise UserError(f"{self.name}: the template {template!r} has no {{c}} for the class name")

    @property
    def result_name(self) -> str:
        """What a result file's name starts with: results of the two protocols lie side by side."""
        return self.name if self.protocol == "ours" else f"{self.name}_{self.protocol}"


def load_dataset_config(path: Path, data_root: Path | None = None, prepared: bool = True) -> DatasetConfig:
    """The dataset that a YAML file describes.

    Args:
        path: the YAML file.
        data_root: where its data is looked for; default: beside it.
        prepared: False leaves a missing file of class names unread, as it may have to be prepared yet.

    Raises:
        UserError: the file or one that it names is missing, or a key or a value is wrong.
    """
    path = Path(path)
    values = load_yaml(path)
    known = [field.name for field in dataclasses.fields(DatasetConfig) if field.name != "data_root"]
    refuse_unknown(values, known, str(path))
    missing = [key for key in ("task", "data") if not values.get(key)]
    if missing:
        raise UserError(f"{path}: no {' and no '.join(missing)}")
    values = {"name": path.stem} | {key: value for key, value in values.items() if value is not None}
    numbers = ("limit", "clips", "crops")
    words = ("name", "task", "data", "modality", "split", "language", "caption_source", "metric", "protocol")
    for key in (*words, *numbers, "source", "licence", "layout"):
        texts([values[key]] if key in values else [], f"{path}: {key}")
    refuse_unknown([values["modality"]] if "modality" in values else [], modality_names(), str(path), "modality")
    folders = (path.parent, *([Path(data_root)] if data_root else []))
    values["data"] = resolve(values["data"], folders[-1])
    if "templates" in values:
        values["templates"] = read_templates(values["templates"], path, folders)
    values |= {key: whole_number(values[key], f"{path}: {key}") for key in numbers if key in values}
    if "clip" in values:
        values["clip"] = seconds(values["clip"], f"{path}: clip")
    if "paper" in values:
        values["paper"] = paper_rules(values["paper"], f"{path}: paper")
    if "expect" in values:
        values["expect"] = counts(values["expect"], f"{path}: expect")
    if "published" in values:
        values["published"] = published_figures(values["published"], f"{path}: published")
    if not isinstance(values.get("prepare", {}), dict):
        raise UserError(f"{path}: prepare should be `kind: ...` and the options of the kind")
    config = DatasetConfig(**values | {"class_names": None}, data_root=str(data_root) if data_root else None)
    config = fill_in(config)
    names = values.get("class_names")
    if names is None or (not prepared and isinstance(names, str) and find(names, folders) is None):
        return config
    return replace(config, class_names=read_class_names(names, path, folders, config))


def resolve(data: str, folder: Path) -> str:
    """A path, or several joined by `::`, as seen from a folder; URLs stay as they are."""
    return "::".join(part if is_url(part) else str(folder / part) for part in data.split("::"))


def not_there(config: DatasetConfig, missing: Path) -> UserError:
    """What to say of a dataset that lacks a file or folder: what is there, what should be, and where to get it."""
    folder = next(folder for folder in missing.absolute().parents if os.path.isdir(folder))
    entries = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if entry.name[0] != ".")
    more = f" and {len(entries) - SHOWN_ENTRIES} more" if len(entries) > SHOWN_ENTRIES else ""
    lines = [
        f"{config.name}: {missing} does not exist",
        f"found: {folder} holds {', '.join(entries[:SHOWN_ENTRIES]) or 'nothing'}{more}",
    ]
    if config.layout:
        lines.append("expected: " + config.layout.strip().replace("\n", "\n    "))
    if config.source:
        lines.append(f"get it from: {config.source.strip()}")
    if config.prepare:
        lines.append("then: python -m languagebind.eval.prepare CONFIG.yaml --source DOWNLOAD --output DATA_ROOT")
    return UserError("\n  ".join(lines))


@contextmanager
def naming(dataset: str) -> Iterator[None]:
    """Have a `UserError` say which dataset it is about, where it does not yet."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(f"{dataset}: "):
            raise
        raise UserError(f"{dataset}: {error}") from error


def read_templates(value: Any, path: Path, folders: tuple[Path, ...]) -> tuple[str, ...]:
    """The `templates` of a config: a list, one, or the name of a file of them. Raises UserError."""
    if isinstance(value, dict):
        raise UserError(f"{path}: templates should be a list of texts, not `key: value` lines")
    if isinstance(value, str) and "{c}" not in value:
        value = read_lines(value, path, folders)
    return tuple(texts([value] if isinstance(value, str) else value, f"{path}: templates"))


def read_class_names(value: Any, path: Path, folders: tuple[Path, ...], config: DatasetConfig) -> dict[str, str]:
    """The `class_names` of a config, label -> name: a mapping, a list, or the name of a file. Raises UserError."""
    where = f"{path}: class_names"
    if isinstance(value, str):
        # One that `prepare` writes is missing because the dataset is.
        if config.prepare and find(value, folders) is None:
            raise not_there(config, folders[-1] / value)
        value = read_lines(value, path, folders)
    if isinstance(value, dict):
        pairs = list(zip(texts(value, where), texts(value.values(), where), strict=True))
    else:
        lines = [line.split("\t", 1) for line in texts(value, where)]
        pairs = [(line[0].strip(), line[-1].strip()) for line in lines]
    if label := twice(label for label, _ in pairs):
        raise UserError(f"{where}: {label!r} is there twice")
    for label, name in pairs:
        if not label.strip() or not name.strip():
            raise UserError(f"{where}: the class {label!r}: {name!r} needs a label and a name")
    return dict(pairs)


def task_of(folder: Path, split: str = "test") -> str:
    """The task of such a folder.

    Raises:
        UserError: it is none.
    """
    if not (folder / split / SHARDS).is_file():
        raise UserError(f"{folder} is no webdataset folder of CLIP_benchmark: it has no {split}/{SHARDS}")
    task = " ".join(_lines(folder / TYPE)).strip().lower() if (folder / TYPE).is_file() else TASKS[0]
    if task not in TASKS:
        raise UserError(f"{folder / TYPE} holds {task!r}, expected one of {', '.join(TASKS)}")
    return task


def fill_in(config: "DatasetConfig") -> "DatasetConfig":
    """The config as it is, unless its data is such a folder: then with its shards, and the classes and templates that
    the config itself does not give.

    Raises:
        UserError: the folder is damaged, or of another task.
    """
    folder = Path(config.data)
    # Unlike Path's, this is False of a name that is too long.
    if is_url(config.data) or not os.path.isfile(folder / config.split / SHARDS):
        return config
    if task_of(folder, config.split) != config.task:
        raise UserError(f"{config.name}: {folder} is for {task_of(folder, config.split)}, not for {config.task}")
    count = " ".join(_lines(folder / config.split / SHARDS)).strip()
    if not count.isdecimal() or len(count) > 6 or int(count) < 1:
        raise UserError(f"{folder / config.split / SHARDS} should hold the number of shards, not {count!r}")
    config = replace(config, data=str(folder / config.split / f"{{0..{int(count) - 1}}}.tar"))
    if config.task == "retrieval":
        return config
    if config.class_names is None:
        # By their numbers, as some datasets have two classes of one name.
        names = _lines(folder / "classnames.txt")
        if "" in names:
            place = f"{folder / 'classnames.txt'}:{names.index('') + 1}"
            raise UserError(f"{place}: a blank line in front of a name: a class's label is the number of its line")
        config = replace(config, class_names={str(number): name for number, name in enumerate(names)})
    templates = folder / "zeroshot_classification_templates.txt"
    # What the config itself gives is another object than the default, even where it is equal to that.
    if config.templates is type(config).templates and templates.is_file():
        config = replace(config, templates=tuple(filter(None, _lines(templates))))
    return config


def _lines(file: Path) -> list[str]:
    """Its lines, without blank ones at the end."""
    try:
        check_regular(file)
        lines = text_lines(file.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    return lines
