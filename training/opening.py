"""A run's folder and the checkpoint that the run goes on from."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from languagebind.config import UserError
from languagebind.distributed import Process, fail_together, gather_objects, world_size
from languagebind.files import locked
from languagebind.remote import file_size, is_url

from .checkpoint_files import damage, latest_whole
from .logger import setup_logging
from .params import TrainConfig
from .remote_sync import fetch_run, refuse_overwriting

log = logging.getLogger(__name__)


def open_run(config: TrainConfig, process: Process, held: ExitStack) -> tuple[Path, Path | str | None]:
    """The run's folder, made and with logging into it, and the checkpoint to go on from.

    Raises:
        UserError: the folder is there already and nothing says to go on; or there is no such checkpoint.
    """
    options, failure, resume, warnings = config.checkpoint, None, None, []
    name = options.name or f"{time.strftime('%Y_%m_%d-%H_%M_%S')}-{config.modality}-{config.model.tuning.tuning}"
    folder = options.logs / gather_objects(name)[0]
    if options.resume == "latest" and options.name is None:
        failure = "--resume latest needs --name: the run that it is the latest of"
    elif options.resume == "latest":
        # One rank looks, so that all go on from the same one.
        resume, warnings, failure = gather_objects(find_latest(config, folder) if process.is_main else None)[0]
    elif options.resume:
        resume = options.resume if is_url(options.resume) else Path(options.resume)
        if process.is_main and _is_anothers(resume, folder):
            failure = f"{folder} exists, and {resume} is not of it: choose another --name"
    elif process.is_main and ((folder / "checkpoints").exists() or (folder / "metrics.jsonl").exists()):
        failure = f"{folder} exists: choose another --name, or go on from it with --resume latest"
    elif process.is_main:
        failure = refuse_overwriting(config.remote, folder.name)
    if resume is not None and failure is None:
        failure = _unusable(resume, process.is_main and options.resume != "latest")
    if process.is_main and failure is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / ".lock"))
        except BlockingIOError:
            failure = f"another process trains in {folder}: {folder / '.lock'} is locked. Choose another --name"
        except OSError as error:
            failure = f"cannot make {folder}: {error.strerror}"
    fail_together(failure, process.device)  # from here, the folder is there for every rank
    setup_logging(folder if process.is_main else None)
    log.info("run %s", folder)
    for warning in warnings if process.is_main else ():
        log.warning(warning)
    if options.resume == "latest" and resume is None:
        log.warning("no checkpoint in %s: starting from step 0", folder)
    return folder, resume


def find_latest(config: TrainConfig, folder: Path) -> tuple[Path | None, list[str], str | None]:
    """The newest whole checkpoint of a run, from its folder or else from the store, what to warn of, and a failure."""
    try:
        path, warnings = latest_whole(folder / "checkpoints")
        if path is None:
            path, more = fetch_run(config.remote, folder)
            warnings += more
    except (UserError, OSError) as error:
        return None, [], str(error)
    return path, warnings, None


def _is_anothers(checkpoint: Path | str, folder: Path) -> bool:
    """Whether a run's folder has checkpoints, and this is none of them."""
    own = (folder / "checkpoints").absolute()
    return own.exists() and any(own.iterdir()) and Path(checkpoint).absolute().parent != own


def _unusable(checkpoint: Path | str, check: bool) -> str | None:
    """Why this rank cannot go on from a checkpoint; None: it can.

    Args:
        check: look at its checksums, too, which takes seconds: one rank is enough.
    """
    if is_url(checkpoint):
        return None if file_size(checkpoint) is not None else f"no checkpoint at {checkpoint}"
    if not checkpoint.is_file():
        return f"no checkpoint at {checkpoint}" + (
            " on every node: --logs should be a folder that all nodes see" if world_size() > 1 else ""
        )
    fault = damage(checkpoint) if check else None
    return fault and f"{checkpoint} is damaged: {fault}"
