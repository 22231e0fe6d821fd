"""The rows of a manifest: a .csv or .jsonl file that names the files of a dataset."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...config import UserError
from ...files import check_regular, parse_json, twice


def read_rows(manifest: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line number, row) of a manifest.

    Raises:
        UserError: it cannot be read, or a row is malformed, or names a column or key twice.
    """
    try:
        check_regular(manifest)
        with manifest.open(encoding="utf-8-sig", newline="") as lines:
            if manifest.suffix == ".csv":
                yield from _csv_rows(csv.DictReader(lines, strict=True), manifest)
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _json_row(line, f"{manifest}:{number}")
    except OSError as error:
        raise UserError(f"cannot read {manifest}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest} cannot be read as {manifest.suffix}: {error}") from error


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} cannot be read as .jsonl: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: should be a JSON object")
    return row


def _csv_rows(reader: csv.DictReader, manifest: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        if name := twice(filter(None, reader.fieldnames or ())):
            raise UserError(f"{manifest}:1: the column {name!r} is there twice")
        for row in reader:
            where = f"{manifest}:{reader.line_num}"
            if None in row:
                raise UserError(f"{where}: more cells than columns: put a text with a comma in double quotes")
            plural = {key: row[key].split("|") for key in ("labels", "captions") if row.get(key)}
            yield reader.line_num, {key: value for key, value in (row | plural).items() if value}
    except csv.Error as error:
        raise UserError(f"{manifest}:{reader.line_num + 1} cannot be read as .csv: {error}") from error
