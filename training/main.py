"""Train an encoder:

python -m training.main --config configs/depth.yaml --train-data /data/depth

or on several GPUs:

torchrun --nproc_per_node 8 -m training.main -- --config configs/depth.yaml --train-data /data/depth
"""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from languagebind.config import UserError, run, to_dict
from languagebind.data.text_features import open_text_features
from languagebind.distributed import Process, close_process, gather_objects, init_process, on_every_rank
from languagebind.eval import check_dataset, evaluate, load_dataset_config
from languagebind.hub import latest_checkpoint
from languagebind.modalities import modality_names
from languagebind.model import build_model
from languagebind.remote import file_size, is_url
from languagebind.tuning import apply_tuning

from .checkpoint import (
    TrainState,
    checkpoint_path,
    rank_state,
    restore,
    save_checkpoint,
)
from .data import Plan, train_batches
from .logger import Logger, log_to_file, setup_logging
from .optim import build_optimizer, grad_scaler
from .params import TrainConfig, parse_args
from .preflight import check_data, check_disk
from .remote_sync import latest_remote, refuse_overwriting, syncing
from .scheduler import make_schedule
from .train import StepOptions, train

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
    except UserError as error:
        log_to_file(error)
        raise
    finally:
        close_process()


def fit(config: TrainConfig, process: Process) -> None:
    """Train as the config says.

    Raises:
        UserError: what the config asks for cannot be done; or the run had to stop, with the reason.
    """
    shards, steps_per_epoch = check_data(config.data, config.inputs, process.world_size)
    val_datasets = [load_dataset_config(path, config.eval.val_data_root) for path in config.eval.val_config]
    names = [dataset.name for dataset in val_datasets]
    if len(set(names)) < len(names):
        raise UserError(f"two of --val-config are named {max(names, key=names.count)}: their figures would mix")
    for dataset in val_datasets:
        check_dataset(dataset, config.inputs)
    folder, resume = open_run(config, process)
    state, fingerprint = build_state(config, process)
    features = open_text_features(config.data.text_features, shards, config.data.caption_source, fingerprint)
    log.info("text features: %s", "encoded at each step" if features is None else "from beside the shards")
    total_steps = steps_per_epoch * config.optim.epochs
    if resume:
        restore(resume, state, process.rank, to_dict(config), fingerprint)
        log.info("resumed from %s at step %d of %d", resume, state.step, total_steps)
    saves = [
        step
        for step in range(state.step + 1, total_steps + 1)
        if step == total_steps
        or due(step, config.checkpoint.save_every_n_steps)
        or (val_datasets and due(step, config.eval.val_every_n_steps))
    ]
    check_disk(folder, state.model, len(saves))
    if process.is_main:  # not before the checkpoint was accepted: these would replace the options that it was made with
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    report_start(config, state.model, process.world_size, steps_per_epoch, total_steps)

    logger = Logger(folder if process.is_main else None, config.log, to_dict(config), state.step)
    plan = Plan(
        config.seed, process.rank, process.world_size, steps_per_epoch, total_steps, state.step, dict(state.drawn)
    )  # fmt: skip
    batches = train_batches(shards, config.inputs, state.model.text_model.tokenizer, config.data, plan, features)
    options = StepOptions(
        schedule=make_schedule(config.optim.lr_scheduler, config.optim.warmup, total_steps),
        precision=config.optim.precision,
        grad_clip_norm=config.optim.grad_clip_norm,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        log_every_n_steps=config.log.log_every_n_steps,
        max_bad_share=config.data.max_bad_share,
        loss_chunk_size=config.optim.loss_chunk_size,
    )
    if state.step >= total_steps:
        log.warning("nothing to do: %d steps are done, and these options make %d", state.step, total_steps)
    with syncing(folder, config.remote, process.is_main):
        for step in train(state, parallel(state.model, process), batches, options, process, logger):
            last = step == total_steps
            validates = bool(val_datasets) and (last or due(step, config.eval.val_every_n_steps))
            # The checkpoint comes first: should the evaluation fail, nothing is lost.
            if last or validates or due(step, config.checkpoint.save_every_n_steps):
                save(folder, state, config, fingerprint, process)
            if validates:
                for dataset in val_datasets:
                    logger.metrics(step, validate(state.model, config, dataset, process))
        logger.close()


def open_run(config: TrainConfig, process: Process) -> tuple[Path, Path | str | None]:
    """The run's folder, made and with logging into it, and the checkpoint to go on from.

    Raises:
        UserError: the folder is there already and nothing says to go on; or there is no such checkpoint.
    """
    options, failure, folder, resume = config.checkpoint, None, None, None
    name = options.name or f"{time.strftime('%Y_%m_%d-%H_%M_%S')}-{config.modality}-{config.model.tuning.tuning}"
    folder = options.logs / gather_objects(name)[0]
    if options.resume == "latest" and options.name is None:
        failure = "--resume latest needs --name: the run that it is the latest of"
    elif options.resume == "latest":
        resume = latest_checkpoint(folder / "checkpoints") or latest_remote(config.remote, folder, process.is_main)
    elif options.resume and is_url(options.resume):
        resume = options.resume
        failure = None if file_size(resume) is not None else f"no checkpoint at {resume}"
    elif options.resume:
        resume = Path(options.resume)
        failure = None if resume.is_file() else f"no checkpoint at {resume}"
    elif process.is_main and ((folder / "checkpoints").exists() or (folder / "metrics.jsonl").exists()):
        failure = f"{folder} exists: choose another --name, or go on from it with --resume latest"
    elif process.is_main:
        failure = refuse_overwriting(config.remote, folder.name)
    if process.is_main and failure is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            failure = f"cannot make {folder}: {error.strerror}"
    if failure := on_every_rank(failure, process.device):  # from here, the folder is there for every rank
        raise UserError(failure)
    setup_logging(folder if process.is_main else None)
    if options.resume == "latest" and resume is None:
        log.warning("no checkpoint in %s: starting from step 0", folder)
    return folder, resume


def build_state(config: TrainConfig, process: Process) -> tuple[TrainState, str]:
    """Model and optimizer, the same on every rank, and the text tower's fingerprint."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, config.inputs.input_shape)
    fingerprint = model.text_fingerprint()
    apply_tuning(model, config.model.tuning)
    model.to(process.device)
    optimizer = build_optimizer(model, config.optim)
    torch.manual_seed(config.seed + process.rank)  # each rank drops patches of its own
    return TrainState(model, optimizer, grad_scaler(process.device, config.optim.precision)), fingerprint


def parallel(model: nn.Module, process: Process) -> nn.Module:
    if process.world_size == 1:
        return model
    devices = [process.device] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def save(folder: Path, state: TrainState, config: TrainConfig, fingerprint: str, process: Process) -> None:
    """Write a checkpoint on the main rank, with every rank's own state in it."""
    ranks, failure = gather_objects(rank_state(state)), None
    path = checkpoint_path(folder / "checkpoints", state.step)
    if process.is_main:
        if not all(x.isfinite().all() for x in state.model.encoder_state().values()):
            failure = f"weights are not finite after step {state.step}: no checkpoint was written"
        if state.model.text_fingerprint() != fingerprint:
            raise RuntimeError("the text tower has changed: a frozen one must not; no checkpoint was written")
        try:
            if failure is None:
                save_checkpoint(path, state, ranks, to_dict(config), fingerprint)
                log.info("saved %s", path)
        except UserError as error:
            failure = str(error)
    if failure := on_every_rank(failure, process.device):
        raise UserError(failure)


def validate(model: nn.Module, config: TrainConfig, dataset, process: Process) -> dict[str, float]:
    """Evaluate on one data set; `{"<dataset>/<metric>": value}`."""
    result = evaluate(
        model,
        config.inputs,
        dataset,
        batch_size=config.eval.val_batch_size,
        workers=config.data.workers,
        device=process.device,
        precision=config.optim.precision,
    )
    metrics = {f"{result['dataset']}/{name}": value for name, value in result["metrics"].items()}
    log.info("Eval %s", " ".join(f"{name}: {value:.4f}" for name, value in metrics.items()))
    return metrics


def report_start(config: TrainConfig, model: nn.Module, ranks: int, steps_per_epoch: int, total_steps: int) -> None:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "%s tuning trains %.2f M of %.2f M parameters", config.model.tuning.tuning, trained / 1e6, everything / 1e6
    )
    batch = config.data.batch_size
    log.info(
        "batch %d x %d ranks = %d, %d steps an epoch, %d steps",
        batch,
        ranks,
        batch * ranks,
        steps_per_epoch,
        total_steps,
    )


if __name__ == "__main__":
    run(main)
