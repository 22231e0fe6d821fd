"""Train an encoder:

python -m training.main --config configs/depth.yaml --train-data '/data/depth/{00000..00301}.tar'

or on several GPUs:

torchrun --nproc_per_node 8 -m training.main --config configs/depth.yaml --train-data '/data/depth/{00000..00301}.tar'
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
from languagebind.eval import evaluate, load_dataset_config
from languagebind.model import build_model
from languagebind.tuning import apply_tuning

from .checkpoint import (
    TrainState,
    checkpoint_path,
    latest_checkpoint,
    rank_state,
    restore,
    save_checkpoint,
)
from .data import Plan, train_batches
from .distributed import Process, close_process, gather_objects, init_process, on_every_rank
from .logger import Logger, setup_logging
from .optim import build_optimizer, grad_scaler
from .params import TrainConfig, parse_args
from .preflight import check_data, check_disk
from .scheduler import make_schedule
from .train import StepOptions, train

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a training from its command line."""
    config = parse_args(sys.argv[1:] if argv is None else argv)
    process = init_process(config.device)
    try:
        fit(config, process)
    finally:
        close_process()


def fit(config: TrainConfig, process: Process) -> None:
    """Train as the config says.

    Raises:
        UserError: what the config asks for cannot be done; or the run had to stop, with the reason.
    """
    shards, steps_per_epoch = check_data(config.data, config.inputs, process.world_size)
    val_datasets = [load_dataset_config(path, config.eval.val_data_root) for path in config.eval.val_config]
    folder, resume = open_run(config, process)
    state, fingerprint = build_state(config, process)
    total_steps = steps_per_epoch * config.optim.epochs
    if resume:
        restore(resume, state, process.rank)
        log.info("resumed from %s at step %d of %d", resume, state.step, total_steps)
    report_start(config, state.model, len(shards), steps_per_epoch, total_steps)

    trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    encoder = state.model.encoder_state().values()
    check_disk(folder, sum(x.nbytes for x in encoder), sum(parameter.nbytes for parameter in trained))
    logger = Logger(folder if process.is_main else None, config.log, to_dict(config))
    plan = Plan(
        config.seed, process.rank, process.world_size, steps_per_epoch, total_steps, state.step, dict(state.drawn)
    )  # fmt: skip
    batches = train_batches(shards, config.inputs, state.model.text_model.tokenizer, config.data, plan)
    options = StepOptions(
        schedule=make_schedule(config.optim.lr_scheduler, config.optim.warmup, total_steps),
        precision=config.optim.precision,
        grad_clip_norm=config.optim.grad_clip_norm,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        log_every_n_steps=config.log.log_every_n_steps,
    )
    for step in train(state, parallel(state.model, process), batches, options, process, logger):
        last = step == total_steps
        # The checkpoint comes first: should the evaluation fail, nothing is lost.
        if last or due(step, config.checkpoint.save_every_n_steps):
            save(folder, state, config, fingerprint, process)
        if last or due(step, config.eval.val_every_n_steps):
            for dataset in val_datasets:
                logger.metrics(step, validate(state.model, config, dataset, process))
    logger.close()


def open_run(config: TrainConfig, process: Process) -> tuple[Path, Path | None]:
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
        resume = latest_checkpoint(folder / "checkpoints")
    elif options.resume:
        resume = Path(options.resume)
        failure = None if resume.is_file() else f"no checkpoint at {resume}"
    elif process.is_main and folder.exists():
        failure = f"{folder} exists: choose another --name, or go on from it with --resume latest"
    failure = on_every_rank(failure)
    if failure:
        raise UserError(failure)
    if process.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    gather_objects(None)  # the folder is there for every rank
    setup_logging(folder if process.is_main else None)
    if options.resume == "latest" and resume is None:
        log.info("no checkpoint in %s yet: starting from step 0", folder)
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
        try:
            save_checkpoint(path, state, ranks, to_dict(config), fingerprint)
            log.info("saved %s", path)
        except UserError as error:
            failure = str(error)
    if failure := on_every_rank(failure):
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


def report_start(config: TrainConfig, model: nn.Module, shards: int, steps_per_epoch: int, total_steps: int) -> None:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "%s tuning trains %.2f M of %.2f M parameters", config.model.tuning.tuning, trained / 1e6, everything / 1e6
    )
    log.info("%d shards, %d steps an epoch, %d steps", shards, steps_per_epoch, total_steps)


if __name__ == "__main__":
    run(main)
