"""Read published tables as records: CSV, TSV, JSON, JSON lines, pickles and lists of names."""

import csv
import itertools
import json
import pickle
import re
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..config import UserError, first_line
from ..files import POINTER, is_pointer, mend, parse_json, twice
from .vidal import CAPTION_SOURCES, NEGATIVES

Record = dict[str, Any]
Renames = Mapping[Any, Sequence[str]]  # our name of a column -> the table's, or several that are read as a list
# Columns for data without column names: the key of an entry in a mapping, and an entry that is not a mapping.
KEY, VALUE = "key", "value"
CAPTIONS = ("caption", "captions", *CAPTION_SOURCES)
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}


@dataclass(frozen=True)
class Format:
    """The format of a table."""

    name: str | None = None  # a key of READERS; default: the file's extension
    columns: tuple[str, ...] = ()  # the column names of a table without a header
    comment: str | None = None  # the start of each line to skip before the table
    encoding: str | None = None  # None: by the byte order mark, else UTF-8; bytes that are not UTF-8 are left to `mend`
    records: str | None = None  # the key of the records in a JSON object
    separator: str = ","  # the column separator of a CSV; if its first line has no comma, a tab or semicolon is found

    def name_for(self, file: Path) -> str:
        """Return the name of the format, by default the extension of `file`."""
        return self.name or file.suffix.removeprefix(".").lower()


def read_records(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    """Yield (location for messages, record) for each entry of a table, in order. CSV, TSV and JSON lines are streamed.

    Raises `UserError` if the file cannot be read in this format and encoding, or a row does not fit the columns.
    """
    name = form.name_for(file)
    if name not in READERS:
        raise UserError(f"{file}: unknown table format {name!r}; set format to one of {', '.join(READERS)}")
    if is_pointer(file):
        raise UserError(f"cannot read {file}: {POINTER}")
    after = ""
    try:
        for where, record in READERS[name](file, form):
            yield where, _mended(record)
            after = f" after {where}"
    except UserError:
        raise
    except Exception as error:  # an unpickler raises nearly anything
        hint = "; set `encoding`, such as latin-1, or convert the file" if isinstance(error, UnicodeError) else ""
        raise UserError(f"cannot read {file} as {name}{after}: {first_line(error)}{hint}") from error


def read_manifest(file: Path, form: Format = Format(), columns: Renames | None = None) -> Iterator[tuple[str, Record]]:
    """Yield (location for messages, row) for each row of a manifest, like `read_records` but with None for empty cells.

    In a CSV the columns `labels`, `captions` and `negatives` hold several values, separated by `|`.
    """
    columns = columns or {}
    cells = form.name_for(file) in ("csv", "tsv")
    form = replace(form, name="csv") if cells else form  # programs that write tables for others quote texts
    for where, row in read_records(file, form):
        if cells:
            row = {name: cell or None for name, cell in row.items()}
        elif row.keys() == {VALUE}:  # a line that is not an object
            raise UserError(f'{where}: a row needs a path, as in {{"path": "a.wav", "caption": "a bell"}}')
        require(row, itertools.chain(*columns.values()), where)
        found = {ours: [row[name] for name in theirs] for ours, theirs in columns.items()}
        row |= {ours: values if len(values) > 1 else values[0] for ours, values in found.items()}
        several = [name for name in ("labels", "captions", NEGATIVES) if cells and isinstance(row.get(name), str)]
        yield where, row | {name: row[name].split("|") for name in several}


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


def columns_of(record: Iterable[str], renamed: Container[str] = ()) -> str:
    """Return the names of a record's columns for messages, without those that `Renames` added."""
    return ", ".join(str(name) for name in record if name not in renamed) or "nothing"


def require(record: Record, columns: Iterable[str], where: str) -> None:
    """Raise `UserError` if a record lacks a column."""
    for column in columns:
        if column not in record:
            raise UserError(f"{where}: no column {column!r}, only {columns_of(record)}")


def _dialect(lines: list[str], separator: str) -> dict[str, Any]:
    """Return the options of csv.reader for a table with these first two lines."""
    if separator == "," and "," not in lines[0]:
        separator = next((sign for sign in SEPARATORS if sign in lines[0]), ",")
    sign = re.escape(separator)
    # AudioSet writes `id, 0.000, "a,b"`, where csv would ignore the quotes. Other blanks may belong to a file's name.
    quoted = any(re.search(f'{sign} +"', re.sub('"[^"]*"', '"', line)) for line in lines)
    spaced = re.fullmatch(f"[^{sign}]*({sign} +[^{sign} ][^{sign}]*)+", lines[0]) is not None
    return {"delimiter": separator, "skipinitialspace": quoted or spaced, "strict": True}


def _csv(file: Path, form: Format, dialect: dict[str, Any] | None = None) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(sys.maxsize)
    columns = list(form.columns)
    with _open(file, form, newline="") as lines:
        skipped, first = 0, next(lines, "")
        while form.comment and first.startswith(form.comment):
            skipped, first = skipped + 1, next(lines, "")
        start = [first, *itertools.islice(lines, 1)]
        reader = csv.reader(itertools.chain(start, lines), **(dialect or _dialect(start, form.separator)))
        for row in filter(any, reader):  # not a blank line, nor one of separators alone, as spreadsheets write
            where = f"{file}:{reader.line_num + skipped}"
            if not columns:
                columns = [name.strip() for name in row]
                if name := twice(filter(None, columns)):
                    raise UserError(f"{where}: the column {name!r} is listed twice")
                continue
            while len(row) > len(columns) and not row[-1].strip():
                row.pop()  # a separator at the end of a line
            if len(row) != len(columns):
                sign = SEPARATORS.get(reader.dialect.delimiter, repr(reader.dialect.delimiter))
                expected = f"expected {len(columns)}: {', '.join(columns)}"
                raise UserError(f"{where}: {len(row)} columns, {expected}; a text with a {sign} needs double quotes")
            yield where, dict(zip(columns, row, strict=True))


def _json(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    with _open(file, form) as stream:
        content = parse_json(stream.read())
    return _entries(content if form.records is None else content[form.records], file)


def _jsonl(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    with _open(file, form, newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield f"{file}:{number}", _record(parse_json(line.strip()))
            except ValueError as error:
                reason = str(error).replace("line 1 column", "column")  # each line is a document of its own
                raise UserError(f"{file}:{number}: not valid JSON: {reason}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads only containers, strings and numbers. Anything else in a pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("builtins", "set"), ("builtins", "frozenset")):
            return set if name == "set" else frozenset
        raise pickle.UnpicklingError(f"it has {module}.{name}, but only containers, strings and numbers are allowed")


def _pickle(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    with open(file, "rb") as stream:
        # Strings that Python 2 pickled are bytes, so they need the encoding.
        content = _PlainUnpickler(stream, encoding=(form.encoding or "utf-8").removesuffix("-sig")).load()
    return _entries(content, file)


def _lines(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    with _open(file, form) as lines:
        yield from ((f"{file}:{number}", {VALUE: line.strip()}) for number, line in enumerate(lines, 1) if line.strip())


def _open(file: Path, form: Format, newline: str | None = None) -> IO[str]:
    if form.encoding:
        return open(file, encoding=form.encoding, newline=newline)
    with open(file, "rb") as start:
        encoding = json.detect_encoding(start.read(4))
    return open(file, encoding=encoding, errors="surrogateescape", newline=newline)


def _mended(value: Any) -> Any:
    """Return a value with each text in it as `mend` reads it, also in lists and objects."""
    if isinstance(value, dict):
        return {mend(name) if isinstance(name, str) else name: _mended(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mended(each) for each in value]
    return mend(value) if isinstance(value, str) else value


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


# Tab-separated columns have no quoting, because a sentence may contain a single `"`
_tsv: Any = partial(_csv, dialect={"delimiter": "\t", "quoting": csv.QUOTE_NONE})
READERS = {"csv": _csv, "tsv": _tsv, "json": _json, "jsonl": _jsonl, "pkl": _pickle, "pickle": _pickle, "txt": _lines}
