"""Train an encoder:

python -m training.main --config configs/depth.yaml --train-data /data/depth

or on several GPUs:

torchrun --nproc_per_node 8 -m training.main -- --config configs/depth.yaml --train-data /data/depth
"""

import logging
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing

import torch
import yaml
from torch import nn

import languagebind
from languagebind.config import UserError, first_line, run, to_dict
from languagebind.data.text_features import open_text_features
from languagebind.distributed import Process, close_process, init_process, is_lost_rank
from languagebind.eval import DatasetConfig, load_dataset_config
from languagebind.eval.data.datasets import METRICS
from languagebind.eval.evaluate import check_dataset
from languagebind.files import write_atomic
from languagebind.modalities import modality_names
from languagebind.model import DualEncoder, build_model
from languagebind.tuning import apply_tuning

from .checkpoint import TrainState, check_progress, load_weights, read_resumable, restore
from .checkpoint_files import set_aside_later
from .data import copied_ahead, train_batches
from .engines import make_engine
from .engines.ema import Ema
from .logger import Logger, log_to_file
from .opening import open_run
from .optim import make_schedule
from .params import TrainConfig, parse_args
from .preflight import check_data, check_disk, shards_digest
from .remote_sync import syncing
from .run import Interrupts, Run
from .stream import Plan
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
    except Exception as error:
        known = _known_failure(error, process)
        log_to_file(known or error)
        if known is None:
            raise
        raise known from error
    finally:
        close_process()


def _known_failure(error: Exception, process: Process) -> UserError | None:
    """What an error of PyTorch's means to a user; None where it is a fault of the code."""
    if process.world_size > 1 and is_lost_rank(error):
        return UserError(
            f"rank {process.rank} lost another rank, which says itself why it ended, unless it was killed. When that is"
            f" mended, go on with --resume latest. ({first_line(error)})"
        )
    if isinstance(error, RuntimeError) and re.match(r"DataLoader worker .*(killed|exited)", str(error)):
        return UserError(
            f"{first_line(error)} The system does that when memory runs out: use fewer --workers or a smaller"
            " --shuffle-buffer, and go on with --resume latest"
        )
    return None


def fit(config: TrainConfig, process: Process) -> None:
    """Train as the config says.

    Raises:
        UserError: what the config asks for cannot be done; or the run had to stop, with the reason.
    """
    with ExitStack() as held:
        _fit(config, process, held)


def _fit(config: TrainConfig, process: Process, held: ExitStack) -> None:
    """`held` keeps the run's lock, and signals from ending the process, to the end."""
    interrupts, resolved = held.enter_context(Interrupts()), to_dict(config)
    shards, steps_per_epoch = check_data(config.data, config.inputs, process.world_size, config.optim.accum_freq)
    val_datasets = open_val_datasets(config)
    folder, resume = open_run(config, process, held)
    model = new_model(config)
    fingerprint = model.text_fingerprint()
    features = open_text_features(config.data.text_features, shards, config.data.caption_source, fingerprint)
    log.info("text features: %s", "encoded at each step" if features is None else "from beside the shards")
    total_steps = steps_per_epoch * config.optim.epochs
    checkpoint = read_resumable(resume, resolved, fingerprint) if resume else None
    if checkpoint:
        note = check_progress(checkpoint, resolved, steps_per_epoch)
        if note and process.is_main:
            log.warning(note)
        load_weights(model, checkpoint, resume)
    digest = shards_digest(shards)
    run = Run(config, process, folder, fingerprint, digest, val_datasets, total_steps)
    averages = 3 if config.optim.ema_decay is not None else 2  # AdamW keeps two for each weight that trains
    check_disk(folder, model, averages, run.checkpoints_kept(checkpoint["step"] if checkpoint else 0))
    report_start(config, model, process, shards, total_steps)
    state = new_state(config, model, process)
    if checkpoint:
        restore(resume, checkpoint, state, process.rank, resolved, digest)
        log.info("resumed from %s at step %d of %d", resume, state.step, total_steps)
        del checkpoint
    if process.is_main:  # not before the checkpoint was accepted: these would replace the options that it was made with
        set_aside_later(folder / "checkpoints", state.step)
        write_atomic(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False).encode())

    logger = Logger(folder if process.is_main else None, config.log, resolved, state.step)
    k = config.optim.accum_freq
    plan = Plan(
        config.seed, process.rank, process.world_size, k * steps_per_epoch, k * total_steps, k * state.step,
        dict(state.drawn),
    )  # fmt: skip
    options = StepOptions(
        schedule=make_schedule(config.optim.lr_scheduler, config.optim.warmup, total_steps),
        precision=config.optim.precision,
        accum_freq=k,
        loss=config.optim.loss,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        log_every_n_steps=config.log.log_every_n_steps,
        max_bad_share=config.data.max_bad_share,
    )
    if state.step >= total_steps and process.is_main:
        log.warning("nothing to do: %d steps are done, and these options make %d", state.step, total_steps)
    loaded = train_batches(shards, config.inputs, model.text_model.tokenizer, config.data, plan, features)
    # Batches that are scored together stay in the host's memory until each has its turn.
    batches = copied_ahead(loaded, process.device) if k == 1 else loaded
    with syncing(folder, config.remote, process.is_main), closing(loaded):
        run.make_up(state, logger)
        for _ in train(state, batches, options, process, logger):
            if run.after_step(state, logger, interrupts):
                break
        logger.close()


def open_val_datasets(config: TrainConfig) -> list[DatasetConfig]:
    """The data sets of the evaluation, checked.

    Raises:
        UserError: one is not there or cannot be read, two have one name, or there are none and they are needed.
    """
    val_datasets = [load_dataset_config(path, config.eval.val_data_root) for path in config.eval.val_config]
    names = [dataset.name for dataset in val_datasets]
    best = config.checkpoint.keep_best
    if best is not None and not names:
        raise UserError("--keep-best needs evaluation data: --val-config")
    metrics = [f"{dataset.name}/{metric}" for dataset in val_datasets for metric in METRICS[dataset.task]]
    if best is not None and best not in metrics:
        raise UserError(f"--keep-best {best} is none of the metrics: {', '.join(metrics)}")
    if len(set(names)) < len(names):
        raise UserError(f"two of --val-config are named {max(names, key=names.count)}: their figures would mix")
    for dataset in val_datasets:
        check_dataset(dataset, config.inputs)
    return val_datasets


def new_model(config: TrainConfig) -> DualEncoder:
    """The model with its first weights, the same on every rank; what is to train asks for gradients."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, config.inputs.input_shape)
    apply_tuning(model, config.model.tuning)
    return model


def new_state(config: TrainConfig, model: DualEncoder, process: Process) -> TrainState:
    """A model and its optimizers under the engine that was asked for."""
    engine = make_engine(model, config.optim, process, config.engine)
    torch.manual_seed(config.seed + process.rank)  # each rank drops patches of its own
    decay = config.optim.ema_decay
    return TrainState(engine, None if decay is None else Ema(engine.parameters, decay))


def report_start(config: TrainConfig, model: nn.Module, process: Process, shards: dict, total_steps: int) -> None:
    """What a reader of the log asks first."""
    init, ranks = config.model.init, process.world_size
    log.info(
        "languagebind %s, torch %s, %s x %d, %s, %s",
        languagebind.__version__, torch.__version__, process.device.type, ranks, config.engine.engine,
        config.optim.precision,
    )  # fmt: skip
    samples = "an unknown number of" if None in shards.values() else sum(shards.values())
    names = [name for name in (init.encoder_tower, init.encoder_pretrained) if name]
    start = "random weights" if "none" in names else " ".join(names)
    log.info("%s samples in %d shards; the encoder starts from %s", samples, len(shards), start)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "%s tuning trains %.2f M of %.2f M parameters", config.model.tuning.tuning, trained / 1e6, everything / 1e6
    )
    batch, accum = config.data.batch_size, config.optim.accum_freq
    log.info(
        "batch %d x %d accumulated x %d ranks = %d, %d steps an epoch, %d steps",
        batch, accum, ranks, batch * accum * ranks, total_steps // config.optim.epochs, total_steps,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
