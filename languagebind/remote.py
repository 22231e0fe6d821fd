"""Files behind URLs (s3://, gs://, hf://, memory://, ...), through fsspec: listed, read, and copied to the disk.

Every call looks its file system up anew: fsspec keeps one for each process and thread, so that a forked loader worker
never uses the connections of its parent.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from .config import UserError, first_line

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_GLOB = re.compile(r"[*?\[]")

# Seconds without an answer, after which a request fails. s3fs and gcsfs try a request again 5 times, with growing
# pauses; botocore's own tries would multiply that.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 20, "retries": {"max_attempts": 0}}},
    "gs": {"requests_timeout": 20},
}
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}

# What changes when an object does: s3's and http's ETag, gs's generation, the hub's blob_id, else size and time.
_VERSION = ("ETag", "generation", "blob_id", "size", "mtime", "created")

# Bytes of a read ahead: a shard is read from its beginning to its end.
_BLOCK = 8 * 2**20


class MissingFile(UserError):
    """There is no such object behind a URL."""


def is_url(name: str | os.PathLike) -> bool:
    """Whether a name is `scheme://...`; `pipe:` commands are not."""
    return _URL.match(os.fspath(name)) is not None


def join(folder: str, *names: str) -> str:
    """A name below a folder or a URL."""
    return "/".join([folder.rstrip("/"), *names])


def locate(url: str):
    """The fsspec file system of a URL, and the path in it.

    Raises:
        UserError: no such protocol, or its package is not installed.
    """
    protocol = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url, **_OPTIONS.get(protocol, {}))
    except ImportError as error:
        package = _PACKAGES.get(protocol, "fsspec")
        raise UserError(f"{url} needs the package {package}: pip install {package} ({first_line(error)})") from error
    except ValueError as error:
        raise UserError(f"{url}: {first_line(error)}") from error


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """What goes wrong with a store, as a `UserError`: each store has exceptions of its own.

    Raises:
        MissingFile: there is no such object.
        UserError: it cannot be reached or read.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingFile(f"there is no {url}") from error
    except PermissionError as error:
        raise UserError(
            f"{url} may not be read: {first_line(error)}. Are the credentials those of its owner?"
        ) from error
    except Exception as error:
        raise UserError(f"cannot reach {url}: {type(error).__name__}: {first_line(error)}") from error


def open_url(url: str) -> BinaryIO:
    """A file to read, which can seek. Reading may raise exceptions of the store's own.

    Raises:
        MissingFile, UserError: as `reaching`.
    """
    fs, path = locate(url)
    with reaching(url):
        return fs.open(path, "rb", block_size=_BLOCK)


def read_url(url: str, begin: int | None = None, end: int | None = None) -> bytes:
    """The bytes from `begin` to before `end`, by default all.

    Raises:
        MissingFile, UserError: as `reaching`.
    """
    fs, path = locate(url)
    with reaching(url):
        return fs.cat_file(path, start=begin, end=end)


def folder_sizes(url: str) -> dict[str, int]:
    """Bytes of each file directly in a folder, by name; empty where there is none.

    Listed once in each process: fsspec keeps the answer.

    Raises:
        UserError: it cannot be reached or listed.
    """
    fs, path = locate(url)
    with reaching(url):
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
    return {entry["name"].rpartition("/")[2]: entry["size"] or 0 for entry in entries if entry["type"] == "file"}


def file_size(url: str) -> int | None:
    """Bytes of one file; None where there is none.

    Raises:
        UserError: it cannot be reached.
    """
    folder, _, name = url.rpartition("/")
    if url.startswith(("http://", "https://")):  # a page that links to its files is no listing with sizes
        fs, path = locate(url)
        with reaching(url):
            return fs.info(path)["size"] if fs.exists(path) else None
    return folder_sizes(folder).get(name)


def find_files(url: str, suffix: str) -> list[str]:
    """The files that a URL stands for, in order: a glob, a file, or a folder whose files end with `suffix`.

    Raises:
        MissingFile: there is none.
        UserError: it cannot be reached.
    """
    if _GLOB.search(url.partition("://")[2]):
        fs, path = locate(url)
        with reaching(url):
            found = [fs.unstrip_protocol(name) for name in sorted(fs.glob(path))]
    elif url.endswith(suffix) and file_size(url) is not None:
        found = [url]
    else:
        found = [join(url, name) for name in sorted(folder_sizes(url)) if name.endswith(suffix)]
    if not found:
        raise MissingFile(f"there is no {url}, or nothing named *{suffix} in it")
    return found


@contextmanager
def fetched(name: str) -> Iterator[Path]:
    """A file on the disk with the contents of a URL, removed afterwards; a local file as it is.

    Raises:
        MissingFile, UserError: as `reaching`.
    """
    if not is_url(name):
        yield Path(name)
        return
    fs, path = locate(name)
    with tempfile.TemporaryDirectory(prefix="languagebind-") as folder:
        copy = Path(folder) / name.rpartition("/")[2]
        with reaching(name):
            fs.get_file(path, str(copy))
        yield copy


@lru_cache(4096)
def local_copy(url: str) -> Path:
    """A copy of a file in ~/.cache/languagebind, made once: all processes of this machine share it.

    Raises:
        MissingFile, UserError: as `reaching`.
    """
    fs, path = locate(url)
    with reaching(url):
        info = fs.info(path)
        version = repr((url, [info.get(key) for key in _VERSION]))
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "languagebind"
        copy = cache / hashlib.sha256(version.encode()).hexdigest()[:24] / url.rpartition("/")[2]
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=copy.parent) as folder:
                fs.get_file(path, str(Path(folder) / copy.name))
                (Path(folder) / copy.name).replace(copy)
    return copy
