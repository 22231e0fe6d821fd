"""Save checkpoints, evaluate, and handle signals between the steps of a run."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from languagebind.config import UserError, to_dict
from languagebind.distributed import Process, on_any_rank, on_main
from languagebind.eval import ListedDataset, evaluate

from .checkpoint import TrainState, checkpoint_content
from .checkpoint_files import note_best, write_checkpoint
from .logger import Logger
from .params import TrainConfig

log = logging.getLogger(__name__)


@contextmanager
def interrupts() -> Iterator[list[str]]:
    """Yield a list that collects the names of SIGTERM and SIGUSR1 signals, which do not kill the process."""
    received: list[str] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield received
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
            command = f"--name {self.folder.name} --resume latest"
            log.info("stopped by %s after step %d: continue with %s", name, state.step, command)
            return True
        if self._evaluates_at(state.step):
            self.validate(state, logger)
        return False

    def evaluate_missed(self, state: TrainState, logger: Logger) -> None:
        """Run the evaluation that was due when the run was stopped."""
        names = [dataset.config.name for dataset in self.val_datasets]
        missed = state.step > 0 and self._evaluates_at(state.step) and not logger.evaluated(state.step, names)
        if on_any_rank([self.process.is_main and missed], self.process.device)[0]:
            log.info("the run was stopped before the evaluation of step %d: evaluating now", state.step)
            self.validate(state, logger)

    def save(self, state: TrainState, last: bool) -> None:
        """Write a checkpoint. Before the last one, check that the frozen text tower has not changed."""
        content = checkpoint_content(state, to_dict(self.config), self.fingerprint, self.shards_digest)

        def write() -> None:
            if last and state.engine.model.text_fingerprint() != self.fingerprint:
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
        best = self.config.checkpoint.keep_best
        if best is not None:
            on_main(self.process, lambda: note_best(self.folder / "checkpoints", state.step, best, metrics))
        # Last: a run that is killed earlier evaluates this step again, which also repairs an unfinished best.pt.
        logger.metrics(state.step, metrics)

    def _evaluates_at(self, step: int) -> bool:
        return bool(self.val_datasets) and self._is_due(step, self.config.eval.val_every_n_steps)

    def _saves_at(self, step: int) -> bool:
        return self._is_due(step, self.config.checkpoint.save_every_n_steps) or self._evaluates_at(step)

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.total_steps or (every > 0 and step % every == 0)
