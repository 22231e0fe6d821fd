"""python -m languagebind.eval --model SPEC [SPEC ...] --config FILE.yaml [...] --data-root DIR --output results"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..config import UserError, gather_flags, parse, run
from ..distributed import Process, fail_together, gather_objects, joined
from ..modalities import modality_name
from .cache import weights_digest
from .clip_benchmark import with_clip_benchmark_keys
from .evaluate import evaluate
from .models import load, reads_any
from .plan import EvalConfig, Job, Selection, as_asked, name_models, plan_jobs, select
from .results import comparison, read_result, table, write_result

log = logging.getLogger(__name__)


@dataclass
class Done:
    """What has been made of the jobs."""

    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    """datasets that a model could read"""
    modalities: set[str] = field(default_factory=set)


def main(argv: Sequence[str] | None = None) -> None:
    words = gather_flags(sys.argv[1:] if argv is None else argv, "--config", "--model", "--data")
    config = parse(EvalConfig, words, prog="python -m languagebind.eval", description=EvalConfig.__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    models = name_models(config)
    selection = select(config.config, config.data, config.configs if config.all else None, config.data_root)
    selection = replace(selection, datasets=as_asked(selection.datasets, config))
    with joined(config.encode.device) as process:
        # The first rank alone looks for results, as it writes them: other nodes may have other files there
        jobs = _on_main(process, lambda: plan_jobs(models, selection.datasets, config))
        done = Done(read={job.dataset.name for job in jobs if job.skipped})
        todo = [job for job in jobs if not job.skipped]
        for name, group in groupby(todo, key=lambda job: job.model):
            _evaluate(models[name], list(group), config, process, done)
        if process.is_main and (todo or config.compare):
            _report(done, jobs, selection, config)
    if done.failures:
        tried = len(done.failures) + len(done.results)
        written = ", the others are written" if done.results else ""
        head = [f"{len(done.failures)} of {tried} evaluations failed{written}:"] if tried > 1 else []
        raise UserError("\n  ".join([*head, *done.failures]))
    _check_read(done, todo, selection, config)


def _on_main(process: Process, make: Callable[[], Any]) -> Any:
    """What the first rank makes, on every rank; its failure is every rank's."""
    made, failure = None, None
    if process.is_main:
        try:
            made = make()
        except UserError as error:
            failure = str(error)
    fail_together(failure, process.device)
    return gather_objects(made)[0]


def _evaluate(spec: str, jobs: Sequence[Job], config: EvalConfig, process: Process, done: Done) -> None:
    """Make a model's results, each written as soon as it is made."""
    modality = config.modality
    if modality is None and reads_any(spec):
        held = {job.dataset.modality for job in jobs}
        modality = held.pop() if len(held) == 1 else None
    several = config.all or len(config.model) > 1
    name = f"{jobs[0].model}: " if len(config.model) > 1 else ""
    try:
        model, reader = load(spec, process.device, modality, config.num_frames)
    except UserError as error:
        if process.world_size > 1:
            raise
        done.failures.append(f"{name}{error}")
        done.read |= {job.dataset.name for job in jobs}
        return
    own = modality_name(reader)
    done.modalities.add(own)
    weights = weights_digest(model) if getattr(model, "known", True) else None
    options = asdict(replace(config.encode, device=str(process.device)))
    for job in jobs:
        if several and job.dataset.modality not in (None, own):
            continue
        done.read.add(job.dataset.name)
        try:
            result = evaluate(
                model, reader, job.dataset, dual_softmax=config.dual_softmax, export=job.export, **options
            )
            identity = {"checkpoint": job.asked["checkpoint"], "weights_sha256": weights, "asked": job.asked}
            result |= {"pretrained": job.model} | identity
            _on_main(process, lambda result=result, job=job: _write(result, job.path, config))
        except UserError as error:
            if process.world_size > 1:  # one alone may have failed, and the others wait for it
                raise
            log.error("%s could not be scored; why is said at the end", job.dataset.name)
            done.failures.append(f"{name}{error}")
            continue
        done.results.append(result)


def _write(result: dict[str, Any], path: Path, config: EvalConfig) -> None:
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} was made by another run meanwhile, and is left as it is")
    write_result(with_clip_benchmark_keys(result) if config.clip_benchmark_keys else result, path)
    log.info("wrote %s", path)


def _check_read(done: Done, jobs: Sequence[Job], selection: Selection, config: EvalConfig) -> None:
    """Raise `UserError` where no model reads a dataset that was named, or any dataset of all."""
    unread = {job.dataset.name: job.dataset.modality for job in jobs if job.dataset.name not in done.read}
    modalities = " or ".join(sorted(done.modalities))
    fitting = [dataset for dataset in selection.datasets if dataset.modality in (None, *done.modalities)]
    if config.all and done.modalities and not fitting:
        raise UserError(f"none of the datasets that are there is {modalities}")
    if unread and not config.all:
        kinds = ", ".join(f"{name} is of {modality}" for name, modality in unread.items())
        raise UserError(f"{kinds}; the models read {modalities}")


def _report(done: Done, jobs: Sequence[Job], selection: Selection, config: EvalConfig) -> None:
    """Print what was found, and which datasets are absent."""
    if config.compare:
        made = {(result["dataset"], result["pretrained"]): result for result in done.results}
        places = [dataset.name for dataset in selection.datasets]
        results = [
            read_result(job.path) if job.skipped else made[job.dataset.name, job.model]
            for job in sorted(jobs, key=lambda job: places.index(job.dataset.name))
            if job.skipped or (job.dataset.name, job.model) in made
        ]
        if results:
            print(comparison(results))
    else:
        for name, own in groupby(done.results, key=lambda result: result["pretrained"]):
            if len(config.model) > 1:
                print(f"{name}:")
            print(table(list(own)))
    absent = [dataset for dataset in selection.absent if dataset.modality in (None, *done.modalities)]
    for dataset in absent:
        print(f"absent: {dataset.name} ({dataset.data}); get it from: {(dataset.source or 'not said').strip()}")


if __name__ == "__main__":
    run(main)
