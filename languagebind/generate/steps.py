"""What a step of the generation is: entries of an annotation in, files or texts out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..config import UserError, to_dict
from ..data.vidal import LEFT_OUT, SOURCE, media_paths
from ..files import new_folder, write_atomic
from ..modalities import DecodeError, modality_class, with_options

ANY_LENGTH = {"max_seconds": 1e6}
VIDEO: Any = with_options(modality_class("video")(), ANY_LENGTH)
AUDIO: Any = with_options(modality_class("audio")(), ANY_LENGTH)


class Entry(NamedTuple):
    """An entry of an annotation."""

    id: str
    fields: dict[str, Any]
    """folder, title and captions, as in VIDAL's annotation"""

    def places(self, root: Path, modality: str) -> list[list[Path]]:
        """Return the possible locations of its media, as `media_paths` does."""
        return media_paths(root, self.id, str(self.fields.get("folder", "")), modality)

    def video(self, root: Path) -> Path:
        """Return its video: its `source`, or where VIDAL's layout has the clip."""
        return root / self.fields[SOURCE] if SOURCE in self.fields else self.places(root, "video")[0][0]


@dataclass(frozen=True)
class Made:
    """What a step made for one entry."""

    files: Mapping[Path, bytes | Mapping[str, bytes]] = field(default_factory=dict)
    """contents of files, and of whole folders by the names of their files"""
    texts: Mapping[str, Any] = field(default_factory=dict)
    """new fields of the entry"""
    notes: tuple[str, ...] = ()
    """what the report counts, such as `silent`"""


@dataclass(frozen=True)
class Failed:
    """Why a step made nothing for one entry."""

    reason: str
    detail: str


class Unmade(Exception):
    """Nothing can be made for an entry. Holds the reason and details."""


class Step(ABC):
    """One step, built once in each worker. A call changes nothing and does not depend on other calls."""

    name: ClassVar[str]
    source: ClassVar[str] = "video"  # what it reads
    at_once = 1  # entries that a worker makes at the same time

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return what the results depend on, such as the model, its hash and the options."""

    @abstractmethod
    def is_done(self, entry: Entry) -> bool:
        """Tell whether the result of an entry exists, in files or in its fields."""

    def skips(self, fields: Mapping[str, Any]) -> bool:
        """Tell whether an entry gets no result. By default, those that the filter has left out get none."""
        return LEFT_OUT in fields

    @abstractmethod
    def make(self, entry: Entry) -> Made:
        """Return what is made for one entry. Raises `Unmade`, or `DecodeError` if the source cannot be read."""

    def one(self, entry: Entry) -> Made | Failed:
        """Return what is made for one entry, or why nothing is."""
        try:
            return self.make(entry)
        except Unmade as error:
            return Failed(*error.args)
        except DecodeError as error:
            return Failed(f"unreadable {self.source}", f"{entry.id}: {error}")

    def __call__(self, entries: Sequence[Entry]) -> Iterator[Made | Failed]:
        """Yield what is made for each entry, in order; meanwhile, the next ones are made."""
        with ThreadPoolExecutor(self.at_once) as pool:
            yield from pool.map(self.one, entries)

    def finish(self, annotation: Path) -> dict[str, Any]:
        """Do what needs all entries, at the end. Return what the report should say of it."""
        return {}


class FileStep(Step):
    """A step that makes files."""

    def __init__(self, root: Path, options: Any):
        self.root, self.options = root, options

    @abstractmethod
    def results(self, entry: Entry) -> list[Path]:
        """Return the files and folders of an entry that the step makes."""

    def record(self) -> dict[str, Any]:
        return to_dict(self.options)

    def is_done(self, entry: Entry) -> bool:
        return all(path.exists() for path in self.results(entry))


def write(made: Made) -> None:
    """Write the files of one entry. Each file and each folder appears whole, under its name."""
    for path, content in made.files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                write_atomic(path, content)
                continue
            with new_folder(path) as folder:
                for name, data in content.items():
                    (folder / name).write_bytes(data)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
