"""Copy a run's folder to a store while it trains, in a thread that never holds up or ends the run."""

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from languagebind.config import UserError, at_least, first_line
from languagebind.hub.checkpoint import checkpoint_step, checkpoints_by_step
from languagebind.remote import MissingFile, download, folder_sizes, is_url, join, locate, reaching

from .checkpoint_files import damage

log = logging.getLogger(__name__)

# Files that are copied whenever they have changed, and fetched when a run continues on another machine.
RECORDS = (
    "config.yaml", "metrics.jsonl", "skipped.jsonl", "out.log", "checkpoints/best.json", "checkpoints/best.pt",
)  # fmt: skip

WARN_EVERY = 600  # seconds between two warnings that a store fails
FINAL_WAIT = 300  # seconds to wait for the last copy at the end of a run


@dataclass(frozen=True)
class RemoteConfig:
    """Copying the run to a store."""

    remote_sync: str | None = None
    """URL of a folder (s3://bucket/runs) to copy the run's folder to; `--resume latest` looks there as well"""
    remote_sync_frequency: int = 300
    """seconds between two copies"""

    def __post_init__(self):
        at_least(1, remote_sync_frequency=self.remote_sync_frequency)
        if self.remote_sync is not None and not is_url(self.remote_sync):
            raise UserError(f"--remote-sync should be a URL such as s3://bucket/runs, got {self.remote_sync!r}")

    def url(self, run: str) -> str | None:
        """Return the URL of a run's copy; None if runs are not copied."""
        return None if self.remote_sync is None else join(self.remote_sync, run)


class RemoteSync(threading.Thread):
    """Copies a folder to a URL every so many seconds while it is open, and once more at the end.

    fsspec.generic.rsync would compare sizes, which are equal for all checkpoints of a run, and delete those of others.
    """

    def __init__(self, folder: Path, url: str, every: float):
        super().__init__(name="remote-sync", daemon=True)  # a store that hangs must not keep the process alive
        self.folder, self.url, self.every = folder, url, every
        self.copied: dict[str, tuple[int, int]] = {}
        """size and time of what is in the store, by name within the folder"""
        self.warned = -float(WARN_EVERY)
        self.failure: str | None = None
        self.ending = threading.Event()

    def __enter__(self) -> "RemoteSync":
        locate(self.url)  # raises if its package is not installed
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def run(self) -> None:
        self.attempt()  # at once: the next run must not resume from a checkpoint that this run set aside
        while not self.ending.wait(self.every):
            self.attempt()
        self.attempt()

    def stop(self, wait: float = FINAL_WAIT) -> None:
        """Copy once more, and wait at most so many seconds for it."""
        self.ending.set()
        self.join(wait)
        if self.is_alive():
            log.warning("the last copy to %s is not done after %d s and is abandoned", self.url, wait)
        elif self.failure:
            log.warning("%s lacks what came last: %s. The run's folder has everything", self.url, self.failure)

    def attempt(self) -> None:
        """Copy once. A failure is retried the next time, and logged at most once in `WARN_EVERY` seconds."""
        try:
            self.copy()
            self.failure = None
        except Exception as error:  # whatever it is, training continues
            self.failure = first_line(error)
            if time.monotonic() - self.warned >= WARN_EVERY:
                self.warned = time.monotonic()
                log.warning("cannot copy to %s, trying again: %s", self.url, self.failure)

    def copy(self) -> None:
        """Copy what is new, the oldest checkpoint first, and remove outdated checkpoints from the store."""
        fs, root = locate(self.url)
        checkpoints = [f"checkpoints/{path.name}" for path in checkpoints_by_step(self.folder / "checkpoints")]
        with reaching(self.url):
            self._set_aside(fs, root)
            for name in [*checkpoints, *RECORDS]:
                if not (self.folder / name).exists():
                    continue
                found = (self.folder / name).stat()
                state = (found.st_size, found.st_mtime_ns)
                if self.copied.get(name) != state:
                    fs.makedirs(join(root, name).rpartition("/")[0], exist_ok=True)
                    fs.put_file(str(self.folder / name), join(root, name))  # an object is complete, or not there
                    self.copied[name] = state
            # A checkpoint that this run copied and then removed, if a newer one is there.
            for name in _by_step(self.copied)[:-1]:
                if not (self.folder / name).exists():
                    fs.rm_file(join(root, name))
                    del self.copied[name]

    def _set_aside(self, fs, root: str) -> None:
        """Rename in the store what `set_aside_later` renamed in the folder."""
        for path in sorted((self.folder / "checkpoints").glob("*.left*")):
            name = f"checkpoints/{path.name.partition('.left')[0]}"
            if not (self.folder / name).exists() and name not in self.copied and fs.exists(join(root, name)):
                fs.mv(join(root, name), join(root, f"checkpoints/{path.name}"))


def fetch_run(url: str, folder: Path, notes: list[str]) -> Path | None:
    """Fetch a run's newest undamaged checkpoint, if the store has one, and its records, so that they continue."""
    for name in reversed(remote_checkpoints(url)):
        source, path = join(url, "checkpoints", name), folder / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        download(source, path)
        if (fault := damage(path)) is None:
            notes.append(f"no checkpoint in {folder}: fetched {source}")
            for record in RECORDS:
                if not (folder / record).exists():
                    with suppress(MissingFile):
                        download(join(url, record), folder / record)
            return path
        path.unlink()
        notes.append(f"skipping {source}, which is damaged: {fault}")
    return None


def remote_checkpoints(url: str) -> list[str]:
    """Return the names of the checkpoints in a run's copy, oldest first."""
    folder = join(url, "checkpoints")
    locate(folder)[0].invalidate_cache()  # the run may have written since it was listed
    return _by_step(folder_sizes(folder))


def _by_step(names: Iterable[str]) -> list[str]:
    """Return the names that are checkpoints, in any folder, oldest first."""
    steps = {name: checkpoint_step(name.rpartition("/")[2]) for name in names}
    return [name for _, name in sorted((step, name) for name, step in steps.items() if step is not None)]
