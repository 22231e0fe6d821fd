"""Finds the media file that a row of a table means."""

import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

from ...config import UserError
from ...data.tables import columns_of
from ...files import files_below, is_plain


class MediaFinder:
    """Files below a folder by a pattern: `videos/{video_id}.mp4`.

    `.*` at the end stands for any extension, `**/` for any folders. Names that differ only in how Unicode writes
    an accented letter are the same.
    """

    def __init__(self, root: Path, pattern: str):
        self.root, self.pattern = root, pattern
        self._listings: dict[tuple[str, bool], dict[str, list[str]]] = {}

    def find(self, record: dict[str, Any], where: str) -> str:
        """The path of a record's file below the root; the pattern filled in, where there is no such file.

        Raises:
            UserError: the record lacks a column of the pattern, a value leads out of the root, or two files fit.
        """
        path = fill(self.pattern, record, where)
        if path.startswith("/") or ".." in path.split("/"):
            raise UserError(f"{where}: {path!r} leads out of the folder of the download")
        if not is_plain(path):
            raise UserError(f"{where}: {path!r} is no name of a file")
        if not path.endswith(".*"):
            return path
        folder, deep, stem = path[:-2].rpartition("**/")
        if not deep:
            folder, _, stem = path[:-2].rpartition("/")
        found = self._listing(folder, bool(deep)).get(unicodedata.normalize("NFC", stem), [])
        if len(found) > 1:
            raise UserError(f"{where}: {' and '.join(sorted(found))} both fit {path!r}, keep one")
        return found[0] if found else path

    def _listing(self, folder: str, deep: bool) -> dict[str, list[str]]:
        """Name without extension -> paths below the root, of the files in a folder."""
        if (folder, deep) in self._listings:
            return self._listings[folder, deep]
        names = defaultdict(list)
        self._listings[folder, deep] = names
        place = self.root / folder
        if not place.is_dir():
            return names
        try:
            files = files_below(place) if deep else (file for file in place.iterdir() if not file.is_dir())
            for file in files:
                stem = unicodedata.normalize("NFC", file.name.rpartition(".")[0])
                names[stem].append(file.relative_to(self.root).as_posix())
        except OSError as error:
            raise UserError(f"cannot list {place}: {error.strerror}; --source is the folder of the download") from error
        return names


def fill(pattern: str, record: dict[str, Any], where: str) -> str:
    """A pattern with a record's columns in it.

    Raises:
        UserError: the record lacks a column, or the pattern is wrong.
    """
    try:
        return pattern.format_map(record)
    except KeyError as error:
        raise UserError(f"{where}: no column {error}, it has {columns_of(record)}") from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: {pattern!r} cannot be filled in: {error}") from error
