"""What to evaluate on: one small YAML file a dataset.

    name: nyu_v2                        # of the result; default: the file's name
    task: classification                # classification | multilabel | retrieval
    data: Depth/nyuv2/data/val          # a folder of class folders, a .csv or .jsonl manifest, or shards
    split: val                          # for the record
    templates: templates/depth.txt      # one prompt a line with {c} for the class; default: the bare class name
    class_names: [bathroom, bedroom]    # or a file, one a line, `label` or `label<TAB>name`; or `label: name` lines

Data is looked for under the data root where there is one, else beside the YAML file; text files beside the YAML
file first. `samples.py` says what the three kinds of data look like.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import UserError, load_yaml
from ..remote import is_url

TASKS = ("classification", "multilabel", "retrieval")


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset with its prompts, paths resolved and text files read."""

    name: str
    task: str
    data: str  # a path, or a brace pattern of shards
    class_names: Mapping[str, str] | None = None  # label -> name in prompts, in class order; None: the class folders
    templates: tuple[str, ...] = ("{c}",)
    split: str = "test"
    language: str = "en"
    caption_source: str | None = None  # which captions, where the samples hold several sources
    limit: int | None = None  # this many samples, evenly spaced over the data
    data_root: str | None = None  # where the paths in a manifest are looked for, after the manifest's own folder

    def __post_init__(self):
        if self.task not in TASKS:
            raise UserError(f"{self.name}: task {self.task!r} is not one of {', '.join(TASKS)}")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(f"the dataset name {self.name!r} becomes a file name: use letters, digits and _ . -")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"{self.name}: limit should be at least 1")
        if self.class_names is not None and not self.class_names:
            raise UserError(f"{self.name}: class_names is empty")
        if not self.templates:
            raise UserError(f"{self.name}: templates is empty")
        for template in self.templates:
            if "{c}" not in template:
                raise UserError(f"{self.name}: the template {template!r} has no {{c}} for the class name")


def load_dataset_config(path: Path, data_root: Path | None = None) -> DatasetConfig:
    """The dataset that a YAML file describes.

    Raises:
        UserError: the file or one that it names is missing, or a key or a value is wrong.
    """
    path = Path(path)
    values = load_yaml(path)
    known = [field.name for field in dataclasses.fields(DatasetConfig) if field.name != "data_root"]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {nearest[0]!r}?" if nearest else f", expected {', '.join(known)}"
            raise UserError(f"{path}: unknown key {key!r}{hint}")
    missing = [key for key in ("task", "data") if not values.get(key)]
    if missing:
        raise UserError(f"{path}: no {' and no '.join(missing)}")
    for key in ("name", "task", "data", "split", "language", "caption_source", "limit"):
        _texts([values[key]] if values.get(key) is not None else [], f"{path}: {key}")
    folders = (path.parent, *([Path(data_root)] if data_root else []))
    values = {"name": path.stem} | {key: value for key, value in values.items() if value is not None}
    values["data"] = "::".join(part if is_url(part) else str(folders[-1] / part) for part in values["data"].split("::"))
    if "templates" in values:
        values["templates"] = _templates(values["templates"], path, folders)
    if "class_names" in values:
        values["class_names"] = _class_names(values["class_names"], path, folders)
    if "limit" in values:
        values["limit"] = _int(values["limit"], f"{path}: limit")
    return DatasetConfig(**values, data_root=str(data_root) if data_root else None)


def _templates(value: Any, path: Path, folders: tuple[Path, ...]) -> tuple[str, ...]:
    if isinstance(value, str) and "{c}" not in value:
        value = _read_lines(value, path, folders)
    return tuple(_texts([value] if isinstance(value, str) else value, f"{path}: templates"))


def _class_names(value: Any, path: Path, folders: tuple[Path, ...]) -> dict[str, str]:
    where = f"{path}: class_names"
    if isinstance(value, str):
        value = _read_lines(value, path, folders)
    if isinstance(value, dict):
        return dict(zip(_texts(value, where), _texts(value.values(), where), strict=True))
    pairs = [line.split("\t", 1) for line in _texts(value, where)]
    labels = [pair[0].strip() for pair in pairs]
    if len(set(labels)) < len(labels):
        raise UserError(f"{where}: {next(label for label in labels if labels.count(label) > 1)!r} is there twice")
    return {label: pair[-1].strip() for label, pair in zip(labels, pairs, strict=True)}


def _texts(values: Any, where: str) -> list[str]:
    """Text as it is; YAML reads a bare yes, no or null as something else, and that must not become a class name."""
    if isinstance(values, bool):
        raise UserError(f"{where}: {values!r} is not a list of texts")
    for value in values:
        if not isinstance(value, str):
            raise UserError(f"{where}: {value!r} is not text, put it in quotes")
    return list(values)


def _read_lines(name: str, path: Path, folders: tuple[Path, ...]) -> list[str]:
    """The lines of a text file that a config names, without blank ones."""
    files = [folder / name for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{path}: no such file: {' nor '.join(map(str, files))}")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not any(lines):
        raise UserError(f"{file} is empty")
    return [line for line in lines if line]


def _int(value: str, where: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{where}: {value!r} is not a whole number") from error
