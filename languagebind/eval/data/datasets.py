"""Configs of the datasets to evaluate on: one small YAML file per dataset. Those in configs/eval also have names.

DATASETS.md explains the keys. `data` is a path below the data root, or below the YAML file's folder by default. Text
files may be in either folder. `samples.py` describes the three kinds of data.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from ... import configs
from ...config import UserError, load_yaml
from ...files import as_on_disk, is_plain, text_lines, twice
from ...modalities import modality_names
from ...remote import is_url
from .readers import Clip4Clip, Paper
from .validation import CONFIG, Columns, Count, Number, Whole, must_be, refuse, unknown, validate

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("text_to_modality", "modality_to_text")
_RANKS = (*(f"R@{k}" for k in RECALL_AT), "median_rank", "mean_rank")
METRICS = {
    "classification": ("top1", "top5", "mean_per_class"),
    "multilabel": ("mAP", "mAUC", "d_prime"),
    "segmentation": ("mIoU", "pixel_accuracy", "pointing"),
    "retrieval": tuple(f"{direction}/{name}" for direction in DIRECTIONS for name in _RANKS),
}
NOT_FRACTIONS = ("_rank", "d_prime", "threshold")  # endings of metrics
SHARDS = "nshards.txt"  # in CLIP_benchmark's folders
NAME = re.compile(r"[\w.-]{1,100}")  # short, because a result's file name also holds the model's name
SHOWN_ENTRIES = 8  # entries of a folder that a message lists


def _read(value: Any, info: ValidationInfo) -> Any:
    """Return the non-blank lines of the text file that a config names. Other values are returned unchanged."""
    if not isinstance(value, str):
        return value
    if "{c}" in value:  # a template, not a file
        return [value]
    folders = info.context or (Path(),)
    if file := find(value, folders):
        return [line for line in _lines(file) if line]
    raise UserError(f"no such file: {' nor '.join(str(folder / value) for folder in folders)}")


def _by_label(value: Any, info: ValidationInfo) -> Any:
    """Return the mapping label -> name of `label` or `label<TAB>name` lines."""
    lines = _read(value, info)
    if not isinstance(lines, (list, tuple)):
        return lines
    if not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{lines!r} should hold only text: put yes, no and null in quotes")
    pairs = [[part.strip() for part in line.split("\t", 1)] for line in lines]
    if label := twice(pair[0] for pair in pairs):
        raise ValueError(f"{label!r} is listed twice")
    return {pair[0]: pair[-1] for pair in pairs}


def _resolve(data: str, info: ValidationInfo) -> str:
    """Return a path, or several joined by `::`, below the data root. URLs are returned unchanged."""
    if not info.context:
        return data
    return "::".join(part if is_url(part) else str(info.context[-1] / part) for part in data.split("::"))


def _are_fractions(values: Mapping[str, float]) -> bool:
    return all(0 <= value <= 1 or key.endswith(NOT_FRACTIONS) for key, value in values.items())


NotEmpty = Field(min_length=1)
FromPath = BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)
Text = Annotated[str, NotEmpty]
FileName = Annotated[str, must_be(NAME.fullmatch, "a file name: at most 100 letters, digits and _ . -")]
ModalityName = Annotated[str, must_be(modality_names().__contains__, f"one of {', '.join(modality_names())}")]
Template = Annotated[str, must_be(lambda text: "{c}" in text, "a prompt with {c} for the class name")]
Templates = Annotated[tuple[Template, ...], NotEmpty, BeforeValidator(_read), FromPath]
ClassNames = Annotated[Mapping[Text, Text], NotEmpty, BeforeValidator(_by_label), FromPath]
Interval = Annotated[tuple[Number, Number], must_be(lambda t: 0 <= t[0] < t[1], "a start and a later end, in seconds")]
Column = Literal["path", "caption", "captions", "label", "labels", "mask", "id"]
Counted = Literal["samples", "captions", "classes"]
Counts = Mapping[Counted, Annotated[Whole, Field(ge=0)]]
Figures = Annotated[Mapping[str, Number], NotEmpty, must_be(_are_fractions, "fractions of 1, not percentages")]


class Published(TypedDict):
    """Results that others report, and the place where they report them."""

    model: str
    values: Figures
    where: str


@dataclass(frozen=True, config=CONFIG)
class DatasetConfig:
    """A dataset with its prompts. Paths are resolved, and text files are read."""

    name: FileName
    task: Literal["classification", "multilabel", "retrieval", "segmentation"]
    data: Annotated[Text, FromPath, AfterValidator(_resolve)]  # a path, or a brace pattern of shards
    modality: ModalityName | None = None
    class_names: ClassNames | None = None  # label -> name in prompts, in class order; None: the class folders
    templates: Templates = ("{c}",)
    void: Whole = 255  # value in masks of pixels without a class
    split: str | None = None
    language: str = "en"
    caption_source: str | None = None
    relevant: Literal["sample", "caption"] | None = None  # None: sample, as in results that do not say
    limit: Count | None = None
    clip: Interval | None = None
    clips: Count = 1
    crops: Count = 1
    protocol: Literal["ours", "paper", "clip4clip"] = "ours"
    paper: Paper | None = None  # None: the original has no such evaluation
    clip4clip: Clip4Clip | None = None
    metric: str | None = None  # a key of the result's `metrics`
    source: str | None = None
    licence: str | None = None
    layout: str | None = None
    expect: Counts = field(default_factory=dict)
    columns: Mapping[Column, Columns] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    prepare: Mapping[str, Any] = field(default_factory=dict)  # `kind`, and the kind's own options
    data_root: Annotated[str | None, FromPath] = None  # second folder for a manifest's paths: --data-root

    @model_validator(mode="after")
    def _check(self) -> Self:
        rules = self.paper or Paper()
        inputs, dot, theirs = rules.get("inputs"), rules.get("similarity") == "dot", self.protocol != "ours"
        absent = theirs and getattr(self, self.protocol) is None
        scored = self.task == "retrieval" and self.relevant != "caption"
        mistakes = {
            unknown("metric", self.metric, METRICS[self.task]): self.metric not in (None, *METRICS[self.task]),
            f"there is no {self.protocol} protocol, as the config has no `{self.protocol}`: use ours": absent,
            "segmentation needs class_names: masks hold their indices": self.task == "segmentation"
            and self.class_names is None,
            "paper: inputs: views is for classification": inputs == "views" and self.task != "classification",
            "paper: similarity: dot is for retrieval": dot and self.task != "retrieval",
            f"paper: inputs: {inputs} cannot be used with clip": self.clip and inputs in ("views", "picture"),
            "clips and crops belong to our protocol alone": theirs and self.clips * self.crops > 1,
            "clip4clip is for retrieval, without `relevant: caption`": self.clip4clip and not scored,
        }
        refuse(mistakes)
        return self


def load_dataset_config(path: str | Path, data_root: Path | None = None, prepared: bool = True) -> DatasetConfig:
    """Return the dataset of a YAML file, or of a name such as nyu_v2. `data` is below `data_root` or the file's folder.

    If `prepared` is false, the file of class names may be missing, because `prepare` may write it later. Raises
    `UserError` if the file or a file that it names is missing, or if a key or value is wrong.
    """
    path = configs.find(path, "dataset")
    values, folders = read_values(path, data_root)
    names = values.get("class_names")
    missing = isinstance(names, str) and find(names, folders) is None
    if missing:
        del values["class_names"]
    values["data_root"] = data_root
    where = f"{path} (a recipe of training, not a dataset)" if "model" in values else str(path)
    config = validate(DatasetConfig, values, where, folders)
    if missing and prepared:
        raise not_there(config, folders[-1] / str(names))
    facts = _benchmark(Path(config.data), config.split or "test", given=values)
    if facts.get("task", config.task) != config.task:
        raise UserError(f"{path}: {config.data} is for {facts['task']}, not {config.task}")
    return validate(DatasetConfig, vars(config) | facts, config.data)


def load_folder(folder: Path) -> DatasetConfig:
    """Return the dataset in a webdataset folder in CLIP_benchmark's layout. Raises `UserError` if it is not one."""
    if not (facts := _benchmark(folder, "test")):
        raise UserError(f"{folder} is not a webdataset folder of CLIP_benchmark: it has no test/{SHARDS}")
    return validate(DatasetConfig, {"name": folder.absolute().name} | facts, str(folder))


def read_values(path: Path, data_root: Path | None) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Return the keys with values in a YAML file, and the base folders for its paths."""
    values = {"name": path.stem} | {key: value for key, value in load_yaml(path).items() if value is not None}
    if "data_root" in values:
        raise UserError(f"{path}: unknown key 'data_root': use --data-root")
    return values, (path.parent, *([Path(data_root)] if data_root else []))


def find(name: str, folders: tuple[Path, ...]) -> Path | None:
    """Return the path of the file `name` in the first folder that has it, or None."""
    files = (as_on_disk(folder / name) for folder in folders)
    return next((file for file in files if os.path.isfile(file)), None)  # unlike Path.is_file, False for overlong names


def not_there(config: DatasetConfig, missing: Path) -> UserError:
    """Return the error for a missing file or folder. It says what was found, what is expected and where to get it."""
    folder = next(folder for folder in missing.absolute().parents if os.path.isdir(folder))
    entries = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if entry.name[0] != ".")
    more = f" and {len(entries) - SHOWN_ENTRIES} more" if len(entries) > SHOWN_ENTRIES else ""
    lines = [
        f"{config.name}: {missing} does not exist",
        f"found: {folder} holds {', '.join(entries[:SHOWN_ENTRIES]) or 'nothing'}{more}",
        config.layout and "expected: " + config.layout.strip().replace("\n", "\n    "),
        None if config.data_root else "pass the folder of your data: --data-root DIR (in training, --val-data-root)",
        config.source and f"get it from: {config.source.strip()}",
        f"then: languagebind prepare {config.name} --source DOWNLOAD --output DATA_ROOT" if config.prepare else None,
    ]
    return UserError("\n  ".join(filter(None, lines)))


@contextmanager
def naming(dataset: str) -> Iterator[None]:
    """Make a `UserError` start with the dataset's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{dataset}: " + str(error).removeprefix(f"{dataset}: ")) from error


def _benchmark(folder: Path, split: str, given: Collection[str] = ()) -> dict[str, Any]:
    """Return the config keys that a CLIP_benchmark folder defines, or {}. `given` keys are not read again."""
    if not os.path.isfile(folder / split / SHARDS):
        return {}
    task, templates = folder / "dataset_type.txt", folder / "zeroshot_classification_templates.txt"
    count = " ".join(_lines(folder / split / SHARDS))
    if not count.isdecimal():
        raise UserError(f"{folder / split / SHARDS} should hold the number of shards, not {count!r}")
    facts: dict[str, Any] = {
        "task": " ".join(_lines(task)).lower() if task.is_file() else "classification",
        "data": str(folder / split / f"{{0..{int(count) - 1}}}.tar"),
    }
    if facts["task"] != "retrieval" and "class_names" not in given:
        # Labels are numbers, because some datasets have two classes of the same name
        facts["class_names"] = {str(number): name for number, name in enumerate(_lines(folder / "classnames.txt"))}
    if facts["task"] != "retrieval" and "templates" not in given and templates.is_file():
        facts["templates"] = [line for line in _lines(templates) if line]
    return facts


def _lines(file: Path) -> list[str]:
    """Return a file's lines without trailing blank lines."""
    try:
        lines = text_lines(file.read_bytes().rstrip())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    if wrong := [number for number, line in enumerate(lines, 1) if not is_plain(line)]:
        raise UserError(f"{file}:{wrong[0]} is not UTF-8: save the file as UTF-8")
    return lines
