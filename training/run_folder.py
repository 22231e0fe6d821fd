"""Open the folder of a run, and find the checkpoint to resume from."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from languagebind.config import UserError
from languagebind.distributed import Process, fail_together, on_main
from languagebind.files import locked
from languagebind.remote import file_size, is_url

from .checkpoint_files import damage, latest_undamaged
from .logger import setup_logging
from .params import TrainConfig
from .remote_sync import fetch_run, remote_checkpoints

log = logging.getLogger(__name__)

EXISTS = "exists: use another --name, or continue the run with --resume latest"


def open_run(runs: dict[str, TrainConfig], process: Process, held: ExitStack) -> tuple[Path, Path | str | None]:
    """Create a run's folder, lock it until `held` closes, start logging, and find the checkpoint to resume from."""
    folder, resume = on_main(process, lambda: _open(runs, held))  # all ranks resume from the same checkpoint
    failure = None
    if isinstance(resume, Path) and not resume.is_file():
        failure = f"rank {process.rank} cannot find {resume}: use a folder that all nodes share for --logs"
    fail_together(failure, process.device)
    if not process.is_main:
        setup_logging(None)
    return folder, resume


def _open(runs: dict[str, TrainConfig], held: ExitStack) -> tuple[Path, Path | str | None]:
    config = next(iter(runs.values()))
    options = config.checkpoint
    resume: Path | str | None = options.resume
    notes: list[str] = []
    name = options.name or f"{time.strftime('%Y_%m_%d-%H_%M_%S')}-{'-'.join(runs)}-{config.model.tuning.tuning}"
    folder = options.logs / name
    if (conflict := _conflict(config, folder)) is not None:
        raise UserError(conflict)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(locked(folder / ".lock"))
    except BlockingIOError as error:
        busy = f"another process trains in {folder}, so {folder / '.lock'} is locked: use another --name"
        raise UserError(busy) from error
    if options.resume == "latest":
        resume = latest_undamaged(folder / "checkpoints", notes)
        if resume is None and (url := config.remote.url(name)) is not None:
            resume = fetch_run(url, folder, notes, runs if len(runs) > 1 else ())
        if resume is None:
            notes.append(f"no checkpoint in {folder}: starting from step 0")
    elif options.resume and not is_url(options.resume):
        resume = Path(options.resume)
    setup_logging(folder)  # only now: out.log may have been downloaded
    log.info("run %s", folder)
    for note in notes:
        log.warning(note)
    return folder, resume


def _conflict(config: TrainConfig, folder: Path) -> str | None:
    """Return the reason why a run cannot start in the folder with these options, or None."""
    options, url, own = config.checkpoint, config.remote.url(folder.name), folder / "checkpoints"
    if options.resume == "latest":
        return "--resume latest needs --name, the name of the run to resume" if options.name is None else None
    if options.resume:
        remote, path = is_url(options.resume), Path(options.resume)
        if file_size(options.resume) is None:
            return f"no checkpoint at {options.resume}"
        if own.exists() and any(own.iterdir()) and (remote or path.absolute().parent != own.absolute()):
            return f"{folder} exists, and {options.resume} does not belong to it: use another --name"
        if remote:
            return None
        fault = damage(path)
        return fault and f"{path} is damaged: {fault}"
    if own.exists() or any(folder.glob("**/metrics.jsonl")):
        return f"{folder} {EXISTS}"
    try:
        if url is not None and remote_checkpoints(url):
            return f"{url} {EXISTS}"
    except UserError as error:  # the storage may be available again for the first copy
        log.warning("%s", error)
    return None
