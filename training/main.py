"""Train an encoder:

python -m training.main --config configs/depth.yaml --train-data /data/depth

or on several GPUs:

torchrun --nproc_per_node 8 -m training.main -- --config configs/depth.yaml --train-data /data/depth
"""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import torch
import yaml
from torch import nn

from languagebind.config import UserError, first_line, run, to_dict
from languagebind.data.text_features import open_text_features
from languagebind.distributed import (
    Process,
    close_process,
    gather_objects,
    init_process,
    is_lost_rank,
    on_any_rank,
    on_every_rank,
)
from languagebind.eval import DatasetConfig, check_dataset, evaluate, load_dataset_config
from languagebind.modalities import modality_names
from languagebind.model import DualEncoder, build_model
from languagebind.remote import file_size, is_url
from languagebind.tuning import apply_tuning

from .checkpoint import (
    Clock,
    TrainState,
    checkpoint_content,
    checkpoint_path,
    latest_whole,
    load_weights,
    note_best,
    rank_state,
    read_resumable,
    remove_old,
    restore,
    write_checkpoint,
)
from .data import Plan, train_batches
from .ema import Ema
from .engine import make_engine
from .interrupt import Interrupts
from .logger import Logger, log_to_file, setup_logging
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
    except RuntimeError as error:
        if process.world_size == 1 or not is_lost_rank(error):
            raise
        lost = UserError(
            f"rank {process.rank} lost another rank, which says itself why it ended, unless it was killed. When that is"
            f" mended, go on with --resume latest. ({first_line(error)})"
        )
        log_to_file(lost)
        raise lost from error
    finally:
        close_process()


def fit(config: TrainConfig, process: Process) -> None:
    """Train as the config says.

    Raises:
        UserError: what the config asks for cannot be done; or the run had to stop, with the reason.
    """
    shards, steps_per_epoch = check_data(config.data, config.inputs, process.world_size, config.optim.accum_freq)
    val_datasets = [load_dataset_config(path, config.eval.val_data_root) for path in config.eval.val_config]
    names = [dataset.name for dataset in val_datasets]
    if config.checkpoint.keep_best is not None and not names:
        raise UserError("--keep-best needs evaluation data: --val-config")
    if len(set(names)) < len(names):
        raise UserError(f"two of --val-config are named {max(names, key=names.count)}: their figures would mix")
    for dataset in val_datasets:
        check_dataset(dataset, config.inputs)
    folder, resume = open_run(config, process)
    model = new_model(config)
    fingerprint = model.text_fingerprint()
    features = open_text_features(config.data.text_features, shards, config.data.caption_source, fingerprint)
    log.info("text features: %s", "encoded at each step" if features is None else "from beside the shards")
    total_steps = steps_per_epoch * config.optim.epochs
    checkpoint = read_resumable(resume, to_dict(config), fingerprint) if resume else None
    if checkpoint:
        load_weights(model, checkpoint, resume)
    run = Run(config, process, folder, fingerprint, val_datasets, total_steps)
    check_disk(folder, model, run.checkpoints_kept(checkpoint["step"] if checkpoint else 0))
    report_start(config, model, process.world_size, steps_per_epoch, total_steps)
    state = new_state(config, model, process)
    if checkpoint:
        restore(resume, checkpoint, state, process.rank, to_dict(config))
        log.info("resumed from %s at step %d of %d", resume, state.step, total_steps)
        del checkpoint
    if process.is_main:  # not before the checkpoint was accepted: these would replace the options that it was made with
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))

    logger = Logger(folder if process.is_main else None, config.log, to_dict(config), state.step)
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
    if state.step >= total_steps:
        log.warning("nothing to do: %d steps are done, and these options make %d", state.step, total_steps)
    batches = train_batches(shards, config.inputs, model.text_model.tokenizer, config.data, plan, features)
    with Interrupts() as interrupts, syncing(folder, config.remote, process.is_main), closing(batches):
        for _ in train(state, batches, options, process, logger):
            if run.after_step(state, logger, interrupts):
                break
        logger.close()


class Run:
    """What happens between the steps: checkpoints, evaluation, and stopping when a scheduler says so."""

    def __init__(
        self,
        config: TrainConfig,
        process: Process,
        folder: Path,
        fingerprint: str,
        val_datasets: list[DatasetConfig],
        total_steps: int,
    ):
        self.config, self.process, self.folder, self.fingerprint = config, process, folder, fingerprint
        self.val_datasets, self.total_steps = val_datasets, total_steps
        self.clock = Clock(config.checkpoint.save_every_minutes)

    def checkpoints_kept(self, first_step: int) -> int:
        """How many checkpoints lie on the disk at once, at most, of those that steps decide."""
        steps = range(first_step + 1, self.total_steps + 1)
        planned = sum(self._saves_at(step) for step in steps)
        kept = planned if self.config.checkpoint.keep_last is None else self.config.checkpoint.keep_last + 1
        return min(planned, kept) + (self.config.checkpoint.keep_best is not None)

    def after_step(self, state: TrainState, logger: Logger, interrupts: Interrupts) -> bool:
        """Save and evaluate where it is time to; whether to stop here."""
        stop, minutes_over = on_any_rank(
            [interrupts.received is not None, self.process.is_main and self.clock.due()], self.process.device
        )
        # The checkpoint comes first: should the evaluation fail, nothing is lost.
        if self._saves_at(state.step) or stop or minutes_over:
            self.save(state)
        if stop and state.step < self.total_steps:
            name = self.folder.name
            log.info(
                "stopped by %s after step %d: go on with --name %s --resume latest",
                interrupts.received or "a signal to another rank", state.step, name,
            )  # fmt: skip
            return True
        if self._validates_at(state.step):
            metrics = self.validate(state)
            logger.metrics(state.step, metrics)
            if self.process.is_main and self.config.checkpoint.keep_best is not None:
                note_best(self.folder / "checkpoints", state.step, self.config.checkpoint.keep_best, metrics)
        return False

    def save(self, state: TrainState) -> None:
        """Write a checkpoint on the main rank, with every rank's own state in it."""
        content = checkpoint_content(state, to_dict(self.config), self.fingerprint)
        content["ranks"], failure = gather_objects(rank_state(state)), None
        path = checkpoint_path(self.folder / "checkpoints", state.step)
        if self.process.is_main:
            if not all(x.isfinite().all() for x in content["model"].values()):
                failure = f"weights are not finite after step {state.step}: no checkpoint was written"
            if state.engine.model.text_fingerprint() != self.fingerprint:
                raise RuntimeError("the text tower has changed: a frozen one must not; no checkpoint was written")
            try:
                if failure is None:
                    write_checkpoint(path, content)
                    remove_old(path.parent, self.config.checkpoint.keep_last)
                    log.info("saved %s", path)
            except UserError as error:
                failure = str(error)
        if failure := on_every_rank(failure, self.process.device):
            raise UserError(failure)
        self.clock.restart()

    def validate(self, state: TrainState) -> dict[str, float]:
        """Evaluate on every data set; `{"<dataset>/<metric>": value}`."""
        metrics = {}
        with state.ema.applied() if state.ema else nullcontext(), state.engine.whole_model() as model:
            for dataset in self.val_datasets:
                result = evaluate(
                    model,
                    self.config.inputs,
                    dataset,
                    batch_size=self.config.eval.val_batch_size,
                    workers=self.config.data.workers,
                    device=self.process.device,
                    precision=self.config.optim.precision,
                )
                found = {f"{result['dataset']}/{name}": value for name, value in result["metrics"].items()}
                log.info("Eval %s", " ".join(f"{name}: {value:.4f}" for name, value in found.items()))
                metrics |= found
        return metrics

    def _validates_at(self, step: int) -> bool:
        return bool(self.val_datasets) and (step == self.total_steps or due(step, self.config.eval.val_every_n_steps))

    def _saves_at(self, step: int) -> bool:
        every = self.config.checkpoint.save_every_n_steps
        return step == self.total_steps or due(step, every) or self._validates_at(step)


def open_run(config: TrainConfig, process: Process) -> tuple[Path, Path | str | None]:
    """The run's folder, made and with logging into it, and the checkpoint to go on from.

    Raises:
        UserError: the folder is there already and nothing says to go on; or there is no such checkpoint.
    """
    options, failure, resume, faults = config.checkpoint, None, None, []
    name = options.name or f"{time.strftime('%Y_%m_%d-%H_%M_%S')}-{config.modality}-{config.model.tuning.tuning}"
    folder = options.logs / gather_objects(name)[0]
    if options.resume == "latest" and options.name is None:
        failure = "--resume latest needs --name: the run that it is the latest of"
    elif options.resume == "latest":
        found = latest_whole(folder / "checkpoints") if process.is_main else None
        resume, faults = gather_objects(found)[0]  # one rank looks, so that all go on from the same one
        resume = resume or latest_remote(config.remote, folder, process.is_main)
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
    for fault in faults if process.is_main else ():
        log.warning(fault)
    if options.resume == "latest" and resume is None:
        log.warning("no checkpoint in %s: starting from step 0", folder)
    return folder, resume


def new_model(config: TrainConfig) -> DualEncoder:
    """The model with its first weights, the same on every rank; what is to train asks for gradients."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, config.inputs.input_shape)
    apply_tuning(model, config.model.tuning)
    if (config.optim.loss == "siglip") != (model.logit_bias is not None):
        raise UserError(
            "--loss siglip and --init-logit-bias belong together: SigLIP starts at"
            " --init-logit-bias -10 --init-temperature 0.1"
        )
    return model


def new_state(config: TrainConfig, model: DualEncoder, process: Process) -> TrainState:
    """A model and its optimizers under the engine that was asked for."""
    engine = make_engine(model, config.optim, process, config.engine)
    torch.manual_seed(config.seed + process.rank)  # each rank drops patches of its own
    decay = config.optim.ema_decay
    return TrainState(engine, None if decay is None else Ema(engine.trained() | engine.scalars, decay))


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def report_start(config: TrainConfig, model: nn.Module, ranks: int, steps_per_epoch: int, total_steps: int) -> None:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "%s tuning trains %.2f M of %.2f M parameters", config.model.tuning.tuning, trained / 1e6, everything / 1e6
    )
    batch, accum = config.data.batch_size, config.optim.accum_freq
    log.info(
        "batch %d x %d accumulated x %d ranks = %d, %d steps an epoch, %d steps",
        batch, accum, ranks, batch * accum * ranks, steps_per_epoch, total_steps,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
