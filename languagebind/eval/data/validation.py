"""Check the values of a YAML file with pydantic, and say in plain words what is wrong with them.

The fields of a pydantic dataclass with `config=CONFIG` define the valid values, and `validate` creates the object.
`load_yaml` leaves numbers as text, which pydantic converts. A bare `yes` or `null` never becomes text or a number.
"""

import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError, PydanticKnownError

from ...config import UserError

T = TypeVar("T")
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
# Names in YAML terms of the types that pydantic expects, by the first word of an error's type
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "text (put it in quotes)",
    "tuple": "a list",
    "dict": "`key: value` lines",
    "dataclass": "`key: value` lines",
}


def _no_bool(value: Any) -> Any:
    """Return the value, but refuse `yes` and `no`, which pydantic would convert to 1 and 0."""
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[Whole, Field(ge=1)]
Columns = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


def must_be(test: Callable[[Any], Any], expected: str) -> AfterValidator:
    """Return a validator that refuses values that fail a test, as in "limit should be <expected>, not <value>"."""

    def check(value: Any) -> Any:
        if not test(value):
            raise PydanticCustomError("expected", "Input should be {expected}", {"expected": expected})
        return value

    return AfterValidator(check)


def refuse(mistakes: Mapping[str, Any]) -> None:
    """Raise `UserError` with the messages whose values are true, if there are any."""
    if found := [message for message, wrong in mistakes.items() if wrong]:
        raise UserError("; ".join(found))


def validate(kind: type[T], values: Any, where: str, context: Any = None) -> T:
    """Return the pydantic dataclass, model or TypedDict that `values` from `load_yaml` describe.

    Messages start with `where`, such as the file's path. Validators get `context` in pydantic's `ValidationInfo`.
    Raises `UserError` if a key or value is wrong: it names each, with the expected value or the closest known key.
    """
    try:
        return TypeAdapter(kind).validate_python(values, context=context)
    except ValidationError as error:
        lines = [_describe(details, kind, where) for details in error.errors(include_url=False)]
        more = [f"and {len(lines) - 4} more errors"] if len(lines) > 5 else []
        raise UserError("\n  ".join(lines[:4] + more if more else lines)) from error


def unknown(what: str, name: Any, known: Iterable[str]) -> str:
    """Return a message like `unknown key 'inptus', did you mean 'inputs'?`. Without a close name, list all names."""
    known = list(known)
    close = difflib.get_close_matches(str(name).rpartition(".")[2], known, n=1)
    return f"unknown {what} {name!r}" + (f", did you mean {close[0]!r}?" if close else f", expected {', '.join(known)}")


def _describe(error: ErrorDetails, kind: Any, where: str) -> str:
    """Return the sentence for one error."""
    place = [part for part in error["loc"] if part != "[key]"]  # pydantic's marker for an error in a key itself
    dotted = ".".join(map(str, place))
    path = f"{where}: {dotted}" if place else where
    first, _, rest = error["type"].partition("_")
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: {unknown('key', dotted, _keys(kind, place[:-1]))}"
    if error["type"] == "missing":
        return f"{path} is missing"
    if error["type"] == "value_error":  # from a validator of ours
        return f"{path}: {error['ctx']['error']}"
    if first in EXPECTED and rest in ("type", "parsing", "parsing_size"):
        return f"{path} should be {EXPECTED[first]}, not {reprlib.repr(error['input'])}"
    message = error["msg"].replace("greater than or equal to", "at least")
    if message.startswith("Input should"):
        return f"{path} {message.removeprefix('Input ')}, not {reprlib.repr(error['input'])}"
    return f"{path}: {message}"


def _keys(kind: Any, place: Sequence[str | int]) -> list[str]:
    """Return the known keys at a place in nested dataclasses and TypedDicts."""
    hints: Mapping[Any, Any] = get_type_hints(kind)
    for part in place:
        if part in hints:  # Otherwise it is an index of a list, or a key of a mapping
            nested = (*get_args(hints[part]), hints[part])
            hints = next((get_type_hints(each) for each in nested if getattr(each, "__annotations__", None)), {})
    return list(hints)
