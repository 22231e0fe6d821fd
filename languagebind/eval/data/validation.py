"""Check the values of a YAML file with pydantic, and say in plain words what is wrong with them.

    @pydantic.dataclasses.dataclass(frozen=True, config=CONFIG)
    class Crops:
        annotations: str
        min_size: Annotated[Whole, Field(ge=1)] = 1

    crops = validate(Crops, load_yaml(path), str(path))

`load_yaml` leaves numbers as text, which pydantic reads; text is never made of a bare `yes`, `null` or number.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticKnownError

from ...config import UserError

T = TypeVar("T")
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
# What pydantic's types of errors expect, in the words of YAML
EXPECTED = {
    "a whole number": ("int_type", "int_parsing", "int_parsing_size", "int_from_float"),
    "a number": ("float_type", "float_parsing"),
    "text (put it in quotes)": ("string_type",),
    "a list": ("tuple_type", "list_type"),
    "`key: value` lines": ("dict_type", "mapping_type", "dataclass_type", "model_type", "model_attributes_type"),
}
_WORDS = {kind: words for words, kinds in EXPECTED.items() for kind in kinds}


def _no_bool(value: Any) -> Any:
    """Refuse `yes` and `no`, which pydantic would read as 1 and 0."""
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]


def validate(kind: type[T], values: Any, where: str) -> T:
    """Return the pydantic dataclass, model or TypedDict that `values` describe.

    Args:
        kind: its fields say what is allowed; CONFIG makes it refuse unknown keys.
        values: as `load_yaml` returns them.
        where: what the message starts with, such as the file's path.

    Raises:
        UserError: a key or value is wrong; the message names each, what was expected, and the key that was meant.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        lines = [_describe(details, kind, where) for details in error.errors(include_url=False)]
        raise UserError("\n  ".join(lines)) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for a misspelt name, or else the names to choose from."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f", expected {', '.join(known)}"


def _describe(error: ErrorDetails, kind: Any, where: str) -> str:
    """Return one error as a sentence."""
    place = [part for part in error["loc"] if part != "[key]"]  # pydantic's mark for an error in a key itself
    path = _at(where, place)
    if error["type"] in UNKNOWN_KEY:
        *parents, key = place
        return f"{_at(where, parents)}: unknown key {key!r}{nearest(str(key), _keys(kind, parents))}"
    if error["type"] == "missing":
        return f"{path} is missing"
    if error["type"] == "value_error":  # from a validator of ours
        return f"{path}: {error['ctx']['error']}"
    if error["type"] in _WORDS:
        return f"{path} should be {_WORDS[error['type']]}, not {reprlib.repr(error['input'])}"
    message, replaced = re.subn("^Input should", f"{path} should", error["msg"])
    return f"{message}, not {reprlib.repr(error['input'])}" if replaced else f"{path}: {message}"


def _at(where: str, place: Sequence[str | int]) -> str:
    return ": ".join(filter(None, (where, ".".join(map(str, place)))))


def _keys(kind: Any, place: Sequence[str | int]) -> list[str]:
    """Return the keys that are known at a place in nested dataclasses, models and TypedDicts."""
    hints: Mapping[Any, Any] = get_type_hints(kind)
    for part in place:
        if part in hints:  # else an index of a list, or a key of a mapping
            nested = (*get_args(hints[part]), hints[part])
            hints = next((get_type_hints(each) for each in nested if getattr(each, "__annotations__", None)), {})
    return list(hints)
