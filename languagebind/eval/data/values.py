"""Values of the YAML files, checked: each function raises `UserError`, which says where the value stands."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from ...config import UserError


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
