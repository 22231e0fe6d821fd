"""Read samples from VIDAL's annotation, a table, JSON lines, or class folders.

Each source is a dataclass with the options of the source. Its method `samples` streams the input.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import UserError
from .tables import Format, as_list, columns_of, read_manifest
from .vidal import CAPTION_SOURCES, media_paths, read_annotation


@dataclass(frozen=True)
class Sample:
    """One sample before its media are read.

    `media` lists the possible locations of each modality's media, best first. A location is one file, or all frames.
    """

    id: str
    media: dict[str, list[list[Path]]]
    captions: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Vidal:
    """VIDAL-10M: an annotation file, and media in VIDAL's folders."""

    annotation: Path
    """Annotation file, JSON: {youtube_id: {folder, raw, mplug, polish_mplug, sound_mplug, ofa}}."""
    root: Path
    """Folder that contains VIDAL's folders."""
    modality: tuple[str, ...]
    """Modalities to pack. A sample must have all of them."""
    num_samples: int | None = None
    """Number of entries to read from the start of the file. By default, all."""

    def samples(self) -> Iterator[Sample]:
        """Yield a sample per entry, in file order."""
        for sample_id, entry in read_annotation(self.annotation, self.num_samples):
            folder = str(entry.get("folder", ""))
            media = {name: media_paths(self.root, sample_id, folder, name) for name in self.modality}
            captions = {source: text for source, text in entry.items() if source != "folder" and text}
            yield Sample(sample_id, media, captions)


@dataclass(frozen=True)
class Jsonl:
    """JSON lines: {"path": file or [frames], "caption" or "captions", and optionally "id" and "label" or "labels"}."""

    manifest: Path
    """File that lists the samples."""
    root: Path
    """Base folder for the paths in the manifest."""
    modality: tuple[str, ...]
    """Modalities to pack. With several, each has a column (or key) with its name instead of `path`."""

    def samples(self) -> Iterator[Sample]:
        """Yield a sample per row."""
        for where, row in read_manifest(self.manifest, self._format()):
            captions = {name: row[name] for name in ("caption", *CAPTION_SOURCES) if row.get(name)}
            if isinstance(several := row.get("captions"), dict):
                captions |= several
            elif several:
                captions["caption"] = as_list(captions.get("caption")) + as_list(several)
            columns = {name: name if len(self.modality) > 1 or name in row else "path" for name in self.modality}
            if absent := [column for column in columns.values() if not row.get(column)]:
                raise UserError(f"{where}: {absent[0]!r} is missing or empty; the columns are {columns_of(row)}")
            paths = {name: as_list(row[column]) for name, column in columns.items()}
            sample_id = str(row.get("id") or Path(next(iter(paths.values()))[0]).with_suffix(""))
            media = {name: [[self.root / path for path in files]] for name, files in paths.items()}
            labels = [str(label) for label in as_list(row.get("labels") or row.get("label") or [])]
            yield Sample(sample_id, media, captions, labels)

    def _format(self) -> Format:
        return Format("jsonl")


@dataclass(frozen=True)
class Csv(Jsonl):
    """A table with the columns `path`, `caption` or any caption source, and optionally `id` and `label`.

    The columns `captions` and `labels` hold several values, separated by `|`.
    """

    separator: str = ","
    r"""Column separator. Use `\t` for a tab."""

    def _format(self) -> Format:
        return Format("csv", separator=self.separator.replace("\\t", "\t"))


@dataclass(frozen=True)
class Folder:
    """Class folders. The name of a class folder is the label and the caption of each file in it."""

    root: Path
    """Folder that contains the class folders."""
    modality: tuple[str, ...]
    """Modality of the files. Only one is possible."""

    def samples(self) -> Iterator[Sample]:
        """Yield a sample per file or folder of frames, in the order of class and name."""
        if len(self.modality) != 1:
            raise UserError("class folders contain only one modality; pass one --modality")
        if not self.root.is_dir():
            raise UserError(f"no such folder: {self.root}")
        for folder in sorted(path for path in self.root.iterdir() if path.is_dir()):
            for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
                captions = {"caption": folder.name.replace("_", " ")}
                sample_id = f"{folder.name}/{path.name if path.is_dir() else path.stem}"
                yield Sample(sample_id, {self.modality[0]: [[path]]}, captions, [folder.name])


SOURCES = {"vidal": Vidal, "csv": Csv, "jsonl": Jsonl, "folder": Folder}
