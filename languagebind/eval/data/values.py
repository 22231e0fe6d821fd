"""Values of the YAML files, checked: each function raises `UserError`, which says where the value stands."""

import difflib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...config import UserError
from ...files import text_lines
from .readers import INPUTS, SIMILARITIES

COUNTS = ("samples", "captions", "classes")
# Metrics that are no fractions; every other published value lies in 0 to 1.
UNBOUNDED = ("median_rank", "mean_rank", "d_prime")


def refuse_unknown(values: Iterable[Any], known: Sequence[str], where: str, what: str = "key") -> None:
    """Raise `UserError` with the nearest name if a key is not one of those known."""
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {nearest[0]!r}?" if nearest else f", expected {', '.join(known)}"
            raise UserError(f"{where}: unknown {what} {key!r}{hint}")


def texts(values: Any, where: str) -> list[str]:
    """Text as it is; YAML reads a bare yes, no or null as something else, and that must not become a class name."""
    if isinstance(values, bool):
        raise UserError(f"{where}: {values!r} is not a list of texts")
    for value in values:
        if not isinstance(value, str):
            raise UserError(f"{where}: {value!r} is not text, put it in quotes")
    return list(values)


def whole_number(value: str, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {value!r} is not a whole number") from error


def seconds(value: Any, where: str) -> tuple[float, float]:
    try:
        if isinstance(value, list) and len(value) == 2:
            return float(value[0]), float(value[1])
    except (TypeError, ValueError):
        pass
    raise UserError(f"{where}: {value!r} is not [start, end] in seconds")


def paper_rules(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UserError(f"{where} should be `inputs: ...` and `similarity: ...`, or {{}}")
    refuse_unknown(value, ("inputs", "similarity"), where)
    for key, known in (("inputs", INPUTS), ("similarity", SIMILARITIES)):
        refuse_unknown([value[key]] if key in value else [], list(known), f"{where}: {key}")
    return value


def counts(value: Any, where: str) -> dict[str, int]:
    if not isinstance(value, dict):
        raise UserError(f"{where} should be counts of {', '.join(COUNTS)}")
    refuse_unknown(value, COUNTS, where)
    found = {key: whole_number(count, f"{where}: {key}") for key, count in value.items()}
    for key, count in found.items():
        if count < 0:
            raise UserError(f"{where}: {key}: {count} is less than 0")
    return found


def published_figures(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Each figure with its model and the place where it is printed; a percentage is refused."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"{where} should be a list of `model`, `values` and `where`")
    figures = []
    for entry in value:
        refuse_unknown(entry, ("model", "values", "where"), where)
        texts([entry.get("model"), entry.get("where")], f"{where}: model and where")
        if not isinstance(entry.get("values"), dict) or not entry["values"]:
            raise UserError(f"{where}: {entry['model']} has no values")
        texts(entry["values"], f"{where}: values")
        figures.append(entry | {"values": {k: _fraction(v, k, where) for k, v in entry["values"].items()}})
    return tuple(figures)


def read_lines(name: str, path: Path, folders: tuple[Path, ...]) -> list[str]:
    """The lines of a text file that a config names, without blank ones."""
    file = find(name, folders)
    if file is None:
        raise UserError(f"{path}: no such file: {' nor '.join(str(folder / name) for folder in folders)}")
    try:
        lines = text_lines(file.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not any(lines):
        raise UserError(f"{file} is empty")
    return [line for line in lines if line]


def find(name: Any, folders: tuple[Path, ...]) -> Path | None:
    """The first of the folders' files of a name."""
    files = [folder / name for folder in folders] if isinstance(name, str) else []
    return next((file for file in files if os.path.isfile(file)), None)  # False, too, of a name that is too long


def _fraction(value: Any, metric: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {metric} {value!r} is not a number") from error
    if not math.isfinite(number):
        raise UserError(f"{where}: {metric} {value} is not a finite number")
    if not (0 <= number <= 1 or metric.rpartition("/")[2] in UNBOUNDED):
        raise UserError(f"{where}: {metric} {value} should be a fraction of 1, not a percentage")
    return number
