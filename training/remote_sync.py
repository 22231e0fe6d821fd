"""Copies a run's folder to a store while it trains, in a thread that never holds up or ends the run."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from languagebind.config import UserError, at_least, first_line
from languagebind.files import temporary_name
from languagebind.hub.checkpoint import checkpoint_step, checkpoints_by_step
from languagebind.remote import MissingFile, is_url, join, locate, reaching

from .checkpoint_files import damage

log = logging.getLogger(__name__)

# What is copied again whenever it has changed; before a run goes on elsewhere, it is fetched.
RECORDS = (
    "config.yaml", "metrics.jsonl", "skipped.jsonl", "out.log", "checkpoints/best.json", "checkpoints/best.pt",
)  # fmt: skip

# Seconds between two warnings that a store fails, and for the last copy when the run has ended.
WARN_EVERY = 600
FINAL_WAIT = 300


@dataclass(frozen=True)
class RemoteConfig:
    """Copying the run to a store."""

    remote_sync: str | None = None
    """URL of a folder (s3://bucket/runs) that gets a copy of the run's folder; `--resume latest` looks there, too"""
    remote_sync_frequency: int = 300
    """seconds between two copies"""

    def __post_init__(self):
        at_least(1, remote_sync_frequency=self.remote_sync_frequency)
        if self.remote_sync is not None and not is_url(self.remote_sync):
            raise UserError(f"--remote-sync is a URL, s3://bucket/runs for one; got {self.remote_sync!r}")


@contextmanager
def syncing(folder: Path, config: RemoteConfig, is_main: bool) -> Iterator[None]:
    """Copy a run's folder on the main rank until the block ends, and then once more.

    Raises:
        UserError: the package that the URL needs is not installed.
    """
    if config.remote_sync is None or not is_main:
        yield
        return
    locate(config.remote_sync)
    sync = RemoteSync(folder, join(config.remote_sync, folder.name), config.remote_sync_frequency)
    sync.start()
    try:
        yield
    finally:
        sync.stop()


class RemoteSync(threading.Thread):
    """Args:
    folder: the run's folder.
    url: what becomes its copy.
    every: seconds between two copies.
    """

    def __init__(self, folder: Path, url: str, every: float):
        super().__init__(name="remote-sync", daemon=True)  # a store that hangs must not keep the process alive
        self.folder, self.url, self.every = folder, url, every
        self.copied: dict[str, tuple[int, int]] = {}
        """size and time of what the store has, by name within the folder"""
        self.aside: set[Path] = set()
        """what was set aside in the folder, and looked for in the store"""
        self.warned = -float(WARN_EVERY)
        self.failure: str | None = None
        self.ending = threading.Event()

    def run(self) -> None:
        self.attempt()  # at once: what this run has left must not be taken for it by the next one
        while not self.ending.wait(self.every):
            self.attempt()
        self.attempt()

    def stop(self, wait: float = FINAL_WAIT) -> None:
        """Copy once more; wait at most so many seconds for it."""
        self.ending.set()
        self.join(wait)
        if self.is_alive():
            log.warning("the last copy to %s is not done after %d s and is left so", self.url, wait)
        elif self.failure:
            log.warning("%s lacks what came last: %s. The run's folder has all of it", self.url, self.failure)

    def attempt(self) -> None:
        """One copy; a failure is logged, at most once in `WARN_EVERY` seconds, and tried again the next time."""
        try:
            self.copy()
            self.failure = None
        except Exception as error:  # whatever it is, the training goes on
            self.failure = first_line(error)
            if time.monotonic() - self.warned >= WARN_EVERY:
                self.warned = time.monotonic()
                log.warning("cannot copy to %s, trying again: %s", self.url, self.failure)

    def copy(self) -> None:
        """Copy what is new, the oldest checkpoint first, and remove what is gone.

        Raises:
            UserError: the store failed.
        """
        fs, root = locate(self.url)
        checkpoints = [f"checkpoints/{path.name}" for path in checkpoints_by_step(self.folder / "checkpoints")]
        with reaching(self.url):
            self.set_aside(fs, root)
            for name in [*checkpoints, *RECORDS]:
                try:
                    found = (self.folder / name).stat()
                    state = (found.st_size, found.st_mtime_ns)
                    if self.copied.get(name) == state:
                        continue
                    fs.makedirs(join(root, name).rpartition("/")[0], exist_ok=True)
                    fs.put_file(str(self.folder / name), join(root, name))  # an object is whole, or not there
                    self.copied[name] = state
                except FileNotFoundError:
                    if (self.folder / name).exists():
                        raise
            self.remove_outdated(fs, root)

    def set_aside(self, fs, root: str) -> None:
        """Rename in the store what `set_aside_later` renamed in the folder."""
        for path in sorted(set((self.folder / "checkpoints").glob("*.left*")) - self.aside):
            name = f"checkpoints/{path.name.partition('.left')[0]}"
            if not (self.folder / name).exists() and name not in self.copied and fs.exists(join(root, name)):
                fs.mv(join(root, name), join(root, f"checkpoints/{path.name}"))
            self.aside.add(path)

    def remove_outdated(self, fs, root: str) -> None:
        """Of the checkpoints that this run copied, remove those that are gone from its folder, if a newer one stays."""
        ours = _by_step(self.copied)
        for name in ours[:-1]:
            if not (self.folder / name).exists():
                fs.rm_file(join(root, name))
                del self.copied[name]


def fetch_run(config: RemoteConfig, folder: Path) -> tuple[Path | None, list[str]]:
    """Fetch the newest whole checkpoint of a run, and its records, so that these go on rather than begin anew.

    Returns:
        The checkpoint in the run's folder, None where the store has none; and what there is to say of it.

    Raises:
        UserError: the store cannot be reached, or what it has cannot be written.
    """
    notes = []
    for name in reversed(remote_checkpoints(config, folder.name)):
        url = join(config.remote_sync, folder.name, "checkpoints", name)
        path = _fetch(config, folder, f"checkpoints/{name}")
        if (fault := damage(path)) is None:
            notes.append(f"no checkpoint in {folder}: fetched {url}")
            break
        path.unlink()
        notes.append(f"{url} is damaged ({fault}): it is passed over")
    else:
        return None, notes
    for record in RECORDS:
        if not (folder / record).exists():
            with suppress(MissingFile):
                _fetch(config, folder, record)
    return path, notes


def _fetch(config: RemoteConfig, folder: Path, name: str) -> Path:
    """One file of the run in the store: whole under its name, or not there."""
    url, path = join(config.remote_sync, folder.name, name), folder / name
    fs, source = locate(url)
    part = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with reaching(url):
            fs.get_file(source, str(part))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def remote_checkpoints(config: RemoteConfig, run: str) -> list[str]:
    """Names of the checkpoints that the store has of a run, the oldest first.

    Raises:
        UserError: the store cannot be reached.
    """
    if config.remote_sync is None:
        return []
    url = join(config.remote_sync, run, "checkpoints")
    fs, path = locate(url)
    with reaching(url):
        fs.invalidate_cache()
        entries = fs.ls(path, detail=False) if fs.exists(path) else ()
        return [name.rpartition("/")[2] for name in _by_step(entries)]


def refuse_overwriting(config: RemoteConfig, run: str) -> str | None:
    """Why a new run may not have this name: the store has checkpoints of another one. None where it may.

    A store that cannot be reached is no reason: it may be there when there is something to copy.
    """
    try:
        if remote_checkpoints(config, run):
            return f"{join(config.remote_sync, run)} exists: choose another --name, or go on with --resume latest"
    except UserError as error:
        log.warning("%s", error)
    return None


def _by_step(names: Iterable[str]) -> list[str]:
    """Those that are checkpoints, in whatever folder, the oldest first."""
    steps = {name: checkpoint_step(name.rpartition("/")[2]) for name in names}
    return sorted((name for name, step in steps.items() if step is not None), key=steps.get)
