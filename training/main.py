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
from pathlib import Path
from typing import cast

import torch
import yaml

import languagebind
from languagebind.config import UserError, first_line, run, to_dict
from languagebind.data.feature_store import open_text_features
from languagebind.distributed import Process, close_process, init_process, is_lost_rank
from languagebind.eval import ListedDataset, check_dataset, load_dataset_config
from languagebind.eval.data.datasets import METRICS
from languagebind.files import write_atomic
from languagebind.modalities import modality_names
from languagebind.model import DualEncoder, build_model, text_state
from languagebind.partner import load_partner
from languagebind.text import Tokenizer
from languagebind.tuning import apply_tuning
from languagebind.weights import load_strict

from .batch import Plan
from .checkpoint import TrainState, check_progress, read_resumable, restore
from .checkpoint_files import set_aside_later
from .engines import make_engine
from .engines.ema import Ema
from .loader import copied_ahead, train_batches
from .logger import Logger, log_to_file
from .params import TrainConfig, parse_args
from .preflight import check_data, check_disk, shards_digest
from .remote_sync import RemoteSync
from .run import Run, interrupts
from .run_folder import open_run
from .train import train
from .worker import ShardBatches

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a training from its command line."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) in (["-h"], ["--help"]):
        print(f"{__doc__}\n--modality NAME --help lists the options. Modalities: {', '.join(modality_names())}")
        return
    config = parse_args(argv)
    process = init_process(config.device)
    try:
        fit(config, process)
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


def fit(config: TrainConfig, process: Process) -> None:
    """Train an encoder with these options."""
    signals: list[str] = []
    with interrupts(signals, signal.SIGTERM, signal.SIGUSR1), ExitStack() as held:
        shards, steps_per_epoch = check_data(config.data, config.inputs, process.world_size, config.optim.accum_freq)
        partner = load_partner(config.partner, process.device) if config.partner.anchor else None
        total_steps = steps_per_epoch * config.optim.epochs
        val_datasets = list_val_datasets(config)
        folder, resume = open_run(config, process, held)
        model = new_model(config)
        fingerprint, digest = model.text_fingerprint(), shards_digest(shards)
        data, tune_text = config.data, config.model.tuning.tune_text
        texts = (list(shards), data.caption_source, fingerprint, data.negatives > 0)
        features = None if tune_text else open_text_features(data.text_features, *texts)
        if partner is not None:
            partner = partner.ready(config.partner.anchor_features, list(shards), model.embed_dim)
            log.info("partner's features: %s", "beside the shards" if partner.stored else "encoded at each step")
        run = Run(config, process, folder, fingerprint, digest, val_datasets, total_steps, partner)
        report_start(run, model, shards)
        live = "encoded at each step, because the text tower trains" if tune_text else "encoded at each step"
        log.info("text features: %s", live if features is None else "read from beside the shards")
        state = start(run, model, resume, steps_per_epoch)
        if state.step >= total_steps and process.is_main:
            log.warning("nothing to do: %d steps are done, and the options ask for %d", state.step, total_steps)
        elif process.is_main:  # only now: an accepted checkpoint's options may be replaced
            set_aside_later(folder / "checkpoints", state.step)
            again = replace(config, checkpoint=replace(config.checkpoint, resume=None))  # to be given each time
            write_atomic(folder / "config.yaml", yaml.safe_dump(to_dict(again), sort_keys=False).encode())
        logger = Logger(folder if process.is_main else None, config.log, to_dict(config), state.step)
        k = config.optim.accum_freq
        steps = (k * steps_per_epoch, k * total_steps, k * state.step)
        plan = Plan(config.seed, process.rank, process.world_size, *steps, dict(state.drawn))
        tokenizer = cast(Tokenizer, model.text_model.tokenizer)
        reader = partner and replace(partner, model=None)
        loaded = train_batches(ShardBatches(shards, config.inputs, tokenizer, config.data, plan, features, reader))
        # With accumulation, micro-batches stay in host memory until they are used.
        batches = copied_ahead(loaded, process.device) if k == 1 else loaded
        url = config.remote.url(folder.name) if process.is_main else None
        with RemoteSync(folder, url, config.remote.remote_sync_frequency) if url else nullcontext(), closing(loaded):
            # Before the first step, Ctrl-C ends the run, because there is nothing to save
            held.enter_context(interrupts(signals, signal.SIGINT, is_main=process.is_main))
            run.evaluate_missed(state, logger)
            for _ in train(state, batches, config, steps_per_epoch, logger):
                if run.after_step(state, logger, signals):
                    break
            logger.close()


def list_val_datasets(config: TrainConfig) -> list[ListedDataset]:
    """Return the evaluation datasets and their samples."""
    datasets = [load_dataset_config(path, config.eval.val_data_root) for path in config.eval.val_config]
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise UserError(f"two --val-config files have the name {max(names, key=names.count)}: use different names")
    metrics = [f"{dataset.name}/{metric}" for dataset in datasets for metric in METRICS[dataset.task]]
    best = config.checkpoint.keep_best
    if best is not None and best not in metrics:
        raise UserError(f"--keep-best {best} is not one of the metrics of --val-config: {', '.join(metrics) or 'none'}")
    return [check_dataset(dataset, config.inputs, skip_bad=True) for dataset in datasets]


def new_model(config: TrainConfig) -> DualEncoder:
    """Return a model with the same initial weights on every rank. Trained parameters require gradients."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, config.inputs.input_shape)
    if (largest := max(config.optim.matryoshka, default=model.embed_dim)) != model.embed_dim:
        size = f"all {model.embed_dim} dimensions of the features"
        raise UserError(f"the largest of --matryoshka should be {size}, not {largest}")
    apply_tuning(model, config.model.tuning)
    return model


def start(run: Run, model: DualEncoder, resume: Path | str | None, steps_per_epoch: int) -> TrainState:
    """Return the state of a new run, or the state restored from the checkpoint `resume`."""
    config, process, resolved = run.config, run.process, to_dict(run.config)
    checkpoint = read_resumable(resume, resolved, run.fingerprint) if resume else None
    if checkpoint:
        known = checkpoint.get("partner")
        if known and run.partner and known["fingerprint"] != run.partner.store.fingerprint:
            raise UserError(f"the partner of {resume} differs from --anchor: use the same partner, or none")
        note = check_progress(checkpoint, resolved, steps_per_epoch)
        if note and process.is_main:
            log.warning(note)
        load_strict(model, text_state(model) | checkpoint["model"], f"the model of {resume}")
    decay = config.optim.ema_decay
    averages = 2 if decay is None else 3  # AdamW keeps two averages per trained weight
    check_disk(run.folder, model, averages, run.new_checkpoints(checkpoint["step"] if checkpoint else 0))
    engine = make_engine(model, config.optim, process, config.engine)
    torch.manual_seed(config.seed + process.rank)  # each rank drops different patches
    state = TrainState(engine, None if decay is None else Ema(engine.parameters, decay), run.partner)
    if resume and checkpoint:
        restore(resume, checkpoint, state, resolved, run.shards_digest)
        log.info("resumed from %s at step %d of %d", resume, state.step, run.total_steps)
    return state


def report_start(run: Run, model: DualEncoder, shards: dict[str, int | None]) -> None:
    """Log the versions, devices, data, weights, number of trained parameters and batch size of a run."""
    init, optim = run.config.model.init, run.config.optim
    ranks, batch = run.process.world_size, run.config.data.batch_size
    versions = f"languagebind {languagebind.__version__}, torch {torch.__version__}"
    log.info("%s, %s x %d, %s, %s", versions, run.process.device.type, ranks, run.config.engine.engine, optim.precision)
    counts = [count for count in shards.values() if count is not None]
    samples = sum(counts) if len(counts) == len(shards) else "an unknown number of"
    tower = "" if init.encoder_tower in (None, "none") else f"{init.encoder_tower} "
    weights = tower + ("random" if init.encoder_pretrained == "none" else str(init.encoder_pretrained))
    log.info("%s samples in %d shards; initial encoder weights: %s", samples, len(shards), weights)
    sizes = [(parameter.numel() / 1e6, parameter.requires_grad) for parameter in model.parameters()]
    trained, everything = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    log.info("%s tuning trains %.2f M of %.2f M parameters", run.config.model.tuning.tuning, trained, everything)
    whole = f"{batch} x {optim.accum_freq} accumulated x {ranks} ranks = {batch * optim.accum_freq * ranks}"
    log.info("batch %s, %d steps per epoch, %d steps", whole, run.total_steps // optim.epochs, run.total_steps)


if __name__ == "__main__":
    run(main)
