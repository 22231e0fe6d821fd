"""Save checkpoints, evaluate, and handle signals between the steps of a run."""

import logging
import os
import shlex
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from languagebind.config import UserError, to_dict
from languagebind.distributed import on_any_rank, on_main
from languagebind.eval import ListedDataset, evaluate
from languagebind.hub.checkpoint import PARTS
from languagebind.model import DualEncoder

from .batch import Batch
from .checkpoint import TrainState, checkpoint_content
from .checkpoint_files import note_best, write_checkpoint
from .loader import copied_ahead
from .logger import Logger
from .params import TrainConfig
from .reports import Reports
from .train import train

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
    """The training of one modality, which evaluates between its steps."""

    config: TrainConfig
    folder: Path  # of its logs
    val_datasets: list[ListedDataset]
    state: TrainState
    batches: Generator[Batch]
    size: int  # bytes of its checkpoint

    def __post_init__(self):
        self.process = self.state.engine.process
        self.total_steps = self.state.steps_per_epoch * self.config.optim.epochs

    def begin(self, label: str, wishes: Callable[[], list[bool]]) -> None:
        """Open the logs, without the rows of later steps, and make `steps`, an iterator that takes a step at a time."""
        config, step, folder = self.config, self.state.step, self.folder if self.process.is_main else None
        self.logger = Logger(folder, config.log, to_dict(config), step, label)
        # With accumulation, micro-batches stay in host memory until they are used.
        batches = copied_ahead(self.batches, self.process.device) if config.optim.accum_freq == 1 else self.batches
        self.reports = Reports(self.state.engine, wishes)
        self.steps = train(self.state, batches, config, self.logger, self.reports)

    def evaluate_missed(self) -> None:
        """Run the evaluation that was due when the run was stopped."""
        step, names = self.state.step, [dataset.config.name for dataset in self.val_datasets]
        missed = step > 0 and self.evaluates_at(step) and not self.logger.evaluated(step, names)
        if on_any_rank([self.process.is_main and missed], self.process.device)[0]:
            log.info("the run was stopped before the evaluation of step %d: evaluating now", step)
            self.validate()

    def validate(self) -> None:
        """Evaluate on every dataset, and update the best checkpoint."""
        metrics: dict[str, float] = {}
        state, best = self.state, self.config.checkpoint.keep_best
        with state.ema.applied() if state.ema else nullcontext(), state.engine.whole_model() as model:
            for dataset in self.val_datasets:
                metrics |= self._evaluate(model, dataset)
        if best in metrics:
            on_main(self.process, lambda: note_best(self.folder / "checkpoints", state.step, str(best), metrics))
        elif best is not None:
            log.warning("no best checkpoint at step %d: the evaluation gave no %s", state.step, best)
        # Last: a run that is killed earlier evaluates this step again, which also repairs an unfinished best.pt.
        self.logger.metrics(state.step, metrics)

    def evaluates_at(self, step: int) -> bool:
        """Tell whether an evaluation is due after a step."""
        return bool(self.val_datasets) and is_due(step, self.config.eval.val_every_n_steps, self.total_steps)

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
        log.info("%sEval %s", self.logger.label, " ".join(f"{name}: {value:.4f}" for name, value in found.items()))
        return found


@dataclass
class Runs:
    """The runs of a process, one for each modality, which take turns and save one checkpoint for all."""

    by_modality: dict[str, Run]
    shares: dict[str, float]  # relative numbers of steps
    folder: Path
    signals: list[str]  # names of those that this process has received
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        self.first = next(iter(self.by_modality.values()))
        self.process, self.options = self.first.process, self.first.config.checkpoint
        # --epochs may be less now
        self.total_steps = sum(max(run.state.step, run.total_steps) for run in self.by_modality.values())

    @property
    def step(self) -> int:
        """The number of steps that all runs have taken."""
        return sum(run.state.step for run in self.by_modality.values())

    def turns(self) -> Iterator[tuple[Run, int]]:
        """Yield the run of each remaining step, and the number of its step. A resumed run continues the order."""
        taken = {name: run.state.step for name, run in self.by_modality.items()}
        while left := [name for name, run in self.by_modality.items() if taken[name] < run.total_steps]:
            name = min(left, key=lambda name: (taken[name] + 1) / self.shares[name])
            taken[name] += 1
            yield self.by_modality[name], taken[name]

    def new_checkpoints(self) -> int:
        """Return the maximum number of new checkpoints on disk, not counting those of --save-every-minutes."""
        planned = sum(self._saves_at(step, *turn) for step, turn in enumerate(self.turns(), self.step + 1)) or 1
        keep = self.options.keep_last
        kept = planned if keep is None else min(planned, keep + 1)  # the oldest is removed after the newest is written
        return kept + (self.options.keep_best is not None)

    def wishes(self) -> list[bool]:
        """Return whether this rank wants to stop, and whether it wants a checkpoint by --save-every-minutes."""
        minutes = self.options.save_every_minutes
        late = self.process.is_main and minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return [bool(self.signals), late]

    def _granted(self) -> list[bool]:
        """Return `wishes` of any rank, as far as all ranks know: those of the step before."""
        if self.process.world_size == 1:
            return self.wishes()
        reports = [run.reports for run in self.by_modality.values()]
        return [any(x.stop for x in reports), any(x.save for x in reports)]

    def after_step(self, run: Run) -> bool:
        """Save and evaluate if they are due after a run's step; return True if training must stop."""
        step, (stop, late) = self.step, self._granted()
        # Save first, so that nothing is lost if the evaluation fails.
        if self._saves_at(step, run, run.state.step) or stop or late:
            for own in self.by_modality.values():
                own.reports.read()  # raises if a step failed
            stop = self._granted()[0]
            self.save(last=stop or step == self.total_steps)
        if stop and step < self.total_steps:
            name = self.signals[-1] if self.signals else "a signal to another rank"
            log.info("stopped by %s after step %d: continue with %s", name, step, self.continuation())
            return True
        if run.evaluates_at(run.state.step):
            run.validate()
        return False

    def continuation(self) -> str:
        """Return the command that continues training; on several nodes, torchrun needs its other flags, too."""
        ranks = self.process.world_size
        launcher = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', ranks)}" if ranks > 1 else "python"
        name = [] if self.options.name else ["--name", self.folder.name]
        flags = shlex.join(["--config", str(self.folder / "config.yaml"), *name, "--resume", "latest"])
        return f"{launcher} -m training.main {'-- ' if ranks > 1 else ''}{flags}"

    def save(self, last: bool) -> None:
        """Write a checkpoint. Before the last one, check that a frozen text tower has not changed."""
        parts = {name: checkpoint_content(run.state, to_dict(run.config)) for name, run in self.by_modality.items()}

        def write() -> None:
            state = self.first.state
            model = state.engine.model
            if last and not model.trains_text and model.text_fingerprint() != state.text_fingerprint:
                raise UserError("the frozen text tower has changed: no checkpoint was written")
            for name, part in parts.items():
                if not all(x.isfinite().all() for x in part["model"].values()):
                    which = f"{name} weights" if len(parts) > 1 else "weights"
                    raise UserError(f"some {which} are not finite after step {part['step']}: no checkpoint was written")
            content = {"step": self.step, PARTS: parts} if len(parts) > 1 else next(iter(parts.values()))
            write_checkpoint(self.folder / "checkpoints", content, self.options.keep_last)

        on_main(self.process, write)
        self.saved_at = time.monotonic()
        for run in self.by_modality.values():
            run.reports.save = False

    def _saves_at(self, step: int, run: Run, own_step: int) -> bool:
        return is_due(step, self.options.save_every_n_steps, self.total_steps) or run.evaluates_at(own_step)


def is_due(step: int, every: int, total: int) -> bool:
    """Tell whether something that is done every so many steps, and at the end, is due after a step."""
    return step == total or (every > 0 and step % every == 0)
