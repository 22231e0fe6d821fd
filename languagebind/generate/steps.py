"""What a step of the generation is: entries of an annotation in, files or texts out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..config import UserError
from ..data.vidal import LEFT_OUT
from ..files import new_folder, write_atomic


class Entry(NamedTuple):
    """An entry of an annotation."""

    id: str
    fields: dict[str, Any]
    """folder, title and captions, as in VIDAL's annotation"""


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


class Step(ABC):
    """One step, built once in each worker. A call has no effect but its result, and does not depend on other calls."""

    name: ClassVar[str]
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
    def one(self, entry: Entry) -> Made | Failed:
        """Return what is made for one entry."""

    def __call__(self, entries: Sequence[Entry]) -> Iterator[Made | Failed]:
        """Yield what is made for each entry, in order; meanwhile, the next ones are made."""
        with ThreadPoolExecutor(self.at_once) as pool:
            yield from pool.map(self.one, entries)

    def finish(self, annotation: Path) -> dict[str, Any]:
        """Do what needs all entries, at the end. Return what the report should say of it."""
        return {}


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
