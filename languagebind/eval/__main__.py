"""python -m languagebind.eval --model SPEC [SPEC ...] --config FILE.yaml [...] --data-root DIR --output results"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

from ..config import UserError, run
from ..distributed import Process, joined, on_main
from ..modalities import modality_name
from .cache import weights_digest
from .clip_benchmark import with_clip_benchmark_keys
from .command import parse_command, save
from .evaluate import evaluate
from .jobs import EvalOptions, Job, describe_absent, plan_jobs, select_datasets, select_models
from .models import load_eval_model
from .results import comparison, table


@dataclass
class Outcome:
    """What came of the jobs, beside their results."""

    process: Process
    failures: list[str] = field(default_factory=list)
    unread: list[Job] = field(default_factory=list)  # the model reads another modality
    modalities: set[str] = field(default_factory=set)  # what the models read

    @contextmanager
    def noting_failure(self, label: str) -> Iterator[None]:
        """Note a `UserError` for the end, so that one failure does not stop the other jobs."""
        try:
            yield
        except UserError as error:
            if self.process.world_size > 1:  # perhaps on one rank only, and the others wait for it
                raise
            logging.error("%san evaluation failed; the reason follows at the end", label)
            self.failures.append(f"{label}{error}")


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_command(EvalOptions, argv, "languagebind.eval", "--config", "--model", "--data")
    models = select_models(options)
    datasets, absent = select_datasets(options)
    with joined(options.encode.device) as process:
        # Only the first rank looks for results, as only it writes them: other nodes may have other files
        jobs: list[Job] = on_main(process, lambda: plan_jobs(models, datasets, options))
        todo, outcome = [job for job in jobs if job.result is None], Outcome(process)
        for name, group in groupby(todo, key=lambda job: job.model):
            label = f"{name}: " if len(models) > 1 else ""
            with outcome.noting_failure(label):
                _evaluate_model(list(group), options, outcome, label)
        made = [job for job in todo if job.result is not None]
        if process.is_main:
            _print(jobs if options.compare else made, options)
            for dataset in absent:
                if dataset.modality in (None, *outcome.modalities):
                    print(describe_absent(dataset))
    if outcome.failures:
        failed, tried = len(outcome.failures), len(outcome.failures) + len(made)
        written = ", the others are written" if made else ""
        head = [f"{failed} of {tried} evaluations failed{written}:"] if tried > 1 else []
        raise UserError("\n  ".join([*head, *outcome.failures]))
    read = {job.dataset.name for job in jobs if job not in outcome.unread}
    unread = [dataset for dataset in datasets if dataset.name not in read]
    if unread and (not options.all or not read):
        kinds = ", ".join(f"{dataset.name} is {dataset.modality}" for dataset in unread)
        raise UserError(f"{kinds}; the models read {' or '.join(sorted(outcome.modalities))}")


def _evaluate_model(jobs: Sequence[Job], options: EvalOptions, outcome: Outcome, label: str) -> None:
    """Compute one model's results, and write each as soon as it is there."""
    process, first = outcome.process, jobs[0]
    default = first.dataset.modality if len({job.dataset.modality for job in jobs}) == 1 else None
    model, kind = load_eval_model(first.spec, process.device, options.modality, options.num_frames, default)
    own = modality_name(kind)
    outcome.modalities.add(own)
    weights = weights_digest(model) if getattr(model, "known", True) else None
    encode: dict[str, Any] = asdict(replace(options.encode, device=str(process.device)))
    for job in jobs:
        if (options.all or len(options.model) > 1) and job.dataset.modality not in (None, own):
            outcome.unread.append(job)
            continue
        with outcome.noting_failure(label):
            result = evaluate(model, kind, job.dataset, export=job.export, dual_softmax=options.dual_softmax, **encode)
            checkpoint = {"checkpoint": job.asked["checkpoint"], "weights_sha256": weights}
            result |= {"pretrained": job.model} | checkpoint | {"asked": job.asked}
            written = with_clip_benchmark_keys(result) if options.clip_benchmark_keys else result
            save(written, job.path, process, options.overwrite)
            job.result = result


def _print(jobs: Sequence[Job], options: EvalOptions) -> None:
    """Print the jobs' results: one table of all models to compare, or one table for each model."""
    results = [job.result for job in jobs if job.result is not None]
    if options.compare:
        order = [job.dataset.name for job in jobs]
        if results:
            print(comparison(sorted(results, key=lambda result: order.index(result["dataset"]))))
        return
    for name, own in groupby(results, key=lambda result: result["pretrained"]):
        if len(options.model) > 1:
            print(f"{name}:")
        print(table(list(own)))


if __name__ == "__main__":
    run(main)
