"""List, read and download files behind URLs (s3://, gs://, hf://, memory://, ...) with fsspec.

Each call looks up its file system again. fsspec keeps one per process and thread, so a forked loader worker never uses
its parent's connections. All raise `MissingFile` if the object does not exist, and `UserError` if the store fails.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from posixpath import join as join  # of URLs, too
from typing import IO, Any

from .config import UserError, first_line

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_GLOB = re.compile(r"[*?\[]")

# Timeouts in seconds. s3fs and gcsfs retry 5 times with growing pauses; botocore's own retries would multiply that.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 20, "retries": {"max_attempts": 0}}},
    "gs": {"requests_timeout": 20},
}

# Fields that change with the object: ETag (s3, http), generation (gs), blob_id (hf), otherwise size and time.
_VERSION = ("ETag", "generation", "blob_id", "size", "mtime", "created")

# Read-ahead in bytes: shards are read from start to end.
_BLOCK = 8 * 2**20


class MissingFile(UserError):
    """There is no object at the URL."""


def is_url(name: str | os.PathLike) -> bool:
    """Tell whether a name is a URL, `scheme://...`; `pipe:` commands are not URLs."""
    return _URL.match(os.fspath(name)) is not None


def locate(url: str):
    """Return a URL's fsspec file system and the path in it. Raises `UserError` if its protocol is not installed."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url, **_OPTIONS.get(url.partition("://")[0], {}))
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {first_line(error)}") from error


@contextmanager
def reaching(url: str) -> Iterator[tuple[Any, str]]:
    """Yield what `locate` returns; turn any error of the store into a `UserError`, as each has its own exceptions."""
    try:
        yield locate(url)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingFile(f"there is no {url}") from error
    except Exception as error:
        raise UserError(f"cannot reach {url}: {type(error).__name__}: {first_line(error)}") from error


def open_url(url: str) -> IO[bytes]:
    """Open a seekable remote file for reading. Later reads may raise the store's own exceptions."""
    with reaching(url) as (fs, path):
        return fs.open(path, "rb", block_size=_BLOCK)


def read_url(url: str, begin: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes of a remote file from `begin` up to `end`, by default all of them."""
    with reaching(url) as (fs, path):
        return fs.cat_file(path, start=begin, end=end)


def folder_sizes(url: str) -> dict[str, int]:
    """Return name -> size in bytes of the files directly in a folder, or {} without one. fsspec caches the listing."""
    with reaching(url) as (fs, path):
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
    return {entry["name"].rpartition("/")[2]: entry["size"] or 0 for entry in entries if entry["type"] == "file"}


def file_sizes(names: Iterable[str | os.PathLike]) -> Iterator[int | None]:
    """Yield what `file_size` returns of each file. Folders of URLs are listed once."""
    return map(partial(file_size, sizes_in=cache(folder_sizes)), names)


def file_size(url: str | os.PathLike, sizes_in: Callable[[str], Mapping[str, int]] = folder_sizes) -> int | None:
    """Return the size of a file (a path or URL) in bytes, or None if there is no such file."""
    if not is_url(url):
        return os.path.getsize(url) if os.path.isfile(url) else None
    url = os.fspath(url)
    folder, _, name = url.rpartition("/")
    if url.startswith(("http://", "https://")):  # an HTTP listing does not give file sizes
        with reaching(url) as (fs, path):
            return fs.info(path)["size"] if fs.exists(path) else None
    return sizes_in(folder).get(name)


def find_files(url: str, suffix: str) -> list[str]:
    """Return the sorted files of a URL: the matches of a glob, one file, or a folder's files that end with `suffix`."""
    if _GLOB.search(url.partition("://")[2]):
        with reaching(url) as (fs, path):
            found = [fs.unstrip_protocol(name) for name in sorted(fs.glob(path))]
    elif url.endswith(suffix) and file_size(url) is not None:
        found = [url]
    else:
        found = [join(url, name) for name in sorted(folder_sizes(url)) if name.endswith(suffix)]
    if not found:
        raise MissingFile(f"there is no {url}, or it has no *{suffix} files")
    return found


def download(url: str, path: Path) -> None:
    """Download an object to `path`. The file is renamed once complete, so a killed process leaves no partial file."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder, reaching(url) as (fs, source):
        part = Path(folder) / path.name
        fs.get_file(source, str(part))
        part.replace(path)


@contextmanager
def fetched(name: str) -> Iterator[Path]:
    """Yield the path of a local file, or of a temporary copy of the file behind a URL."""
    if not is_url(name):
        yield Path(name)
        return
    with tempfile.TemporaryDirectory(prefix="languagebind-") as folder:
        copy = Path(folder) / name.rpartition("/")[2]
        download(name, copy)
        yield copy


@lru_cache(4096)
def local_copy(url: str) -> Path:
    """Return the path of a copy in ~/.cache/languagebind, downloaded once for all processes of this machine.

    fsspec's own file cache downloads straight to the final name, so another rank could read half a file.
    """
    with reaching(url) as (fs, path):
        info = fs.info(path)
    version = repr((url, [info.get(key) for key in _VERSION]))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "languagebind"
    copy = cache / hashlib.sha256(version.encode()).hexdigest()[:24] / url.rpartition("/")[2]
    if not copy.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        download(url, copy)
    return copy
