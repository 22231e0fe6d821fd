"""What happens between the steps of a run."""

import logging
import math
import signal
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

from languagebind.config import UserError, to_dict
from languagebind.distributed import Process, fail_together, gather_objects, on_any_rank
from languagebind.eval import DatasetConfig
from languagebind.eval.evaluate import evaluate

from .checkpoint import TrainState, checkpoint_content, rank_state
from .checkpoint_files import Clock, checkpoint_path, note_best, remove_old, write_checkpoint
from .logger import Logger
from .params import TrainConfig

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


log = logging.getLogger(__name__)


class Interrupts:
    """While it is open, SIGTERM and SIGUSR1 ask the run to save and stop, in place of killing it.

    Attributes:
        received: the name of the last signal; None: there was none.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


class Run:
    """What happens between the steps: checkpoints, evaluation, and stopping when a scheduler says so."""

    def __init__(
        self,
        config: TrainConfig,
        process: Process,
        folder: Path,
        fingerprint: str,
        shards_digest: str,
        val_datasets: list[DatasetConfig],
        total_steps: int,
    ):
        self.config, self.process, self.folder = config, process, folder
        self.fingerprint, self.shards_digest = fingerprint, shards_digest
        self.val_datasets, self.total_steps = val_datasets, total_steps
        self.clock = Clock(config.checkpoint.save_every_minutes)

    def checkpoints_kept(self, first_step: int) -> int:
        """How many checkpoints lie on the disk at once, at most, of those that steps decide."""
        a, b = self.config.checkpoint.save_every_n_steps, self.config.eval.val_every_n_steps if self.val_datasets else 0

        def times(every: int) -> int:
            return (self.total_steps - 1) // every - first_step // every if every else 0

        planned = 1 + max(0, times(a) + times(b) - times(math.lcm(a, b)))  # the last step is always saved
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
            self.validate(state, logger)
        return False

    def make_up(self, state: TrainState, logger: Logger) -> None:
        """Evaluate at the step that a run goes on from, where that was due and the run ended before it was done."""
        names = [dataset.name for dataset in self.val_datasets]
        missed = state.step > 0 and self._validates_at(state.step) and not logger.evaluated(state.step, names)
        if on_any_rank([self.process.is_main and missed], self.process.device)[0]:
            log.info("step %d was not evaluated before the run was stopped: that comes first", state.step)
            self.validate(state, logger)

    def save(self, state: TrainState) -> None:
        """Write a checkpoint on the main rank, with every rank's own state in it."""
        content = checkpoint_content(state, to_dict(self.config), self.fingerprint)
        content["ranks"], failure = gather_objects(rank_state(state)), None
        content["shards"] = self.shards_digest
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
        fail_together(failure, self.process.device)
        self.clock.restart()

    def validate(self, state: TrainState, logger: Logger) -> None:
        """Evaluate on every data set, and keep the checkpoint of this step as the best one, if it is."""
        metrics, failure = self._evaluate(state), None
        if self.process.is_main and self.config.checkpoint.keep_best is not None:
            try:
                note_best(self.folder / "checkpoints", state.step, self.config.checkpoint.keep_best, metrics)
            except (UserError, OSError) as error:
                failure = str(error)
        # Last: a run that was killed before evaluates this step again, and so mends a half-noted best one.
        logger.metrics(state.step, metrics)
        fail_together(failure, self.process.device)

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        """`{"<dataset>/<metric>": value}`."""
        metrics = {}
        with state.ema.applied() if state.ema else nullcontext(), state.engine.whole_model() as model:
            for dataset in self.val_datasets:
                result = evaluate(
                    model,
                    self.config.inputs,
                    dataset,
                    statistics=False,
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


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
