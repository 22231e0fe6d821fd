"""Where samples come from: VIDAL's annotation, a table, JSON lines, or folders named by class.

Each source is a dataclass of its options with `samples()`, which goes through the input once and holds none of it.
"""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import UserError
from .vidal import CAPTION_SOURCES, captions_of, media_paths, read_annotation


@dataclass(frozen=True)
class Sample:
    """One sample before its media are read.

    `media` has for each modality the places where it may lie, best first; a place is one file, or its frames.
    """

    id: str
    media: dict[str, list[list[Path]]]
    captions: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Vidal:
    """VIDAL-10M: an annotation file, and media in VIDAL's folders."""

    annotation: Path
    """The annotation JSON: {youtube_id: {folder, raw, mplug, polish_mplug, sound_mplug, ofa}}."""
    root: Path
    """The folder that VIDAL's folders are in."""
    modality: tuple[str, ...]
    """What to put into a shard; a sample must have all of it."""
    num_samples: int | None = None
    """Only the first so many entries, as the original takes them."""

    def samples(self) -> Iterator[Sample]:
        """Each entry, in file order."""
        for sample_id, entry in read_annotation(self.annotation, self.num_samples):
            folder = str(entry.get("folder", ""))
            media = {name: media_paths(self.root, sample_id, folder, name) for name in self.modality}
            yield Sample(sample_id, media, captions_of(entry))


@dataclass(frozen=True)
class Csv:
    """A table with the columns `path`, `caption` or any caption source, and if there are any, `id` and `label`.

    Columns `captions` and `labels` hold several, separated by `|`.
    """

    manifest: Path
    """The table; its first line names the columns."""
    root: Path
    """The folder that the paths start from."""
    modality: tuple[str, ...]
    """What to put into a shard. Of several, each has a column of its name in place of `path`."""
    separator: str = ","
    r"""What stands between columns; `\t` for a tab."""

    def samples(self) -> Iterator[Sample]:
        """Each row."""
        for number, row in enumerate(self._rows(), start=2):
            captions = {name: row[name] for name in ("caption", *CAPTION_SOURCES) if row.get(name)}
            if row.get("captions"):
                captions["caption"] = row["captions"].split("|")
            row["labels"] = row["labels"].split("|") if row.get("labels") else []
            paths = _paths_of(row, self.modality, f"{self.manifest} line {number}")
            yield _sample(self.root, row, paths, captions)

    def _rows(self) -> Iterator[dict[str, str]]:
        csv.field_size_limit(sys.maxsize)
        try:
            with open(self.manifest, encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file, delimiter=self.separator.replace("\\t", "\t"))
        except OSError as error:
            raise UserError(f"cannot read {self.manifest}: {error.strerror}") from error
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{self.manifest} is no table: {error}") from error


@dataclass(frozen=True)
class Jsonl:
    """JSON lines: {"path": file or [frames], "caption" or "captions", and if there are any, "id" and "label"}."""

    manifest: Path
    """The file, one JSON object a line."""
    root: Path
    """The folder that the paths start from."""
    modality: tuple[str, ...]
    """What to put into a shard. Of several, each has a key of its name in place of `path`."""

    def samples(self) -> Iterator[Sample]:
        """Each line."""
        for number, row in self._rows():
            captions = row.get("captions", {name: row[name] for name in ("caption", *CAPTION_SOURCES) if row.get(name)})
            captions = captions if isinstance(captions, dict) else {"caption": captions}
            paths = _paths_of(row, self.modality, f"{self.manifest} line {number}")
            yield _sample(self.root, row, paths, captions)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with open(self.manifest, encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, json.loads(line)
        except OSError as error:
            raise UserError(f"cannot read {self.manifest}: {error.strerror}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{self.manifest} is no JSON lines: {error}") from error


@dataclass(frozen=True)
class Folder:
    """A folder of class folders: a file's label is its folder's name, and so is its caption."""

    root: Path
    """The folder that the class folders are in."""
    modality: tuple[str, ...]
    """What the files are; one only."""

    def samples(self) -> Iterator[Sample]:
        """Each file or folder of frames, by class and name."""
        if len(self.modality) != 1:
            raise UserError("class folders hold one modality: name one --modality")
        if not self.root.is_dir():
            raise UserError(f"no such folder: {self.root}")
        for folder in sorted(path for path in self.root.iterdir() if path.is_dir()):
            for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
                captions = {"caption": folder.name.replace("_", " ")}
                sample_id = f"{folder.name}/{path.name if path.is_dir() else path.stem}"
                yield Sample(sample_id, {self.modality[0]: [[path]]}, captions, [folder.name])


SOURCES = {"vidal": Vidal, "csv": Csv, "jsonl": Jsonl, "folder": Folder}


def _paths_of(row: dict[str, Any], modalities: tuple[str, ...], where: str) -> dict[str, Any]:
    """The value of `path`, or of the column of each modality's name."""
    columns = {name: name if len(modalities) > 1 or name in row else "path" for name in modalities}
    for column in columns.values():
        if not row.get(column):
            raise UserError(f"{where} has no {column!r}, only {sorted(str(key) for key in row)}")
    return {name: row[column] for name, column in columns.items()}


def _sample(root: Path, row: dict[str, Any], paths: dict[str, Any], captions: dict[str, Any]) -> Sample:
    frames = {name: value if isinstance(value, list) else [value] for name, value in paths.items()}
    sample_id = str(row.get("id") or Path(next(iter(frames.values()))[0]).with_suffix(""))
    labels = row.get("labels") or row.get("label") or []
    labels = [str(label) for label in labels] if isinstance(labels, list) else [str(labels)]
    return Sample(
        sample_id, {name: [[root / path for path in value]] for name, value in frames.items()}, captions, labels
    )
