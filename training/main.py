"""Train an encoder:

python -m training.main --config depth --train-data /data/depth

or on several GPUs:

torchrun --nproc_per_node 8 -m training.main -- --config depth --train-data /data/depth
"""

import logging
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace

import yaml

from languagebind.config import UserError, first_line, run, to_dict
from languagebind.distributed import Process, close_process, init_process, is_lost_rank
from languagebind.files import write_atomic
from languagebind.hub.checkpoint import read_parts
from languagebind.modalities import modality_names

from .checkpoint_files import set_aside_later
from .joint import LiveEncoder, mixture_of, parse_runs
from .loader import copied_ahead
from .logger import Logger, log_to_file
from .params import TrainConfig
from .preflight import check_disk
from .remote_sync import RemoteSync
from .run import Run, Runs, interrupts
from .run_folder import open_run
from .start import check, start
from .train import train

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a training from its command line."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) in (["-h"], ["--help"]):
        print(f"{__doc__}\n--modality NAME --help lists the options. Modalities: {', '.join(modality_names())}")
        return
    configs = parse_runs(argv)
    process = init_process(next(iter(configs.values())).device)
    try:
        fit(configs, process)
    except Exception as error:
        known = _known_failure(error, process)
        log_to_file(known or error)
        if known is None:
            raise
        raise known from error
    finally:
        close_process()


def _known_failure(error: Exception, process: Process) -> UserError | None:
    """Return a `UserError` that explains an error of PyTorch, or None for other errors."""
    if not isinstance(error, RuntimeError):
        return None
    if process.world_size > 1 and is_lost_rank(error):
        remedy = "See that rank's log, then continue with --resume latest."
        return UserError(f"Rank {process.rank} lost contact with another rank. {remedy} ({first_line(error)})")
    if re.match(r"DataLoader worker .*(killed|exited)", str(error)):
        remedy = "use fewer --workers or a smaller --shuffle-buffer, and continue with --resume latest"
        return UserError(f"{first_line(error)} This happens when memory runs out: {remedy}")
    if "placement changes" in str(error):  # of FSDP's sharded tensors
        return UserError(f"--engine fsdp does not support this --optimizer: use --engine ddp ({first_line(error)})")
    return None


def fit(configs: dict[str, TrainConfig], process: Process) -> None:
    """Train an encoder for each modality with its options."""
    signals: list[str] = []
    with interrupts(signals, signal.SIGTERM, signal.SIGUSR1), ExitStack() as held:
        checked = {name: check(name, configs, process) for name in configs}  # before a folder is made
        folder, resume = open_run(configs, process, held)
        parts = read_parts(resume) if resume else {}
        if resume and len(configs) > 1 and (absent := configs.keys() - parts.keys()):
            raise UserError(f"cannot resume from {resume}: it has no encoder for {min(absent)}")
        started: dict[str, Run] = {}
        for name, facts in checked.items():
            if several := len(configs) > 1:
                log.info("modality %s", name)
            tower = next((run.state.engine.model for run in started.values()), None)
            saved = (resume, parts[name] if several else next(iter(parts.values()))) if resume else None
            started[name] = start(configs[name], process, folder / name if several else folder, facts, saved, tower)
        runs = Runs(started, mixture_of(configs), folder)
        connect(started)
        check_disk(folder, sum(run.size for run in started.values()), runs.new_checkpoints())
        accept(runs)
        url = runs.first.config.remote.url(folder.name) if process.is_main else None
        frequency = runs.first.config.remote.remote_sync_frequency
        with RemoteSync(folder, url, frequency) if url else nullcontext(), ExitStack() as loaders:
            for run in started.values():
                loaders.enter_context(closing(run.batches))
            # Before the first step, Ctrl-C ends the run, because there is nothing to save
            held.enter_context(interrupts(signals, signal.SIGINT, is_main=process.is_main))
            for run in started.values():
                run.evaluate_missed()
            for run, _ in runs.turns():
                next(run.steps)
                if runs.after_step(run, signals):
                    break
            for run in started.values():
                run.logger.close()


def connect(runs: dict[str, Run]) -> None:
    """Give partners that train in the same process their encoders."""
    for own in runs.values():
        partner = own.state.partner
        if partner is not None and partner.model is None and not partner.stored:
            engine = runs[partner.store.modality].state.engine
            own.state.partner = replace(partner, model=LiveEncoder(engine))


def accept(runs: Runs) -> None:
    """Write the options and start the logs, once all runs have accepted their checkpoint."""
    done, several, is_main = runs.step >= runs.total_steps, len(runs.runs) > 1, runs.process.is_main
    if done and is_main:
        log.warning("nothing to do: %d steps are done, and the options ask for %d", runs.step, runs.total_steps)
    elif is_main:
        set_aside_later(runs.folder / "checkpoints", runs.step)
        if several:
            listed = {"config": [f"{name}/config.yaml" for name in runs.runs]}
            write_atomic(runs.folder / "config.yaml", yaml.safe_dump(listed).encode())
    for name, own in runs.runs.items():
        config, folder = own.config, own.folder
        if is_main and not done:
            folder.mkdir(exist_ok=True)
            again = replace(config, checkpoint=replace(config.checkpoint, resume=None))  # to be given each time
            write_atomic(folder / "config.yaml", yaml.safe_dump(to_dict(again), sort_keys=False).encode())
        label = f"{name} " if several else ""
        own.logger = Logger(folder if is_main else None, config.log, to_dict(config), own.state.step, label)
        # With accumulation, micro-batches stay in host memory until they are used.
        batches = copied_ahead(own.batches, own.process.device) if config.optim.accum_freq == 1 else own.batches
        own.steps = train(own.state, batches, config, own.total_steps // config.optim.epochs, own.logger)


if __name__ == "__main__":
    run(main)
