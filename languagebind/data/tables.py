"""Tables as people publish them, read to records: CSV, TSV, JSON, JSON lines, pickles and lists of names."""

import csv
import io
import itertools
import json
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import UserError
from ..files import check_regular, parse_json, twice

Record = dict[str, Any]
# The columns of what has no names: the key of a mapping's entry, and an entry that is no mapping itself.
KEY, VALUE = "key", "value"


@dataclass(frozen=True)
class Format:
    """How a table is written."""

    name: str | None = None  # a key of READERS; default: the file's extension
    columns: tuple[str, ...] = ()  # of a table without a header
    comment: str | None = None  # lines in front of the table that start with this are no part of it
    encoding: str = "utf-8-sig"
    records: str | None = None  # the key of a JSON object that holds the records


def read_records(file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    """(place for messages, record) of each entry of a table, in order.

    Raises:
        UserError: the file is missing, in another format or encoding, or a row does not fit; with file and line.
    """
    name = form.name or file.suffix.removeprefix(".").lower()
    if name not in READERS:
        raise UserError(f"{file}: {name!r} is no format of a table, set format to one of {', '.join(READERS)}")
    try:
        check_regular(file)
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    return READERS[name](data, file, form)


def _text(data: bytes, file: Path, form: Format) -> str:
    try:
        return data.decode(form.encoding)
    except LookupError as error:
        raise UserError(f"{file}: there is no encoding {form.encoding!r}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wrong = f"byte {data[error.start]:#04x} is not {form.encoding.removesuffix('-sig')}"
        raise UserError(f"{file}:{line}: {wrong}; set `encoding` (latin-1?) or convert the file") from error
    except UnicodeError as error:  # of an encoding that only exists by name
        raise UserError(f"{file}: cannot be read as {form.encoding!r}: {error}") from error


def _text_lines(data: bytes, file: Path, form: Format) -> list[str]:
    """Lines with their ends; unlike with `str.splitlines`, a caption's own U+2028 or form feed ends none."""
    return list(io.StringIO(_text(data, file, form), newline=""))


def _csv(data: bytes, file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    lines = _text_lines(data, file, form)
    head = itertools.takewhile(lambda line: form.comment and line.startswith(form.comment), lines)
    skipped = sum(1 for _ in head)
    # skipinitialspace: AudioSet writes `id, 0.000, 10.000, "a,b"`, where the quotes count only without the space.
    reader = csv.reader(lines[skipped:], skipinitialspace=True, strict=True)
    return _rows(reader, skipped, file, form)


def _tsv(data: bytes, file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    """Tabs and no quotes: a sentence may hold a single `"`."""
    lines = _text_lines(data, file, form)
    return _rows(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 0, file, form)


def _rows(reader: Any, skipped: int, file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    columns = list(form.columns)
    if name := twice(columns):
        raise UserError(f"{file}: `columns` names {name!r} twice")
    try:
        for row in reader:
            if not row:  # a blank line; one of empty cells is a mistake
                continue
            where = f"{file}:{reader.line_num + skipped}"
            if not columns:
                columns = [name.strip() for name in row]
                if name := twice(filter(None, columns)):
                    raise UserError(f"{where}: the column {name!r} is there twice")
                continue
            while len(row) > len(columns) and not row[-1].strip():
                row.pop()  # a separator at the end of a line
            if len(row) != len(columns):
                raise UserError(f"{where}: {len(row)} columns, expected {len(columns)}: {', '.join(columns)}")
            yield where, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num + skipped}: {error}") from error


def _json(data: bytes, file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    text = _text(data, file, form)
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: no JSON: {error.msg}") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    if form.records is not None:
        if not isinstance(content, dict) or form.records not in content:
            raise UserError(f"{file}: has no key {form.records!r}")
        content = content[form.records]
    return _entries(content, file)


def _jsonl(data: bytes, file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_text(data, file, form).split("\n"), 1):
        try:
            if line.strip():
                yield f"{file}:{number}", _record(parse_json(line))
        except ValueError as error:
            raise UserError(f"{file}:{number}: no JSON: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, texts and numbers; anything else in a pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("builtins", "set"), ("builtins", "frozenset")):
            return set if name == "set" else frozenset
        raise pickle.UnpicklingError(f"holds {module}.{name}, but only containers, texts and numbers are read")


def _pickle(data: bytes, file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    try:
        # Texts that Python 2 wrote are bytes, so the encoding matters here too.
        content = _PlainUnpickler(io.BytesIO(data), encoding=form.encoding.removesuffix("-sig")).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ValueError,
        LookupError,
        TypeError,
        OverflowError,
    ) as error:
        raise UserError(f"{file} cannot be read as a pickle: {error}") from error
    return _entries(content, file)


def _lines(data: bytes, file: Path, form: Format) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_text_lines(data, file, form), 1):
        if line.strip():
            yield f"{file}:{number}", {VALUE: line.strip()}


def _entries(content: Any, file: Path) -> Iterator[tuple[str, Record]]:
    """The entries of a list, or of a mapping by key."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield f"{file}: entry {key!r}", _record(value) | {KEY: key}
    elif isinstance(content, (list, tuple)):
        for number, value in enumerate(content, 1):
            yield f"{file}: entry {number}", _record(value)
    else:
        raise UserError(f"{file} should hold a list or a mapping of entries, not {type(content).__name__}")


def _record(value: Any) -> Record:
    return dict(value) if isinstance(value, dict) else {VALUE: value}


READERS = {
    "csv": _csv,
    "tsv": _tsv,
    "json": _json,
    "jsonl": _jsonl,
    "pkl": _pickle,
    "pickle": _pickle,
    "txt": _lines,
}


def read_list(file: Path, form: Format) -> list[str]:
    """A list of names, a text file's lines or a JSON list's entries; each must be there once."""
    names: dict[str, str] = {}
    for where, record in read_records(file, form):
        name = record.get(VALUE)
        if not isinstance(name, (str, int)):
            raise UserError(f"{where}: should be a name, not {record}")
        if str(name) in names:
            raise UserError(f"{where}: {name!r} is there twice, first at {names[str(name)]}")
        names[str(name)] = where
    return list(names)


def columns_of(record: Record) -> str:
    """For messages: what a record has."""
    return ", ".join(map(str, record)) or "nothing"


def require(record: Record, columns: Iterable[str], where: str) -> None:
    """Raise `UserError` if a record lacks a column."""
    for column in columns:
        if column not in record:
            raise UserError(f"{where}: no column {column!r}, it has {columns_of(record)}")
