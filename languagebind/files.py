"""Atomic writes and locks, and functions that read text, JSON and folders."""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file under a temporary name. Rename it once it is on the disk, or delete it after an exception.

    An `OSError`, such as that of a full disk, has the name of the file.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # otherwise a power cut could undo the rename
    finally:
        os.close(folder)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers see all of it or nothing, even after a crash."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` at the end; an exception deletes it."""
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a file lock. The system releases it however this process ends, and forked processes do not inherit it.

    Waits while another process holds the lock, or raises `BlockingIOError`.
    """
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, error.strerror, str(path)) from error
            log.warning("cannot lock %s (%s), so nothing prevents a second run", path, error.strerror)
        yield


_NOT_PLAIN = re.compile("[\0\ud800-\udfff]")
# A byte that is not UTF-8 is kept as a lone surrogate, \udc80 to \udcff, as in Python's file names
_ESCAPED = re.compile("[\udc80-\udcff]")
# What Western languages do not write: three such letters in a row, a sign within a word, and some signs at all
_DOUBTFUL = re.compile(r"[^\W\d_][£-©¬-¹¼-¿×÷]+[^\W\d_]|[‚ƒ†‡ˆ‰˜¤¦¨¬¯¸]")
POINTER = "it is a Git LFS pointer, not the file itself: run git lfs pull in its repository"


def is_plain(text: str) -> bool:
    """Tell whether a string is Unicode text without NUL and without lone surrogates, and so can be a file name."""
    return _NOT_PLAIN.search(text) is None


def printable(text: str) -> str:
    """Return a text with lone surrogates written out as `\\udc80`, so that it can be printed, hashed and stored."""
    return text.encode(errors="backslashreplace").decode()


def decode_text(data: bytes) -> str:
    """Return bytes as text: by their byte order mark, else as UTF-8. Other bytes are read as `mend` describes."""
    return mend(_decoded(data))


def mend(text: str) -> str:
    """Join the halves of characters, and read escaped bytes as Windows-1252 if that is certain.

    It is certain if at most two of them stand together, ASCII letters outnumber them, and they become letters and signs
    of Western languages. Otherwise the text keeps its lone surrogates, and `is_plain` is false for it.
    """
    if is_plain(text):
        return text
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    read = _ESCAPED.sub(lambda byte: bytes([ord(byte[0]) - 0xDC00]).decode("cp1252", "surrogateescape"), text)
    few = len(_ESCAPED.findall(text)) <= len(re.findall("[A-Za-z]", text)) and not re.search("[\udc80-\udcff]{3}", text)
    return read if few and is_plain(read) and not _DOUBTFUL.search(read) else text


def text_lines(data: bytes) -> list[str]:
    """Return the stripped lines of a text. Unlike `str.splitlines`, do not split at U+2028 or form feed."""
    return [mend(line.strip()) for line in _decoded(data).split("\n")]


def _decoded(data: bytes) -> str:
    try:
        return data.decode(json.detect_encoding(data), "surrogateescape")
    except UnicodeDecodeError:  # half of a character in UTF-16
        return data.decode(errors="surrogateescape")


def is_pointer(source: Any) -> bool:
    """Tell whether a file (a path or bytes) is a Git LFS pointer."""
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        with suppress(OSError), open(source, "rb") as file:
            source = file.read(64)
    return isinstance(source, bytes) and source.startswith(b"version https://git-lfs")


def as_on_disk(path: Path) -> Path:
    """Return a path, or if it is missing the file with another spelling of accented letters or of `/`."""
    if os.path.exists(path):
        return path
    folder = next(filter(os.path.isdir, path.parents), path.parent)
    name = str(path.relative_to(folder))
    names = unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name), name.replace("\\", "/")
    return next((folder / x for x in names if os.path.exists(folder / x)), path)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON document. Raises `ValueError` for any other text, and if a key is repeated."""
    try:
        text = decode_text(text) if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_no_twins)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {twice(name for name, _ in pairs)!r} is given twice")
    return found


def twice(names: Iterable[str]) -> str | None:
    """Return the first name that is repeated, or None."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def files_below(folder: Path, fail: Callable | None = None, above: Sequence[str] = ()) -> Iterator[Path]:
    """Yield every file below a folder, sorted by name, with a folder's own files before its subfolders.

    Links are followed, except a link to a folder that contains it, which would never end. Hidden files and folders are
    skipped, and so are folders that cannot be listed, if `fail` takes the error. `above` holds the real paths of
    the parent folders.
    """
    real = os.path.realpath(folder)
    if any(os.path.commonpath([real, known]) == real for known in above):
        return
    try:
        with os.scandir(folder) as listing:
            shown = [entry for entry in listing if not entry.name.startswith(".")]
    except OSError as error:
        if fail is None:
            raise
        return fail(error)
    # os.path.isdir, because entry.is_dir() raises for a link to itself.
    entries = sorted((os.path.isdir(entry) if entry.is_symlink() else entry.is_dir(), entry.name) for entry in shown)
    for is_folder, name in entries:
        if is_folder:
            yield from files_below(folder / name, fail, (*above, real))
        else:
            yield folder / name


def temporary_name(path: Path) -> Path:
    """Return the temporary path that a file is written to before it is renamed to `path`."""
    return path.with_name(f".{path.name}.tmp")
