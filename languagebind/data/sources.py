"""Read samples from VIDAL's annotation, a table, JSON lines, or class folders.

Each source is a dataclass with the options of the source. Its method `samples` streams VIDAL's annotation and folders.
A table is read as a whole, because the rows of a file may be anywhere in it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import UserError
from .tables import CAPTIONS, Format, Record, Renames, as_list, columns_of, read_manifest, require
from .vidal import CAPTION_SOURCES, LEFT_OUT, NEGATIVES, NOT_CAPTIONS, media_paths, read_annotation

Files = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Sample:
    """One sample before its media are read.

    `media` lists the possible locations of each modality's media, best first. A location is one file, or all frames.
    """

    id: str
    media: dict[str, list[list[Path]]]
    captions: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    group: str = ""  # samples of the same group stay together when the samples are split


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
            if LEFT_OUT in entry:  # `pack` gives the reasons
                yield Sample(sample_id, {}, {LEFT_OUT: entry[LEFT_OUT]})
                continue
            folder = str(entry.get("folder", ""))
            media = {name: media_paths(self.root, sample_id, folder, name) for name in self.modality}
            captions = {source: text for source, text in entry.items() if source not in NOT_CAPTIONS and text}
            yield Sample(sample_id, media, captions)


@dataclass(frozen=True)
class Jsonl:
    """JSON lines: {"path": file or [frames], "caption" or "captions", optionally "id", "label(s)", "negatives"}."""

    manifest: Path
    """File that lists the samples."""
    root: Path
    """Base folder for the paths in the manifest."""
    modality: tuple[str, ...]
    """Modalities to pack. With several, each has a column (or key) with its name instead of `path`."""
    columns: tuple[str, ...] = ()
    """The table's names for our columns: path=filename caption=text label=scene. Repeat caption= for several."""
    by: str | None = None
    """With --split: a column whose values, such as persons or places, are not divided between the parts."""

    def samples(self) -> Iterator[Sample]:
        """Yield a sample per file, in the order of the files' first rows. Several rows of a file are its captions."""
        rows: dict[Files, list[Record]] = defaultdict(list)
        for row, files in self._rows():
            rows[files].append(row)
        names = dict.fromkeys(name for own in rows.values() for row in own for name in row)
        if not rows:
            raise UserError(f"{self.manifest} has no rows")
        if not names.keys() & set(CAPTIONS):
            raise self._absent("caption", names, str(self.manifest))
        for files, own in rows.items():
            yield from _join([self._sample(row, files) for row in own])

    def _rows(self) -> Iterator[tuple[Record, Files]]:
        """Yield each row with its file, or its frames, of each modality."""
        for where, row in read_manifest(self.manifest, self._format(), self._renames()):
            columns = [name if len(self.modality) > 1 or name in row else "path" for name in self.modality]
            if absent := [column for column in columns if column not in row]:
                raise self._absent(absent[0], row, where)
            files = tuple(tuple(as_list(row[column])) for column in columns)
            for column, paths in zip(columns, files, strict=True):
                if not paths or not all(path and isinstance(path, str) for path in paths):
                    own = columns_of(row, self._renames())
                    raise UserError(f"{where}: {column!r} is missing or empty; the columns are {own}")
            require(row, filter(None, [self.by]), where)
            yield row, files

    def _sample(self, row: Record, files: Files) -> Sample:
        captions = {name: row[name] or "" for name in ("caption", *CAPTION_SOURCES) if name in row}
        captions |= {NEGATIVES: row[NEGATIVES]} if row.get(NEGATIVES) else {}  # not every sample needs some
        if isinstance(several := row.get("captions"), dict):
            captions |= several
        elif several:
            captions["caption"] = as_list(captions.get("caption")) + as_list(several)
        media = {name: [[self.root / path for path in paths]] for name, paths in zip(self.modality, files, strict=True)}
        numbers = {name for name in ("id", "label", "labels", self.by or "") if isinstance(row.get(name), (int, float))}
        row = row | {name: str(row[name]) for name in numbers}  # 0 is not blank
        labels = [str(label) for label in as_list(row.get("labels") or row.get("label") or [])]
        sample_id = str(row.get("id") or Path(files[0][0]).with_suffix(""))
        return Sample(sample_id, media, captions, labels, str((self.by and row[self.by]) or ""))

    def _renames(self) -> Renames:
        known = ("path", "id", "label", "labels", *CAPTIONS, NEGATIVES, *self.modality)
        renames: dict[str, list[str]] = defaultdict(list)
        for pair in self.columns:
            ours, _, theirs = pair.partition("=")
            if ours not in known or not theirs:
                raise UserError(f"--columns {pair}: write one of {', '.join(known)}, then = and the table's column")
            renames[ours].append(theirs)
        return renames

    def _absent(self, column: str, row: Iterable[str], where: str) -> UserError:
        own = columns_of(row, self._renames())
        return UserError(f"{where}: no column {column!r}, only {own}; name it with --columns {column}=COLUMN")

    def _format(self) -> Format:
        return Format("jsonl")


@dataclass(frozen=True)
class Csv(Jsonl):
    """A table with the columns `path`, `caption` or any caption source, and optionally `id` and `label`.

    The columns `captions`, `labels` and `negatives` hold several values, separated by `|`.
    """

    separator: str = ","
    r"""Column separator. A tab (`\t`) or semicolon is found."""

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


def _join(rows: list[Sample]) -> list[Sample]:
    """Return the sample of one file's rows, followed by the rows that add nothing to those before them."""
    captions, labels, twins = dict(rows[0].captions), list(rows[0].labels), []
    for row in rows[1:]:
        found = {name: as_list(captions.get(name)) for name in row.captions}
        added = {name: [x for x in as_list(row.captions[name]) if x not in found[name]] for name in found}
        captions |= {name: found[name] + texts for name, texts in added.items() if texts}
        own = [label for label in row.labels if label not in labels]
        labels += own
        if not own and not any(added.values()):
            twins.append(rows[0])
    return [replace(rows[0], captions=captions, labels=labels), *twins]


SOURCES = {"vidal": Vidal, "csv": Csv, "jsonl": Jsonl, "folder": Folder}
