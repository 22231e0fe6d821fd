"""Any dataset that is a table and media files, from a description in YAML.

    prepare:
      kind: table
      table: MSRVTT_JSFUSION_test.csv          # .csv .tsv .json .jsonl .pkl .txt; `format` where the extension lies
      key: video_id                            # the column that names a sample, or a pattern as in media;
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

In a mapping that holds plain values, or a list of them, these are the column `value`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...config import UserError
from ...data.tables import KEY, Format, Record, read_list, read_records, require
from ...files import is_plain
from ..data.values import refuse_unknown, texts
from ._media import MediaFinder, fill


@dataclass(frozen=True)
class Table:
    """The options above."""

    table: str
    media: str
    key: str = KEY
    caption: tuple[str, ...] = ()
    label: str | None = None
    labels: str | None = None
    labels_separator: str = ","
    where: Mapping[str, Any] = field(default_factory=dict)
    split_list: str | None = None
    match: Mapping[str, str] = field(default_factory=dict)
    repeats: bool = False
    join: str | None = None
    classes: Mapping[str, str] = field(default_factory=dict)
    form: Format = field(default_factory=Format)


def prepare(source: Path, output: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The manifest's rows, in the order of the table; paths are below `source`, where the media stay.

    Raises:
        UserError: an option, a row or a list of the split is wrong; with file and line.
    """
    table = _options(options)
    media = MediaFinder(source, table.media)
    samples: dict[str, dict[str, Any]] = {}
    for where, key, record in _selected(source, table):
        row = {"where": where, "path": media.find(record | {"key": key}, where)} | _annotation(record, table, where)
        if key not in samples:
            samples[key] = row
        elif not table.repeats:
            raise UserError(f"{where}: {key!r} is there twice, first at {samples[key]['where']}")
        else:
            _add(samples[key], row)
    for row in samples.values():
        if table.join:
            paragraph = " ".join(filter(None, row["captions"]))
            row["captions"] = [_not_empty(paragraph, "the paragraph", row["where"])]
        yield row


def class_names(source: Path, options: dict[str, Any]) -> dict[str, str] | None:
    """Label -> name in prompts, in order, of a dataset with a table of its classes."""
    classes = _options(options).classes
    if not classes:
        return None
    refuse_unknown(classes, ("table", "label", "name"), "prepare: classes")
    texts(classes.values(), "prepare: classes")
    if missing := {"table", "label"} - classes.keys():
        raise UserError(f"prepare: classes has no {' and no '.join(sorted(missing))}")
    names: dict[str, str] = {}
    for where, record in read_records(source / classes["table"], Format()):
        columns = (classes["label"], classes.get("name", classes["label"]))
        require(record, columns, where)
        label, name = (str(record[column]).strip() for column in columns)
        if label in names:
            raise UserError(f"{where}: the class {label!r} is there twice")
        names[label] = name
    return names


def _options(options: dict[str, Any]) -> Table:
    forms = {"format": "name"} | {name: name for name in ("columns", "comment", "encoding", "records")}
    known = [option.name for option in fields(Table) if option.name != "form"]
    refuse_unknown(options, [*known, *forms], "prepare")
    for name in ("table", "media"):
        if not isinstance(options.get(name), str):
            raise UserError(f"prepare: a table needs {name}: the path of a file")
    words = ("key", "label", "labels", "labels_separator", "split_list", "comment", "encoding", "records", "format")
    for name in words:
        if not isinstance(options.get(name, ""), str):
            raise UserError(f"prepare: {name} should be a text, not {options[name]!r}")
    values = {name: options[name] for name in known if name in options}
    values["caption"] = _tuple(options.get("caption", ()), "caption")
    if not any(values.get(name) for name in ("caption", "label", "labels")):
        raise UserError("prepare: say which column is the caption, the label or the labels")
    if values.get("join") not in (None, "paragraph"):
        raise UserError(f"prepare: join can be paragraph, not {values['join']!r}")
    for name in ("where", "match", "classes"):
        if not isinstance(values.get(name, {}), dict):
            raise UserError(f"prepare: {name} should be `column: value` lines")
    form = {forms[name]: value for name, value in options.items() if name in forms}
    if "columns" in form:
        form["columns"] = _tuple(form["columns"], "columns")
    return Table(**values, form=Format(**form))


def _tuple(value: Any, name: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(entry, str) for entry in values):
        raise UserError(f"prepare: {name} should be a column or a list of columns, not {value!r}")
    return tuple(values)


def _selected(source: Path, table: Table) -> Iterator[tuple[str, str, Record]]:
    """(place, key, record) of the rows of the split."""
    patterns = {column: _pattern(text) for column, text in table.match.items()}
    wanted = {column: _tuple(value, f"where: {column}") for column, value in table.where.items()}
    split = read_list(source / table.split_list, Format()) if table.split_list else None
    left, taken = dict.fromkeys(split or ()), 0
    for where, record in read_records(source / table.table, table.form):
        require(record, [*table.where, *table.match], where)
        if any(str(record[column]) not in values for column, values in wanted.items()):
            continue
        taken += 1
        record |= {column: _part(pattern, record[column], where) for column, pattern in patterns.items()}
        key = fill(table.key if "{" in table.key else f"{{{table.key}}}", record, where).strip()
        if not key:
            raise UserError(f"{where}: {table.key} is empty")
        if split is None or key in left:
            left[key] = True
            yield where, key, record
    if table.where and not taken:
        conditions = ", ".join(f"{column}: {' or '.join(values)}" for column, values in wanted.items())
        raise UserError(f"{source / table.table}: no row has {conditions} (`where` in the config)")
    lost = [key for key in split or () if not left[key]]
    if lost:
        raise UserError(
            f"{source / table.split_list}: {len(lost)} of {len(split)} names are not in {table.table}, as {lost[0]!r}"
        )


def _pattern(text: str) -> re.Pattern:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"prepare: match: {text!r} is no regular expression: {error}") from error
    if pattern.groups != 1:
        raise UserError(f"prepare: match: {text!r} should have one group, the part to use")
    return pattern


def _part(pattern: re.Pattern, value: Any, where: str) -> str:
    found = pattern.match(str(value))
    if not found or found[1] is None:
        raise UserError(f"{where}: {value!r} does not fit {pattern.pattern!r}")
    return found[1]


def _annotation(record: Record, table: Table, where: str) -> dict[str, Any]:
    """The label, labels and captions of a record."""
    require(record, [column for column in (*table.caption, table.label, table.labels) if column], where)
    found: dict[str, Any] = {}
    if table.label:
        found["label"] = _not_empty(record[table.label], table.label, where)
    if table.labels:
        values = record[table.labels]
        values = values.split(table.labels_separator) if isinstance(values, str) else values
        if not isinstance(values, (list, tuple)):
            raise UserError(f"{where}: {table.labels} should be a list or a text, not {values!r}")
        found["labels"] = [_not_empty(value, table.labels, where) for value in values]
    if table.caption:
        texts = [(text, column) for column in table.caption for text in _captions(record[column], column, where)]
        # A sentence of a paragraph may be empty; a caption is a query, and may not.
        check = _text if table.join else _not_empty
        found["captions"] = [check(text, column, where) for text, column in texts]
    return found


def _captions(value: Any, column: str, where: str) -> list[Any]:
    """The texts in a text, a list of texts, or a list of lists of words."""
    if not isinstance(value, (list, tuple)):
        return [value]
    if not value:
        raise UserError(f"{where}: {column} is empty")
    return [" ".join(map(str, text)) if isinstance(text, (list, tuple)) else text for text in value]


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, (str, int)) or isinstance(value, bool) or not is_plain(str(value)):
        raise UserError(f"{where}: {column} should be text, not {value!r}")
    return str(value).strip()


def _not_empty(value: Any, column: str, where: str) -> str:
    text = _text(value, column, where)
    if not text:
        raise UserError(f"{where}: {column} is empty")
    return text


def _add(sample: dict[str, Any], row: dict[str, Any]) -> None:
    """Another row of the same sample."""
    for name in ("path", "label"):
        if row.get(name) != sample.get(name):
            raise UserError(f"{row['where']}: {name} {row[name]!r}, but {sample[name]!r} at {sample['where']}")
    for name in ("labels", "captions"):
        if name in row:
            sample[name] = sample[name] + row[name]
