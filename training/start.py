"""Start the training of one modality, or restore it from a checkpoint."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

import languagebind
from languagebind.config import UserError, to_dict
from languagebind.data.feature_store import open_text_features
from languagebind.distributed import Process
from languagebind.eval import ListedDataset, check_dataset, load_dataset_config
from languagebind.eval.data.datasets import METRICS
from languagebind.model import DualEncoder, build_model, text_state
from languagebind.partner import Partner
from languagebind.text import Tokenizer
from languagebind.tuning import apply_tuning
from languagebind.weights import load_strict

from .batch import Plan
from .checkpoint import TrainState, check_progress, check_resumable, restore
from .engines import make_engine
from .engines.ema import Ema
from .joint import find_partner
from .loader import train_batches
from .params import TrainConfig
from .preflight import check_data, checkpoint_size, shards_digest
from .run import Run
from .worker import ShardBatches

log = logging.getLogger(__name__)

Saved = tuple[Path | str, dict[str, Any]]  # a checkpoint's path and content


class Facts(NamedTuple):
    """What is known of a run before it has a folder."""

    shards: dict[str, int | None]
    steps_per_epoch: int
    partner: Partner | None
    val_datasets: list[ListedDataset]


def check(name: str, configs: dict[str, TrainConfig], process: Process) -> Facts:
    """Check the data of a run, and load its partner."""
    config = configs[name]
    shards, steps_per_epoch = check_data(config.data, config.inputs, process.world_size, config.optim.accum_freq)
    partner = find_partner(name, configs, process.device)
    return Facts(shards, steps_per_epoch, partner, list_val_datasets(config))


def start(
    config: TrainConfig, process: Process, folder: Path, facts: Facts,
    saved: Saved | None, tower: DualEncoder | None,
) -> Run:  # fmt: skip
    """Return a run before its first step, or after that of a `saved` checkpoint.

    It shares the text tower of the model `tower`.
    """
    model, data, tune_text = new_model(config), config.data, config.model.tuning.tune_text
    fingerprint, digest = model.text_fingerprint(), shards_digest(facts.shards)
    if tower is not None:
        if tower.text_fingerprint() != fingerprint:
            raise UserError("modalities that train together need the same text tower: pass --text-tower as a flag")
        model.text_model, model.text_projection = tower.text_model, tower.text_projection
    texts = (list(facts.shards), data.caption_source, fingerprint, data.negatives > 0)
    features = None if tune_text else open_text_features(data.text_features, *texts)
    partner = facts.partner
    if partner is not None and partner.model is not None:
        partner = partner.ready(config.partner.anchor_features, list(facts.shards), model.embed_dim)
    total_steps = facts.steps_per_epoch * config.optim.epochs
    run = Run(config, process, folder, fingerprint, digest, facts.val_datasets, total_steps)
    report_start(run, model, facts.shards)
    if partner is not None:
        log.info("partner's features: %s", "beside the shards" if partner.stored else "encoded at each step")
    live = "encoded at each step, because the text tower trains" if tune_text else "encoded at each step"
    log.info("text features: %s", live if features is None else "read from beside the shards")
    averages = 2 if config.optim.ema_decay is None else 3  # AdamW keeps two averages per trained weight
    run.size = checkpoint_size(model, averages)
    run.state = state = restored(run, model, partner, saved, facts.steps_per_epoch)
    k = config.optim.accum_freq
    steps = (k * facts.steps_per_epoch, k * total_steps, k * state.step)
    plan = Plan(config.seed, process.rank, process.world_size, *steps, dict(state.drawn))
    tokenizer, reader = cast(Tokenizer, model.text_model.tokenizer), partner and replace(partner, model=None)
    run.batches = train_batches(ShardBatches(facts.shards, config.inputs, tokenizer, data, plan, features, reader))
    return run


def restored(
    run: Run,
    model: DualEncoder,
    partner: Partner | None,
    saved: Saved | None,
    steps_per_epoch: int,
) -> TrainState:
    """Return the state of a new run, or the state of a checkpoint."""
    config, process, resolved = run.config, run.process, to_dict(run.config)
    if saved:
        path, checkpoint = saved
        check_resumable(checkpoint, path, resolved, run.fingerprint)
        known = checkpoint.get("partner")
        if known and partner and known["fingerprint"] != partner.store.fingerprint:
            raise UserError(f"the partner of {path} differs from --anchor: use the same partner, or none")
        note = check_progress(checkpoint, resolved, steps_per_epoch)
        if note and process.is_main:
            log.warning(note)
        load_strict(model, text_state(model) | checkpoint["model"], f"the model of {path}")
    engine = make_engine(model, config.optim, process, config.engine)
    torch.manual_seed(config.seed + process.rank)  # each rank drops different patches
    decay = config.optim.ema_decay
    state = TrainState(engine, None if decay is None else Ema(engine.parameters, decay), partner)
    if saved:
        restore(path, checkpoint, state, resolved, run.shards_digest)
        log.info("resumed from %s at step %d of %d", path, state.step, run.total_steps)
    return state


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
