"""What every modality checks: its options, that a source is one file of a sane size, that an array holds numbers."""

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from . import DecodeError, Source, read


def require_positive(options: Any, *names: str) -> None:
    """Raise `UserError` for the first of these fields that is not above zero."""
    for name in names:
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, set it above 0")


def require_choices(options: Any) -> None:
    """Raise `UserError` for the first field that is declared as a `Literal` and holds something else."""
    for field, kind in get_type_hints(type(options)).items():
        choices = get_args(kind)
        if get_origin(kind) is Literal and getattr(options, field) not in choices:
            value, known = getattr(options, field), ", ".join(choices)
            raise UserError(f"--{field.replace('_', '-')} is {value!r}, choose from {known}")


def file_size(source: Source | Sequence[Source]) -> int:
    """How many bytes a source has, without reading it.

    Raises:
        DecodeError: the source is not one regular file, or it is empty.
    """
    if isinstance(source, (list, tuple)):
        raise DecodeError(source, "one file is expected here, not several frames")
    if isinstance(source, bytes):
        size = len(source)
    else:
        try:
            size = os.stat(source).st_size
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            raise DecodeError(source, getattr(error, "strerror", None) or str(error)) from error
        if not os.path.isfile(source):
            raise DecodeError(source, "not a file")
    if size == 0:
        raise DecodeError(source, "the file is empty")
    return size


def read_file(source: Source | Sequence[Source], max_bytes: int) -> bytes:
    """The contents of one file, which is not read at all if it is larger than `max_bytes`.

    Raises:
        DecodeError: as `file_size`; it is too large; it cannot be read.
    """
    size = file_size(source)
    if size > max_bytes:
        raise DecodeError(source, f"{size} bytes; nothing within the limits is larger than {max_bytes}")
    return read(source)


def to_tensor(array: np.ndarray | Tensor, label: str) -> Tensor:
    """A copy of a numpy array, of any byte order and read-only or not, as a tensor; a tensor is left alone.

    Raises:
        DecodeError: the array holds no numbers that torch knows.
    """
    if isinstance(array, Tensor):
        return array
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError as error:
        raise DecodeError(label, f"cannot use an array of {array.dtype}") from error
