"""Files that are whole, or not there."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when all of it is on the disk. An exception inside leaves none."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or a power cut could undo the rename
    finally:
        os.close(folder)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees all of it or none of it."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system drops when this process ends, however it ends; forked processes do not hold it.

    Raises:
        BlockingIOError: another process holds it.
    """
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(error.errno, error.strerror, str(path)) from error
            log.warning("%s cannot be locked (%s): nothing keeps a second run out", path, error.strerror)
        yield


def is_plain(text: str) -> bool:
    """Whether a text can be a file's name and be written as UTF-8: no NUL, and no half of a surrogate pair."""
    return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text)


def files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every file below a folder, in the order of the names, a folder's own files first; links are followed.

    A link back to a folder that it lies in is passed over: such loops multiply files without end.

    Args:
        folder: where to look.
        above: the real paths of the folders that led here.

    Raises:
        OSError: a folder cannot be listed.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as listing:
        # A link to itself is no folder; entry.is_dir() would raise.
        entries = sorted((os.path.isdir(e) if e.is_symlink() else e.is_dir(), e.name) for e in listing)
    for is_folder, name in entries:
        if is_folder:
            yield from files_below(folder / name, (*above, real))
        else:
            yield folder / name


def temporary_name(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(f".{path.name}.tmp")
