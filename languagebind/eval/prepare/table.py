"""Any dataset that is a table and media files, described in YAML.

    prepare:
      kind: table
      table: MSRVTT_JSFUSION_test.csv          # .csv .tsv .json .jsonl .pkl .txt; `format` if the extension is wrong
      key: video_id                            # the column that names a sample, or a pattern as in `media`;
                                               # default: `key`, an entry's name in a mapping
      media: MSRVTT_Videos/{video_id}.*        # any columns, and {key}; `.*` any extension, `**/` any folders
      caption: sentence                        # or several columns; a column may hold a list, of texts or of words
      label: category                          # or `labels`, split at `labels_separator`
      columns: [id, start, label, split]       # of a table without a header
      comment: "#"                             # starts lines in front of the table
      encoding: latin-1                        # default UTF-8
      records: sentences                       # the key of a JSON object that holds the records
      where: {split: test}                     # rows to take: a value, or a list of them
      split_list: test_list.txt                # keys to take, a .txt or .json list; each must be in the table
      match: {PredictionString: '(n\\d+)'}      # the part of a column to use
      repeats: true                            # several rows make a sample
      join: paragraph                          # the captions of a sample are one text
      classes: {table: classes.csv, label: mid, name: display_name}   # a table of the classes, in order

If a mapping or a list holds plain values, their column is `value`.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, model_validator

from ...config import UserError
from ...data.tables import KEY, Format, Record, columns_of, read_list, read_records, require
from ...files import files_below, is_plain
from ..data.validation import CONFIG
from .writing import Row


def _one_group(pattern: re.Pattern[str]) -> re.Pattern[str]:
    if pattern.groups != 1:
        raise ValueError(f"{pattern.pattern!r} should have one group, the part to use")
    return pattern


Columns = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Match = Annotated[re.Pattern[str], AfterValidator(_one_group)]


class Classes(BaseModel):
    """A table of the classes and its columns."""

    model_config = CONFIG

    table: str
    label: str
    name: str | None = None


class Options(BaseModel):
    """The options above."""

    model_config = CONFIG

    table: str
    media: str
    key: str = KEY
    caption: Columns = ()
    label: str | None = None
    labels: str | None = None
    labels_separator: str = ","
    format: str | None = None
    columns: Columns = ()
    comment: str | None = None
    encoding: str = Format.encoding
    records: str | None = None
    where: dict[str, Columns] = {}
    split_list: str | None = None
    match: dict[str, Match] = {}
    repeats: bool = False
    join: Literal["paragraph"] | None = None
    classes: Classes | None = None

    @model_validator(mode="after")
    def _is_annotated(self) -> "Options":
        if not (self.caption or self.label or self.labels):
            raise ValueError("name the column of the caption, the label or the labels")
        return self


def prepare(source: Path, output: Path, options: Options) -> Iterator[Row]:
    """Yield the manifest's rows, in the order of the table; paths are below `source`, where the media stay.

    Raises:
        UserError: a row, or a list of the split, is wrong; with file and line.
    """
    media = MediaFinder(source, options.media)
    samples: dict[str, Row] = {}
    for where, key, record in _selected(source, options):
        row = {"where": where, "path": media.find(record | {"key": key}, where)} | _annotation(record, options, where)
        if key not in samples:
            samples[key] = row
        elif options.repeats:
            _add(samples[key], row)
        else:
            raise UserError(f"{where}: {key!r} is listed twice, first at {samples[key]['where']}")
    for row in samples.values():
        if options.join:
            row["captions"] = [_text(" ".join(filter(None, row["captions"])), "the paragraph", row["where"])]
        yield row


def class_names(source: Path, options: Options) -> dict[str, str] | None:
    """Return label -> name for prompts, in order, of a dataset with a table of its classes."""
    if options.classes is None:
        return None
    columns = options.classes.label, options.classes.name or options.classes.label
    names: dict[str, str] = {}
    for where, record in read_records(source / options.classes.table, Format()):
        require(record, columns, where)
        label, name = (str(record[column]).strip() for column in columns)
        if label in names:
            raise UserError(f"{where}: the class {label!r} is listed twice")
        names[label] = name
    return names


def _selected(source: Path, options: Options) -> Iterator[tuple[str, str, Record]]:
    """Yield (place, key, record) of the rows that `where` and `split_list` select."""
    table = Format(options.format, options.columns, options.comment, options.encoding, options.records)
    key_pattern = options.key if "{" in options.key else f"{{{options.key}}}"
    in_table = dict.fromkeys(read_list(source / options.split_list, Format()) if options.split_list else [], False)
    taken = False
    for where, record in read_records(source / options.table, table):
        require(record, [*options.where, *options.match], where)
        if any(str(record[column]) not in values for column, values in options.where.items()):
            continue
        taken = True
        record |= {column: _part(pattern, str(record[column]), where) for column, pattern in options.match.items()}
        key = _text(_fill(key_pattern, record, where), options.key, where)
        if key in in_table:
            in_table[key] = True
        elif options.split_list:
            continue
        yield where, key, record
    if options.where and not taken:
        conditions = ", ".join(f"{column}: {' or '.join(values)}" for column, values in options.where.items())
        raise UserError(f"{source / options.table}: no row has {conditions} (`where` in the config)")
    if lost := [key for key, found in in_table.items() if not found]:
        count = f"{len(lost)} of {len(in_table)} names are not in {options.table}"
        raise UserError(f"{source}/{options.split_list}: {count}, as {lost[0]!r}")


def _part(pattern: re.Pattern[str], value: str, where: str) -> str:
    found = pattern.match(value)
    if not found or found[1] is None:
        raise UserError(f"{where}: {value!r} does not match {pattern.pattern!r}")
    return found[1]


def _annotation(record: Record, options: Options, where: str) -> Row:
    """Return the label, labels and captions of a record."""
    require(record, [column for column in (*options.caption, options.label, options.labels) if column], where)
    found: Row = {}
    if options.label:
        found["label"] = _text(record[options.label], options.label, where)
    if options.labels:
        values = record[options.labels]
        values = values.split(options.labels_separator) if isinstance(values, str) else values
        values = values if isinstance(values, (list, tuple)) else [values]
        found["labels"] = [_text(value, options.labels, where) for value in values]
    if options.caption:
        texts = [(text, column) for column in options.caption for text in _captions(record[column])]
        # A sentence of a paragraph may be empty; a caption is a query, and may not.
        found["captions"] = [_text(text, column, where, may_be_empty=bool(options.join)) for text, column in texts]
    return found


def _captions(value: Any) -> list[Any]:
    """Return the texts in a text, a list of texts, or a list of lists of words."""
    texts = value if isinstance(value, (list, tuple)) else [value]
    return [" ".join(map(str, text)) if isinstance(text, (list, tuple)) else text for text in texts] or [""]


def _text(value: Any, column: str, where: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, (str, int)) or isinstance(value, bool) or not is_plain(str(value)):
        raise UserError(f"{where}: {column} should be text, not {value!r}")
    text = str(value).strip()
    if not (text or may_be_empty):
        raise UserError(f"{where}: {column} is empty")
    return text


def _add(sample: Row, row: Row) -> None:
    """Add another row of the same sample."""
    for name in ("path", "label"):
        if row.get(name) != sample.get(name):
            raise UserError(f"{row['where']}: {name} {row[name]!r}, but {sample[name]!r} at {sample['where']}")
    for name in ("labels", "captions"):
        if name in row:
            sample[name] = sample[name] + row[name]


class MediaFinder:
    """Finds files below a folder by a pattern: `videos/{video_id}.mp4`.

    `.*` at the end stands for any extension, `**/` for any folders. Names that differ only in how Unicode writes an
    accented letter are the same.
    """

    def __init__(self, root: Path, pattern: str):
        self.root, self.pattern = root, pattern
        self._listings: dict[tuple[str, bool], dict[str, list[str]]] = {}

    def find(self, record: Record, where: str) -> str:
        """Return the path of a record's file below the root, or the filled-in pattern if there is no such file.

        Raises:
            UserError: the record lacks a column of the pattern, the path leaves the root, or two files match.
        """
        path = _fill(self.pattern, record, where)
        if path.startswith("/") or ".." in path.split("/") or not is_plain(path):
            raise UserError(f"{where}: {path!r} is not a path in the folder of the download")
        if not path.endswith(".*"):
            return path
        folder, deep, stem = path[:-2].rpartition("**/")
        if not deep:
            folder, _, stem = path[:-2].rpartition("/")
        found = self._listing(folder, bool(deep)).get(unicodedata.normalize("NFC", stem), [])
        if len(found) > 1:
            raise UserError(f"{where}: {' and '.join(sorted(found))} both match {path!r}; keep one")
        return found[0] if found else path

    def _listing(self, folder: str, deep: bool) -> dict[str, list[str]]:
        """Return name without extension -> paths below the root, of the files in a folder."""
        if (folder, deep) not in self._listings:
            place = self.root / folder
            names = self._listings[folder, deep] = defaultdict(list)
            listed = (files_below(place) if deep else place.iterdir()) if place.is_dir() else ()
            for file in listed:
                if not file.is_dir():
                    stem = unicodedata.normalize("NFC", file.name.rpartition(".")[0])
                    names[stem].append(file.relative_to(self.root).as_posix())
        return self._listings[folder, deep]


def _fill(pattern: str, record: Record, where: str) -> str:
    """Return a pattern with a record's columns in it. Raises UserError."""
    try:
        return pattern.format_map(record)
    except KeyError as error:
        raise UserError(f"{where}: no column {error}, it has {columns_of(record)}") from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: cannot fill in {pattern!r}: {error}") from error
