"""Train an encoder:

python -m training.main --config depth --train-data /data/depth

or on several GPUs:

torchrun --nproc_per_node 8 -m training.main -- --config depth --train-data /data/depth

or several, one for each --config of another modality:

python -m training.main --config depth --config infrared --train-data /data/both
"""

import logging
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml

import languagebind
from languagebind.config import UserError, first_line, run, to_dict
from languagebind.data.feature_store import FeatureStore
from languagebind.data.vidal import source_names
from languagebind.distributed import Process, close_process, init_process, is_lost_rank
from languagebind.eval import ListedDataset, check_dataset, load_dataset_config
from languagebind.eval.data.datasets import METRICS
from languagebind.files import twice, write_atomic
from languagebind.hub.checkpoint import read_parts
from languagebind.modalities import modality_names
from languagebind.model import DualEncoder, build_model, text_state
from languagebind.partner import Partner
from languagebind.text import Tokenizer
from languagebind.tuning import apply_tuning
from languagebind.weights import load_strict

from .batch import Plan
from .checkpoint import TrainState, check_resumable, keep_resizing, restore
from .checkpoint_files import set_aside_later
from .engines import make_engine
from .engines.ema import Ema
from .joint import LiveEncoder, find_partner, mixture_of, parse_runs
from .loader import train_batches
from .logger import log_to_file
from .params import TrainConfig
from .precision import settle_precision
from .preflight import check_data, check_disk, checkpoint_size, shards_digest
from .remote_sync import RemoteSync
from .run import Run, Runs, interrupts
from .run_folder import open_run
from .worker import ShardBatches

log = logging.getLogger(__name__)

Saved = tuple[Path | str, dict[str, Any]]  # a checkpoint's path and content


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
        runs = start_all(configs, process, held, signals)
        # Before the first step, Ctrl-C ends the run, because there is nothing to save
        held.enter_context(interrupts(signals, signal.SIGINT, is_main=process.is_main))
        remote = runs.first.config.remote
        if process.is_main and (url := remote.url(runs.folder.name)):
            held.enter_context(RemoteSync(runs.folder, url, remote.remote_sync_frequency))
        for own in runs.by_modality.values():
            held.enter_context(closing(own.batches))
            own.evaluate_missed()
        for own, _ in runs.turns():
            next(own.steps)
            if runs.after_step(own):
                break
        for own in runs.by_modality.values():
            own.logger.close()


def start_all(configs: dict[str, TrainConfig], process: Process, held: ExitStack, signals: list[str]) -> Runs:
    """Return the runs at their first steps, or at those after a checkpoint, with the folder locked by `held`."""
    started: dict[str, Run] = {}
    checked, several = {}, len(configs) > 1
    for name, config in configs.items():  # before a folder is made
        data = check_data(config.data, config.inputs, process.world_size, config.optim.accum_freq)
        partner = find_partner(name, configs, started, process.device)
        checked[name] = Facts(config, *data, list_val_datasets(config), partner)
    folder, resume = open_run(configs, process, held)
    parts = read_parts(resume) if resume else {}
    if resume and several and (absent := configs.keys() - parts.keys()):
        raise UserError(f"cannot resume from {resume}: it has no encoder for {min(absent)}")
    for name, facts in checked.items():
        saved = (resume, parts.get(name) or next(iter(parts.values()))) if resume else None
        first = next((own.state for own in started.values()), None)
        started[name] = start(facts, process, folder / name if several else folder, saved, first)
    runs = Runs(started, mixture_of(configs), folder, signals)
    check_disk(folder, sum(own.size for own in started.values()), runs.new_checkpoints())
    accept(runs)
    return runs


class Facts(NamedTuple):
    """What is known of a run before its folder is made."""

    config: TrainConfig
    shards: dict[str, int | None]
    steps_per_epoch: int
    val_datasets: list[ListedDataset]
    partner: Partner | None


def start(facts: Facts, process: Process, folder: Path, saved: Saved | None, first: TrainState | None) -> Run:
    """Return a run at its first step, or at that after a `saved` checkpoint, with the text tower of the `first` run."""
    facts = facts._replace(config=settle_precision(facts.config, process, saved[1] if saved else None))
    config, shards, partner = facts.config, facts.shards, facts.partner
    model, data, optim, tune_text = new_model(config), config.data, config.optim, config.model.tuning.tune_text
    fingerprint, total_steps = model.text_fingerprint(), facts.steps_per_epoch * optim.epochs
    if first is not None:
        if first.text_fingerprint != fingerprint:
            raise UserError("modalities that train together need the same text tower: pass --text-tower as a flag")
        model.text_model, model.text_projection = first.engine.model.text_model, first.engine.model.text_projection
    store, sources = FeatureStore(fingerprint), source_names(data.caption_source, data.negatives > 0)
    features = store if not tune_text and store.serves(data.text_features, shards, sources) else None
    if partner is not None and not isinstance(partner.model, LiveEncoder):
        partner = partner.ready(config.partner.anchor_features, list(shards), model.embed_dim)
    report_start(facts, process, model)
    if partner is not None:
        log.info("partner %s: %s features", config.partner.anchor, "cached" if partner.stored else "live")
    live = "encoded at each step, because the text tower trains" if tune_text else "encoded at each step"
    log.info("text features: %s", live if features is None else "read from beside the shards")
    size = checkpoint_size(model, 2 if optim.ema_decay is None else 3)  # AdamW keeps two averages per trained weight
    if saved:
        path, checkpoint = saved
        check_resumable(checkpoint, path, to_dict(config), fingerprint)
        config = replace(config, inputs=keep_resizing(config.inputs, checkpoint))
        load_strict(model, text_state(model) | checkpoint["model"], f"the model of {path}")
    engine = make_engine(model, optim, process, config.engine)
    torch.manual_seed(config.seed + process.rank)  # each rank drops different patches
    average = None if optim.ema_decay is None else Ema(engine.parameters, optim.ema_decay)
    state = TrainState(engine, facts.steps_per_epoch, fingerprint, shards_digest(shards), average, partner)
    if saved:
        restore(path, checkpoint, state, to_dict(config))
        log.info("resumed from %s at step %d of %d", path, state.step, total_steps)
    k = optim.accum_freq
    steps = (k * facts.steps_per_epoch, k * total_steps, k * state.step)
    plan = Plan(config.seed, process.rank, process.world_size, *steps, dict(state.drawn), state.lengths)
    tokenizer, reader = cast(Tokenizer, model.text_model.tokenizer), partner and replace(partner, model=None)
    batches = train_batches(ShardBatches(shards, config.inputs, tokenizer, data, plan, features, reader))
    return Run(config, folder, facts.val_datasets, state, batches, size)


def list_val_datasets(config: TrainConfig) -> list[ListedDataset]:
    """Return the evaluation datasets and their samples."""
    datasets = [load_dataset_config(path, config.eval.val_data_root) for path in config.eval.val_config]
    if name := twice(dataset.name for dataset in datasets):
        raise UserError(f"two --val-config files have the name {name}: use different names")
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


def report_start(facts: Facts, process: Process, model: DualEncoder) -> None:
    """Log the versions, devices, data, weights, number of trained parameters and batch size of a run."""
    config, shards, ranks = facts.config, facts.shards, process.world_size
    init, optim = config.model.init, config.optim
    versions = f"{config.modality}: languagebind {languagebind.__version__}, torch {torch.__version__}"
    log.info("%s, %s x %d, %s, %s", versions, process.device.type, ranks, config.engine.engine, optim.precision)
    samples = "an unknown number of" if None in shards.values() else sum(filter(None, shards.values()))
    tower = "" if init.encoder_tower in (None, "none") else f"{init.encoder_tower} "
    weights = tower + ("random" if init.encoder_pretrained == "none" else str(init.encoder_pretrained))
    log.info("%s samples in %d shards; initial encoder weights: %s", samples, len(shards), weights)
    sizes = [(parameter.numel() / 1e6, parameter.requires_grad) for parameter in model.parameters()]
    trained, everything = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    log.info("%s tuning trains %.2f M of %.2f M parameters", config.model.tuning.tuning, trained, everything)
    batch, steps = config.data.batch_size, facts.steps_per_epoch
    whole = f"{batch} x {optim.accum_freq} accumulated x {ranks} ranks = {batch * optim.accum_freq * ranks}"
    log.info("batch %s, %d steps per epoch, %d steps", whole, steps, steps * optim.epochs)


def accept(runs: Runs) -> None:
    """Write the options and start the logs, once all runs have accepted their checkpoint."""
    done, several, is_main = runs.step >= runs.total_steps, len(runs.by_modality) > 1, runs.process.is_main
    if done and is_main:
        log.warning("nothing to do: %d steps are done, and the options ask for no more", runs.step)
    elif is_main:
        set_aside_later(runs.folder / "checkpoints", runs.step)
        if several:
            listed = {"config": [f"{name}/config.yaml" for name in runs.by_modality], "mixture": runs.shares}
            write_atomic(runs.folder / "config.yaml", yaml.safe_dump(listed).encode())
    for name, own in runs.by_modality.items():
        if is_main and not done:
            own.folder.mkdir(exist_ok=True)
            asked = replace(own.config.checkpoint, resume=None)  # to be given each time
            again = replace(own.config, checkpoint=asked, mixture=())  # which the file of all modalities has
            write_atomic(own.folder / "config.yaml", yaml.safe_dump(to_dict(again), sort_keys=False).encode())
        own.begin(f"{name} " if several else "", runs.wishes)


if __name__ == "__main__":
    run(main)
