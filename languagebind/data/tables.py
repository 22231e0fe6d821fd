"""Read published tables as records: CSV, TSV, JSON, JSON lines, pickles and lists of names."""

import csv
import itertools
import pickle
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import UserError, first_line
from ..files import parse_json, twice

Record = dict[str, Any]
# Columns for data without column names: the key of an entry in a mapping, and an entry that is not a mapping.
KEY, VALUE = "key", "value"


@dataclass(frozen=True)
class Format:
    """The format of a table."""

    name: str | None = None  # a key of READERS; default: the file's extension
    columns: tuple[str, ...] = ()  # the column names of a table without a header
    comment: str | None = None  # the start of each line to skip before the table
    encoding: str = "utf-8-sig"
    records: str | None = None  # the key of the records in a JSON object
    separator: str = ","  # the column separator of a CSV
    skip_spaces: bool = False  # after a separator: AudioSet writes `id, 0.000, "a,b"`, where csv ignores the quotes

    def name_for(self, file: Path) -> str:
        """Return the name of the format, by default the extension of `file`."""
        return self.name or file.suffix.removeprefix(".").lower()


def read_records(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    """Yield (location for messages, record) for each entry of a table, in order. CSV, TSV and JSON lines are streamed.

    Raises:
        UserError: the file cannot be read in this format and encoding, or a row does not fit the columns.
    """
    name = form.name_for(file)
    if name not in READERS:
        raise UserError(f"{file}: unknown table format {name!r}; set format to one of {', '.join(READERS)}")
    after = ""
    try:
        for where, record in READERS[name](file, form):
            yield where, record
            after = f" after {where}"
    except UserError:
        raise
    except Exception as error:  # an unpickler raises nearly anything
        hint = "; set `encoding`, such as latin-1, or convert the file" if isinstance(error, UnicodeError) else ""
        raise UserError(f"cannot read {file} as {name}{after}: {first_line(error)}{hint}") from error


def read_manifest(file: Path, form: Format = Format()) -> Iterator[tuple[str, Record]]:
    """Yield (location for messages, row) for each row of a manifest, like `read_records` but with None for empty cells.

    In a CSV the columns `labels` and `captions` hold several values, separated by `|`.
    """
    for where, row in read_records(file, form):
        if form.name_for(file) == "csv":
            row = {name: cell or None for name, cell in row.items()}
            row |= {name: row[name].split("|") for name in ("labels", "captions") if row.get(name)}
        yield where, row


def read_list(file: Path, form: Format) -> list[str]:
    """Return the names in a text file's lines or a JSON list. No name may occur twice."""
    names: dict[str, str] = {}
    for where, record in read_records(file, form):
        name = str(record.get(VALUE))
        if name in names:
            raise UserError(f"{where}: {name!r} is listed twice, first at {names[name]}")
        names[name] = where
    return list(names)


def as_list(value: Any) -> list[Any]:
    """Return the value or values of a cell as a list. None gives an empty list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def columns_of(record: Record) -> str:
    """Return the names of a record's columns, for messages."""
    return ", ".join(map(str, record)) or "nothing"


def require(record: Record, columns: Iterable[str], where: str) -> None:
    """Raise `UserError` if a record lacks a column."""
    for column in columns:
        if column not in record:
            raise UserError(f"{where}: no column {column!r}, only {columns_of(record)}")


def _csv(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    return _rows(file, form, delimiter=form.separator, skipinitialspace=form.skip_spaces, strict=True)


def _tsv(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    """Read tab-separated columns without quoting, because a sentence may contain a single `"`."""
    return _rows(file, form, delimiter="\t", quoting=csv.QUOTE_NONE)


def _rows(file: Path, form: Format, **dialect: Any) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(sys.maxsize)
    columns = list(form.columns)
    with open(file, encoding=form.encoding, newline="") as lines:
        skipped, first = 0, next(lines, "")
        while form.comment and first.startswith(form.comment):
            skipped, first = skipped + 1, next(lines, "")
        reader = csv.reader(itertools.chain([first], lines), **dialect)
        for row in filter(None, reader):  # a blank line has no cells
            where = f"{file}:{reader.line_num + skipped}"
            if not columns:
                columns = [name.strip() for name in row]
                if name := twice(filter(None, columns)):
                    raise UserError(f"{where}: the column {name!r} is listed twice")
                continue
            while len(row) > len(columns) and not row[-1].strip():
                row.pop()  # a separator at the end of a line
            if len(row) != len(columns):
                expected = f"expected {len(columns)}: {', '.join(columns)}"
                raise UserError(f"{where}: {len(row)} columns, {expected}; a text with a comma needs double quotes")
            yield where, dict(zip(columns, row, strict=True))


def _json(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    content = parse_json(file.read_text(encoding=form.encoding))
    return _entries(content if form.records is None else content[form.records], file)


def _jsonl(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    with open(file, encoding=form.encoding, newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield f"{file}:{number}", _record(parse_json(line))
            except ValueError as error:
                raise UserError(f"{file}:{number}: not valid JSON: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads only containers, strings and numbers. Anything else in a pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("builtins", "set"), ("builtins", "frozenset")):
            return set if name == "set" else frozenset
        raise pickle.UnpicklingError(f"it has {module}.{name}, but only containers, strings and numbers are allowed")


def _pickle(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    with open(file, "rb") as stream:
        # Strings that Python 2 pickled are bytes, so they need the encoding.
        content = _PlainUnpickler(stream, encoding=form.encoding.removesuffix("-sig")).load()
    return _entries(content, file)


def _lines(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    with open(file, encoding=form.encoding) as lines:
        yield from ((f"{file}:{number}", {VALUE: line.strip()}) for number, line in enumerate(lines, 1) if line.strip())


def _entries(content: Any, file: Path) -> Iterator[tuple[str, Record]]:
    """Yield the entries of a list, or the entries of a mapping with their keys."""
    if isinstance(content, dict):
        yield from ((f"{file}: entry {key!r}", _record(value) | {KEY: key}) for key, value in content.items())
    elif isinstance(content, (list, tuple)):
        yield from ((f"{file}: entry {number}", _record(value)) for number, value in enumerate(content, 1))
    else:
        raise UserError(f"{file} should hold a list or a mapping of entries, not {type(content).__name__}")


def _record(value: Any) -> Record:
    return dict(value) if isinstance(value, dict) else {VALUE: value}


READERS = {"csv": _csv, "tsv": _tsv, "json": _json, "jsonl": _jsonl, "pkl": _pickle, "pickle": _pickle, "txt": _lines}
