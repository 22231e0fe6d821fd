"""Evaluate models: languagebind eval --model SPEC ... --config NAME ... --data-root DIR"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from typing import Any

from ..config import UserError, run
from ..distributed import Process, joined, on_main, world_size
from ..modalities import modality_name
from .cache import weights_digest
from .clip_benchmark import with_clip_benchmark_keys
from .command import parse_command, save
from .evaluate import ListedDataset, evaluate
from .jobs import EvalOptions, Job, describe_absent, list_early, plan_jobs, select_datasets, select_models
from .models import load_eval_model
from .results import comparison, results_table


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_command(EvalOptions, argv, "eval", "--config", "--model", "--data")
    models = select_models(options)
    datasets, absent = select_datasets(options)
    failures: list[str] = []
    modalities: set[str] = set()  # of the models
    with joined(options.encode.device) as process:
        # Only the first rank looks for result files: it writes them, and other nodes may have other files
        jobs: list[Job] = on_main(process, lambda: plan_jobs(models, datasets, options))
        todo = [job for job in jobs if job.result is None]
        listed = list_early(datasets, options) if todo else None
        for name, group in groupby(todo, key=lambda job: job.model):
            note = partial(_noting_failure, failures, f"{name}: " if len(models) > 1 else "")
            with note():
                modalities.add(_evaluate_model(list(group), listed, options, process, note))
        made = [job for job in todo if job.result is not None]
        if process.is_main:
            _print(jobs if options.compare else made, options)
            for dataset in absent:
                if dataset.modality in (None, *modalities):
                    print(describe_absent(dataset))
    if failures:
        tried, written = len(failures) + len(made), "; the others were written" if made else ""
        head = [f"{len(failures)} of {tried} evaluations failed{written}:"] if tried > 1 else []
        raise UserError("\n  ".join([*head, *failures]))
    read = {job.dataset.name for job in jobs if job.result is not None}
    unread = [dataset for dataset in datasets if dataset.name not in read]
    if unread and (not options.all or not read):
        kinds = ", ".join(f"{dataset.name} is {dataset.modality}" for dataset in unread)
        raise UserError(f"{kinds}, but the models read {' or '.join(sorted(modalities))}: choose other datasets")


@contextmanager
def _noting_failure(failures: list[str], label: str) -> Iterator[None]:
    """Add a `UserError` to `failures`, so that one failure does not stop the other jobs."""
    try:
        yield
    except UserError as error:
        if world_size() > 1:  # The error may be on one rank only, while the other ranks wait for it
            raise
        logging.error("%san evaluation failed; the reason follows at the end", label)
        failures.append(f"{label}{error}")


def _evaluate_model(
    jobs: Sequence[Job], listed: ListedDataset | None, options: EvalOptions, process: Process, note: Callable[[], Any]
) -> str:
    """Evaluate one model, write each result as soon as it is computed, and return the model's modality."""
    first = jobs[0]
    default = first.dataset.modality if len({job.dataset.modality for job in jobs}) == 1 else None
    model, kind = load_eval_model(first.spec, process.device, options.modality, options.num_frames, default)
    own = modality_name(kind)
    weights = weights_digest(model) if getattr(model, "known", True) else None
    encode: dict[str, Any] = asdict(replace(options.encode, device=str(process.device)))
    for job in jobs:
        if (options.all or len(options.model) > 1) and job.dataset.modality not in (None, own):
            continue
        with note():
            dataset, dual = listed or job.dataset, options.dual_softmax
            result = evaluate(model, kind, dataset, export=job.export, dual_softmax=dual, **encode)
            checkpoint = {"checkpoint": job.asked["checkpoint"], "weights_sha256": weights}
            result |= {"pretrained": job.model} | checkpoint | {"asked": job.asked}
            written = with_clip_benchmark_keys(result) if options.clip_benchmark_keys else result
            save(written, job.path, process, options.overwrite)
            job.result = result
    return own


def _print(jobs: Sequence[Job], options: EvalOptions) -> None:
    """Print one table that compares all models, or one table per model."""
    results = [job.result for job in jobs if job.result is not None]
    if options.compare and results:
        order = [job.dataset.name for job in jobs]
        print(comparison(sorted(results, key=lambda result: order.index(result["dataset"]))))
    elif not options.compare:
        for name, own in groupby(results, key=lambda result: result["pretrained"]):
            heading = f"{name}:\n" if len(options.model) > 1 else ""
            print(heading + results_table(list(own)))


if __name__ == "__main__":
    run(main)
