"""Inputs that are named by an address."""

from http.client import HTTPException
from typing import Any
from urllib.request import urlopen

from . import DecodeError

LARGEST_DOWNLOAD = 2**31  # bytes
DOWNLOAD_SECONDS = 60


def fetch(item: Any) -> Any:
    """The bytes behind an http(s) address; anything else as it is.

    Raises:
        DecodeError: it cannot be downloaded, or is too large.
    """
    if not (isinstance(item, str) and item[:8].lower().startswith(("http://", "https://"))):
        return item
    try:
        with urlopen(item, timeout=DOWNLOAD_SECONDS) as answer:
            data = answer.read(LARGEST_DOWNLOAD + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise DecodeError(item, f"cannot be downloaded: {error}") from error
    if len(data) > LARGEST_DOWNLOAD:
        raise DecodeError(item, f"more than {LARGEST_DOWNLOAD} bytes")
    return data
