"""Sources of samples: a path, bytes, or a sequence of them if each frame is a file."""

import math
import os
from collections.abc import Sequence
from typing import Any

from ..files import POINTER, is_pointer

Source = str | os.PathLike | bytes

LARGEST_DOWNLOAD = 2**31  # bytes
DOWNLOAD_SECONDS = 60


class DecodeError(ValueError):
    """A file or value cannot be used: it is unreadable, empty, truncated, of the wrong kind, or above the limits."""

    def __init__(self, source: Any, reason: str):
        reason = POINTER if is_pointer(source) else reason
        super().__init__(f"{describe(source)}: {reason}")
        self.reason = reason
        self.source = describe(source)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.reason)  # by default, only the message would be pickled


def describe(value: Any) -> str:
    """Return a short description of a value for errors: its path, number of bytes, or type and shape."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if file := getattr(value, "filename", None):  # of a PIL image
        return str(file)
    if isinstance(value, (list, tuple)):
        return f"[{describe(value[0])}, ... {len(value)} frames]" if value else "[]"
    shape = getattr(value, "shape", getattr(value, "size", ""))
    return f"<{type(value).__name__} {tuple(shape)}>" if isinstance(shape, tuple) else f"<{type(value).__name__}>"


def is_source(value: Any) -> bool:
    """Tell whether a value is a file, or a sequence of files that are frames, and not decoded data."""
    items = value if isinstance(value, (list, tuple)) and value else [value]
    return all(isinstance(item, (str, os.PathLike, bytes)) or hasattr(item, "read") for item in items)


def file_size(source: Source | Sequence[Source]) -> int:
    """Return the size of a source in bytes. Raises `DecodeError` unless it is one regular file that is not empty."""
    if not isinstance(source, Source):
        raise DecodeError(source, "expected one file, not several frames")
    try:
        size = len(source) if isinstance(source, bytes) else os.stat(source).st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise DecodeError(source, getattr(error, "strerror", None) or str(error)) from error
    regular = isinstance(source, bytes) or os.path.isfile(source)
    if not size or not regular:  # a pipe may have no end
        raise DecodeError(source, "the file is empty" if regular else "the path is not a file")
    return size


def read(source: Source, max_bytes: float = math.inf, first: int | None = None) -> bytes:
    """Return the content of a file, or the first `first` bytes. Do not read a file larger than `max_bytes`.

    Raises `DecodeError` if the source is not a single regular file, is empty or too large, or cannot be read.
    """
    size = file_size(source)
    if size > max_bytes:
        raise DecodeError(source, f"the file has {size} bytes, more than the limit of {max_bytes}")
    if isinstance(source, bytes):
        return source[:first]
    try:
        with open(source, "rb") as file:
            return file.read(first)
    except OSError as error:
        raise DecodeError(source, error.strerror or str(error)) from error


def fetch(source: Any) -> Any:
    """Return the bytes of an http(s) address, or raise `DecodeError`, or of an open file; return other values as is."""
    if hasattr(source, "read"):
        return source.read()
    if not (isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))):
        return source
    from http.client import HTTPException
    from urllib.request import urlopen

    try:
        with urlopen(source, timeout=DOWNLOAD_SECONDS) as answer:
            data = answer.read(LARGEST_DOWNLOAD + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise DecodeError(source, f"the file cannot be downloaded: {error}") from error
    if len(data) > LARGEST_DOWNLOAD:
        raise DecodeError(source, f"the file has more than {LARGEST_DOWNLOAD} bytes")
    return data
