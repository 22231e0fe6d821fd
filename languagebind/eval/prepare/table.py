"""Prepare any dataset with a table and media files: `prepare: {kind: table, table: list.csv, ...}`, see `Options`.

If a mapping or a list in the table's file holds plain values, their column is named `value`.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from ...config import UserError
from ...data.tables import KEY, Format, Record, columns_of, read_list, read_records, require
from ...files import as_on_disk, files_below, is_plain
from ..data.validation import CONFIG, Columns, must_be
from .writing import Row, inside

UTF8 = "utf-8-sig"
OneGroup = must_be(lambda pattern: pattern.groups <= 1, "a pattern with one group; write other groups as (?:...)")


@dataclass(frozen=True, config=CONFIG)
class Classes:
    """A table of the classes in order, and the names of its columns."""

    table: str
    label: str
    name: str | None = None  # default: the label


@dataclass(frozen=True, config=CONFIG)
class Options:
    """The table and the media below --source. At least one of caption, label and labels must be set."""

    table: str  # .csv .tsv .json .jsonl .pkl .txt
    media: str  # path such as videos/{video_id}.mp4 with columns or {key}; `.*`: any extension, `**/`: any folders
    key: str = KEY  # column that names a sample, or a pattern as in `media`; default: an entry's name in a mapping
    caption: Columns = ()  # one or several columns; each may hold a list of texts, or a list of lists of words
    label: str | None = None  # a column
    labels: str | None = None  # a column with a list, or with text that is split at labels_separator
    labels_separator: str = ","
    format: str | None = None  # format of the table, such as csv, if the extension is wrong
    columns: Columns = ()  # column names of a table without a header
    comment: str | None = None  # start of comment lines before the table, such as "#"
    encoding: str = UTF8
    records: str | None = None  # key of a JSON object that holds the records
    where: dict[str, Columns] = field(default_factory=dict)  # rows to use: {split: test}, or a list of values
    split_list: str | None = None  # .txt or .json list of the keys to use; each must be in the table
    match: dict[str, Annotated[re.Pattern[str], OneGroup]] = field(default_factory=dict)  # column -> the part to use
    repeats: bool = False  # allow several rows per sample
    join: Literal["paragraph"] | None = None  # join the captions of a sample into one text
    classes: Classes | None = None

    def __post_init__(self) -> None:
        if not (self.caption or self.label or self.labels):
            raise ValueError("set caption, label or labels to the name of a column")


def prepare(source: Path, output: Path, options: Options) -> Iterator[Row]:
    """Yield the manifest's rows in the order of the table. Paths are relative to `source`, where the media stay."""
    media = _media_index(source, options.media)
    samples: dict[str, Row] = {}
    for where, key, record in _selected(source, options):
        path = _find(media, source, options.media, record | {KEY: key}, where)
        row: Row = {"where": where, "path": path} | _annotation(record, options, where)
        sample = samples.setdefault(key, row)
        if sample is row:
            continue
        if not options.repeats:
            raise UserError(f"{where}: {key!r} is listed twice, first at {sample['where']}")
        for name in ("path", "label"):
            if row.get(name) != sample.get(name):
                raise UserError(f"{where}: {name} is {row[name]!r}, but {sample[name]!r} at {sample['where']}")
        for name in row.keys() & {"labels", "captions"}:
            sample[name] += row[name]
    for row in samples.values():
        if options.join:
            paragraph = " ".join(filter(None, row["captions"]))
            row["captions"] = _texts(paragraph, "the paragraph", row["where"])
        yield row


def class_names(source: Path, options: Options) -> dict[str, str] | None:
    """Return the mapping label -> name in prompts, in order, or None if the options name no table of classes."""
    if options.classes is None:
        return None
    columns = options.classes.label, options.classes.name or options.classes.label
    names: dict[str, str] = {}
    for where, record in read_records(source / options.classes.table, Format(encoding=UTF8)):
        require(record, columns, where)
        label, name = (str(record[column]).strip() for column in columns)
        if label in names:
            raise UserError(f"{where}: the class {label!r} is listed twice")
        names[label] = name
    return names


def _selected(source: Path, options: Options) -> Iterator[tuple[str, str, Record]]:
    """Yield (place, key, record) of each row that `where` and `split_list` select."""
    form = Format(options.format, options.columns, options.comment, options.encoding, options.records)
    key_pattern = options.key if "{" in options.key else f"{{{options.key}}}"
    in_table = dict.fromkeys(read_list(source / options.split_list, Format()) if options.split_list else [], False)
    values: dict[str, set[str]] = {column: set() for column in options.where}
    chosen = False
    for where, record in read_records(source / options.table, form):
        require(record, [*options.where, *options.match], where)
        for column, found_values in values.items():
            found_values.add(str(record[column]))
        if any(str(record[column]) not in wanted for column, wanted in options.where.items()):
            continue
        chosen = True
        for column, pattern in options.match.items():
            if not (found := pattern.match(str(record[column]))) or found[pattern.groups] is None:
                raise UserError(f"{where}: {record[column]!r} does not match {pattern.pattern!r}")
            record[column] = found[pattern.groups]
        key = _fill(key_pattern, record, where)
        [name] = _texts(key, options.key, where)
        if name in in_table:
            in_table[name] = True
        elif options.split_list:
            continue
        yield where, key, record
    if values and not chosen:
        held = "; ".join(f"{column}: {', '.join(sorted(found)[:8])}" for column, found in values.items())
        raise UserError(f"{source}/{options.table}: `where` selects no row. The columns hold {held}")
    if lost := [key for key, found in in_table.items() if not found]:
        count = f"{len(lost)} of {len(in_table)} keys are not in {options.table}"
        raise UserError(f"{source}/{options.split_list}: {count}, such as {lost[0]!r}")


def _annotation(record: Record, options: Options, where: str) -> Row:
    """Return the label, labels and captions of a record."""
    require(record, [column for column in (*options.caption, options.label, options.labels) if column], where)
    found: Row = {}
    if options.label:
        [found["label"]] = _texts(record[options.label], options.label, where)
    if options.labels:
        value = record[options.labels]
        value = value.split(options.labels_separator) if isinstance(value, str) else value
        found["labels"] = [] if value == [] else _texts(value, options.labels, where)  # none of the classes
    if options.caption:
        # A sentence of a paragraph may be empty, but a caption may not, because it is a query. One that is not valid
        # text is left to the evaluation, which counts it
        texts = [_texts(record[column], column, where, bool(options.join), plain=False) for column in options.caption]
        found["captions"] = [text for column in texts for text in column]
    return found


def _texts(value: Any, column: str, where: str, may_be_empty: bool = False, plain: bool = True) -> list[str]:
    """Return the stripped texts in a text, a list of texts, or a list of lists of words."""
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [" ".join(map(str, text)) if isinstance(text, (list, tuple)) else text for text in values]
    for text in texts or [""]:
        # Not isinstance, because True is an int
        if type(text) not in (str, int) or (plain and not is_plain(str(text))):
            raise UserError(f"{where}: {column} should be text, not {text!r}")
        if not (may_be_empty or str(text).strip()):
            raise UserError(f"{where}: {column} is empty")
    return [str(text).strip() for text in texts]


def _media_index(source: Path, pattern: str) -> dict[str, list[str]]:
    """Return the files that match a pattern ending with `.*`, by path (after `**/`: by name) without extension."""
    index: dict[str, list[str]] = defaultdict(list)
    fixed = pattern.partition("{")[0].partition("**/")[0].rpartition("/")[0]
    if pattern.endswith(".*") and (source / fixed).is_dir():
        for file in files_below(source / fixed):
            path = file.relative_to(source)
            key = path.stem if "**/" in pattern else path.with_suffix("").as_posix()
            # Unicode has several encodings of an accented letter, which count as the same name
            index[unicodedata.normalize("NFC", key)].append(path.as_posix())
    return index


def _find(index: dict[str, list[str]], source: Path, pattern: str, record: Record, where: str) -> str:
    """Return the path of a record's file below the download, or the filled-in pattern if the file is missing."""
    path = inside(_fill(pattern, record, where), where)
    if not path.endswith(".*"):
        return inside(as_on_disk(source / path).relative_to(source).as_posix(), where)
    folder, _, name = path.removesuffix(".*").rpartition("**/")
    found = [file for file in index.get(unicodedata.normalize("NFC", name), ()) if file.startswith(folder)]
    if len(found) > 1:
        raise UserError(f"{where}: {' and '.join(sorted(found))} both match {path!r}; keep one")
    return found[0] if found else path


def _fill(pattern: str, record: Record, where: str) -> str:
    """Return a pattern filled in with the columns of a record."""
    try:
        return pattern.format_map(record)
    except KeyError as error:
        raise UserError(f"{where}: no column {error}, only {columns_of(record, (KEY,))}") from error
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: cannot fill in {pattern!r}: {error}") from error
