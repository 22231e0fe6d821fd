"""Save checkpoints, evaluate, and handle signals between the steps of a run."""

import logging
import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from languagebind.config import UserError, to_dict
from languagebind.distributed import Process, on_any_rank, on_main
from languagebind.eval import ListedDataset, evaluate
from languagebind.model import DualEncoder
from languagebind.partner import Partner

from .checkpoint import TrainState, checkpoint_content
from .checkpoint_files import note_best, write_checkpoint
from .logger import Logger
from .params import TrainConfig

log = logging.getLogger(__name__)


@contextmanager
def interrupts(received: list[str], *numbers: signal.Signals, is_main: bool = True) -> Iterator[None]:
    """Add the names of signals to a list, in place of their effect. A second SIGINT (Ctrl-C) ends the process."""

    def receive(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and name in received:
            raise KeyboardInterrupt
        received.append(name)
        if number == signal.SIGINT and is_main:  # os.write, because the signal may arrive within a print
            os.write(2, b"interrupted: saving a checkpoint after this step; Ctrl-C again ends at once\n")

    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """A run, which saves and evaluates between its steps, and stops when it receives a signal."""

    config: TrainConfig
    process: Process
    folder: Path
    fingerprint: str
    """hash of the text tower"""
    shards_digest: str
    val_datasets: list[ListedDataset]
    total_steps: int
    partner: Partner | None = None
    saved_at: float = field(default_factory=time.monotonic)

    def new_checkpoints(self, first_step: int) -> int:
        """Return the maximum number of new checkpoints on disk, not counting those of --save-every-minutes."""
        planned = sum(self._saves_at(step) for step in range(first_step + 1, self.total_steps + 1)) or 1
        keep = self.config.checkpoint.keep_last
        kept = planned if keep is None else min(planned, keep + 1)  # the oldest is removed after the newest is written
        return kept + (self.config.checkpoint.keep_best is not None)

    def after_step(self, state: TrainState, logger: Logger, signals: list[str]) -> bool:
        """Save and evaluate if they are due; return True if the run must stop."""
        minutes = self.config.checkpoint.save_every_minutes
        late = self.process.is_main and minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        stop, late = on_any_rank([bool(signals), late], self.process.device)
        # Save first, so that nothing is lost if the evaluation fails.
        if self._saves_at(state.step) or stop or late:
            self.save(state, last=stop or state.step == self.total_steps)
        if stop and state.step < self.total_steps:
            name = signals[-1] if signals else "a signal to another rank"
            log.info("stopped by %s after step %d: continue with %s", name, state.step, self.continuation())
            return True
        if self._evaluates_at(state.step):
            self.validate(state, logger)
        return False

    def continuation(self) -> str:
        """Return the command that continues this run; on several nodes, torchrun needs its other flags, too."""
        ranks = self.process.world_size
        launcher = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', ranks)}" if ranks > 1 else "python"
        name = [] if self.config.checkpoint.name else ["--name", self.folder.name]
        flags = shlex.join(["--config", str(self.folder / "config.yaml"), *name, "--resume", "latest"])
        return f"{launcher} -m training.main {'-- ' if ranks > 1 else ''}{flags}"

    def evaluate_missed(self, state: TrainState, logger: Logger) -> None:
        """Run the evaluation that was due when the run was stopped."""
        names = [dataset.config.name for dataset in self.val_datasets]
        missed = state.step > 0 and self._evaluates_at(state.step) and not logger.evaluated(state.step, names)
        if on_any_rank([self.process.is_main and missed], self.process.device)[0]:
            log.info("the run was stopped before the evaluation of step %d: evaluating now", state.step)
            self.validate(state, logger)

    def save(self, state: TrainState, last: bool) -> None:
        """Write a checkpoint. Before the last one, check that a frozen text tower has not changed."""
        content = checkpoint_content(state, to_dict(self.config), self.fingerprint, self.shards_digest)

        def write() -> None:
            model = state.engine.model
            if last and not model.trains_text and model.text_fingerprint() != self.fingerprint:
                raise UserError("the frozen text tower has changed: no checkpoint was written")
            if not all(x.isfinite().all() for x in content["model"].values()):
                raise UserError(f"some weights are not finite after step {state.step}: no checkpoint was written")
            write_checkpoint(self.folder / "checkpoints", content, self.config.checkpoint.keep_last)

        on_main(self.process, write)
        self.saved_at = time.monotonic()

    def validate(self, state: TrainState, logger: Logger) -> None:
        """Evaluate on every dataset, and update the best checkpoint."""
        metrics: dict[str, float] = {}
        with state.ema.applied() if state.ema else nullcontext(), state.engine.whole_model() as model:
            for dataset in self.val_datasets:
                metrics |= self._evaluate(model, dataset)
        best = self.config.checkpoint.keep_best
        if best in metrics:
            on_main(self.process, lambda: note_best(self.folder / "checkpoints", state.step, str(best), metrics))
        elif best is not None:
            log.warning("no best checkpoint at step %d: the evaluation gave no %s", state.step, best)
        # Last: a run that is killed earlier evaluates this step again, which also repairs an unfinished best.pt.
        logger.metrics(state.step, metrics)

    def _evaluate(self, model: DualEncoder, dataset: ListedDataset) -> dict[str, float]:
        """Return a dataset's metrics without its unreadable samples, or {} if the evaluation fails."""
        options: dict[str, Any] = {"batch_size": self.config.eval.val_batch_size, "workers": self.config.data.workers,
                   "device": self.process.device, "precision": self.config.optim.precision}  # fmt: skip
        try:
            result = evaluate(model, self.config.inputs, dataset, statistics=False, skip_bad=True, **options)
        except (UserError, OSError, RuntimeError) as error:
            if self.process.world_size > 1 and not isinstance(error, UserError):
                raise  # all ranks raise the same UserError, but may wait for the one with another error
            log.error("the evaluation on %s failed, and training continues: %s", dataset.config.name, error)
            return {}
        found = {f"{result['dataset']}/{name}": value for name, value in result["metrics"].items()}
        log.info("Eval %s", " ".join(f"{name}: {value:.4f}" for name, value in found.items()))
        return found

    def _evaluates_at(self, step: int) -> bool:
        return bool(self.val_datasets) and self._is_due(step, self.config.eval.val_every_n_steps)

    def _saves_at(self, step: int) -> bool:
        return self._is_due(step, self.config.checkpoint.save_every_n_steps) or self._evaluates_at(step)

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.total_steps or (every > 0 and step % every == 0)
