"""Copy a run's folder to remote storage during training, in a thread that never blocks or ends the run."""

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from languagebind.config import UserError, at_least, first_line
from languagebind.hub.checkpoint import checkpoints_by_step, sorted_by_step
from languagebind.remote import MissingFile, download, folder_sizes, is_url, join, locate, reaching

from .checkpoint_files import damage

log = logging.getLogger(__name__)

# Files that are copied when they change, and fetched when a run continues on another machine.
LOGS = ("config.yaml", "metrics.jsonl", "skipped.jsonl")  # also of each modality, where several train together
RECORDS = (*LOGS, "out.log", "checkpoints/best.json", "checkpoints/best.pt")

WARN_EVERY = 600  # minimum seconds between warnings about failed copies
FINAL_WAIT = 300  # seconds to wait for the last copy at the end of a run


@dataclass(frozen=True)
class RemoteConfig:
    """Copies of the run in remote storage."""

    remote_sync: str | None = None
    """URL of the folder (s3://bucket/runs) for a copy of the run; `--resume latest` also looks there"""
    remote_sync_frequency: int = 300
    """seconds between copies"""

    def __post_init__(self):
        at_least(1, remote_sync_frequency=self.remote_sync_frequency)
        if self.remote_sync is not None and not is_url(self.remote_sync):
            raise UserError(f"--remote-sync should be a URL such as s3://bucket/runs, got {self.remote_sync!r}")

    def url(self, run: str) -> str | None:
        """Return the URL of a run's copy, or None without --remote-sync."""
        return None if self.remote_sync is None else join(self.remote_sync, run)


class RemoteSync(threading.Thread):
    """Copies a folder to a URL every `every` seconds until it is stopped, and once more at the end.

    fsspec.generic.rsync compares only sizes, but all checkpoints of a run have one size. It also deletes other files.
    """

    def __init__(self, folder: Path, url: str, every: float):
        super().__init__(name="remote-sync", daemon=True)  # a hanging copy must not keep the process alive
        self.folder, self.url, self.every = folder, url, every
        self.copied: dict[str, tuple[int, int]] = {}  # a file's path in the folder -> its size and modification time
        self.warned = -float(WARN_EVERY)
        self.failure: str | None = None
        self.ending = threading.Event()

    def __enter__(self) -> "RemoteSync":
        locate(self.url)  # raises if the package for the URL is not installed
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
        """Copy once more, and wait for it for at most `wait` seconds."""
        self.ending.set()
        self.join(wait)
        if self.is_alive():
            log.warning("the last copy to %s did not finish in %d s: copy the run's folder by hand", self.url, wait)
        elif self.failure:
            log.warning("%s lacks the last changes: %s. Copy the run's folder by hand", self.url, self.failure)

    def attempt(self) -> None:
        """Copy once. After a failure, warn at most once in `WARN_EVERY` seconds; the next copy tries again."""
        try:
            self.copy()
            self.failure = None
        except Exception as error:  # training continues after any error
            self.failure = first_line(error)
            if time.monotonic() - self.warned >= WARN_EVERY:
                self.warned = time.monotonic()
                log.warning("cannot copy to %s, trying again: %s", self.url, self.failure)

    def copy(self) -> None:
        """Copy new and changed files, the oldest checkpoint first, and remove outdated remote checkpoints."""
        fs, root = locate(self.url)
        checkpoints = [f"checkpoints/{path.name}" for path in checkpoints_by_step(self.folder / "checkpoints")]
        with reaching(self.url):
            self._set_aside(fs, root)
            logs = [path.relative_to(self.folder).as_posix() for name in LOGS for path in self.folder.glob(f"*/{name}")]
            for name in [*checkpoints, *RECORDS, *logs]:
                path, target = self.folder / name, join(root, name)
                try:
                    state = (path.stat().st_size, path.stat().st_mtime_ns)
                    if self.copied.get(name) != state:
                        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                        fs.put_file(str(path), target)  # the object appears when it is complete
                        self.copied[name] = state
                except FileNotFoundError:
                    if path.exists():  # otherwise not written yet, or removed by --keep-last
                        raise
            # Remove copies of checkpoints that this run has removed, but never the newest copy.
            for name in sorted_by_step(self.copied)[:-1]:
                if not (self.folder / name).exists():
                    fs.rm_file(join(root, name))
                    del self.copied[name]

    def _set_aside(self, fs, root: str) -> None:
        """Rename the copies of checkpoints that `set_aside_later` renamed in the folder."""
        for path in sorted((self.folder / "checkpoints").glob("*.left*")):
            name = f"checkpoints/{path.name.partition('.left')[0]}"
            if not (self.folder / name).exists() and name not in self.copied and fs.exists(join(root, name)):
                fs.mv(join(root, name), join(root, f"checkpoints/{path.name}"))


def fetch_run(url: str, folder: Path, notes: list[str], modalities: Iterable[str] = ()) -> Path | None:
    """Download a run's newest undamaged checkpoint and its logs; return the checkpoint, or None if there is none."""
    for name in reversed(remote_checkpoints(url)):
        source, path = join(url, "checkpoints", name), folder / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        download(source, path)
        if (fault := damage(path)) is None:
            notes.append(f"no checkpoint in {folder}: fetched {source}")
            for record in [*RECORDS, *(f"{modality}/{file}" for modality in modalities for file in LOGS)]:
                (folder / record).parent.mkdir(exist_ok=True)
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
    locate(folder)[0].invalidate_cache()  # the run may have written since the last listing
    return sorted_by_step(folder_sizes(folder))
