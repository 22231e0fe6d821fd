"""python -m languagebind.eval --model SPEC [SPEC ...] --config FILE.yaml [...] --data-root DIR --output results"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any, Literal

from ..config import UserError, gather_flags, parse, run
from ..distributed import Process, close_process, gather_objects, init_process
from ..modalities import modality_name
from . import EncodeOptions, evaluate
from .cache import weights_digest
from .clip_benchmark import with_clip_benchmark_keys
from .datasets import DatasetConfig, read_templates
from .export import check_format
from .models import checkpoint_of, load, named, reads_any
from .report import result_path, table, writable, write_result
from .report.compare import comparison
from .report.results import read_result
from .selection import Selection, select

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate models on the datasets of --config FILE.yaml ..., of --data FOLDER ..., or on --all."""

    config: tuple[Path, ...] = ()
    """YAML files that describe datasets, see configs/eval/"""
    checkpoint: str | None = None
    """a training checkpoint, a run's folder, a folder in the published layout, or a hub id"""
    model: tuple[str, ...] = ()
    """in place of --checkpoint, one or several: what it takes, open_clip:NAME/TAG (or NAME/FILE, or
    open_clip:local-dir:FOLDER), or MODULE:FUNCTION, see languagebind/eval/models.py; each may be given a name for its
    results, NAME=..."""
    modality: str | None = None
    """what an open_clip model reads; default: what the datasets hold, where it is the same for all of them"""
    num_frames: int | None = None
    """frames of a clip, in place of what the model was trained with"""
    output: Path = Path("results")
    """folder for the result files, <dataset>_<model>.json"""
    data_root: Path | None = None
    """folder that the data paths in the configs start from; default: each config's own folder"""
    data: tuple[Path, ...] = ()
    """webdataset folders of CLIP_benchmark, which need no config"""
    all: bool = False
    """evaluate on every dataset of --configs of the model's modality whose data is there, and list the others"""
    configs: Path = Path("configs/eval")
    """folder of configs that --all looks in"""
    overwrite: bool = False
    """replace result files that exist"""
    skip_existing: bool = False
    """leave out the datasets whose result file exists; one of another checkpoint is an error"""
    compare: bool = False
    """print a column for each model, with results that --skip-existing left out"""
    protocol: Literal["ours", "paper"] | None = None
    """evaluate as the original did, to reproduce its figures, or our way; default: what each config says, or ours"""
    templates: str | None = None
    """a file of prompts, one a line with {c} for the class, in place of the datasets' own"""
    clips: int | None = None
    """clips of each video, whose features are averaged; default: what each config says, or 1"""
    crops: int | None = None
    """crops of each clip, along the longer side, whose features are averaged; default as above"""
    dual_softmax: bool = False
    """for retrieval, the metrics of the dual softmax too, which needs all queries at once; named dual_softmax/..."""
    export_features: Path | None = None
    """write the features to this folder: <dataset>_<model>.safetensors, and .jsonl with what each row is of"""
    export_format: Literal["safetensors", "parquet"] = "safetensors"
    """or <dataset>_<model>.parquet, with both in one table"""
    clip_benchmark_keys: bool = False
    """write CLIP_benchmark's names of metrics (acc1, image_retrieval_recall@5, ...) into the results too"""
    encode: EncodeOptions = field(default_factory=EncodeOptions)


def main(argv: Sequence[str] | None = None) -> None:
    words = gather_flags(sys.argv[1:] if argv is None else argv, "--config", "--model", "--data")
    config = parse(EvalConfig, words, prog="python -m languagebind.eval", description=EvalConfig.__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    models = _models(config)
    selection = select(config.config, config.data, config.configs if config.all else None, config.data_root)
    selection = replace(selection, datasets=_as_asked(selection.datasets, config))
    process = init_process(config.encode.device)
    if not process.is_main:  # one rank says how far all are
        logging.getLogger().setLevel(logging.WARNING)
    try:
        done = Done()
        # The first rank's, which writes the results: other nodes may have other files there
        jobs = gather_objects(_jobs(models, selection.datasets, config))[0]
        if not jobs and not config.compare:
            return
        for name, group in groupby(jobs, key=lambda job: job.model):
            _evaluate(models[name], list(group), config, process, done)
        if process.is_main:
            _report(done, models, selection, config)
    finally:
        close_process()
    if done.failures:
        head = f"{len(done.failures)} of {len(jobs)} evaluations failed, the others are written:"
        raise UserError("\n  ".join([*([head] if len(jobs) > 1 else []), *done.failures]))
    _check_read(done, jobs, selection, config)


@dataclass(frozen=True)
class Job:
    """One result to be made."""

    model: str
    """its name"""
    dataset: DatasetConfig
    path: Path
    """of the result"""
    export: Path | None
    """of the features"""


@dataclass
class Done:
    """What has been made of the jobs."""

    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)
    """datasets that a model could read"""
    modalities: set[str] = field(default_factory=set)


def _models(config: EvalConfig) -> dict[str, str]:
    """Name -> specification; every mistake that can be seen without loading one is found here and in `_jobs`."""
    if (config.checkpoint is None) == (not config.model):
        raise UserError("name what to evaluate, with --checkpoint or else with --model")
    models = [named(spec) for spec in ([config.checkpoint] if config.checkpoint is not None else config.model)]
    names = [name for name, _ in models]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two models are named {twice}, so that their results would be one file: --model NAME=... ...")
    if config.compare and len(names) < 2:
        raise UserError("--compare needs two models or more: --model SPEC SPEC")
    if config.overwrite and config.skip_existing:
        raise UserError("--overwrite and --skip-existing exclude each other")
    # A folder that cannot be written should be found before the model has seen every sample.
    for flag, folder in (("--output", config.output), ("--export-features", config.export_features)):
        if folder is not None and not writable(folder):
            raise UserError(f"{flag} {folder} cannot be written")
    if config.export_features is not None:
        check_format(config.export_format)
    return dict(models)


def _as_asked(datasets: Sequence[DatasetConfig], config: EvalConfig) -> list[DatasetConfig]:
    """The datasets with what the command line says in place of their configs."""
    changes = {key: getattr(config, key) for key in ("protocol", "clips", "crops") if getattr(config, key) is not None}
    if config.all and config.protocol == "paper":
        for dataset in (dataset for dataset in datasets if dataset.paper is None):
            log.info("%s is left out: the original has no protocol for it", dataset.name)
        datasets = [dataset for dataset in datasets if dataset.paper is not None]
    changed = [replace(dataset, **changes) for dataset in datasets]
    if config.templates is None:
        return changed
    templates = read_templates(config.templates, Path("--templates"), (Path(),))
    if all(dataset.task == "retrieval" for dataset in datasets):
        raise UserError("--templates: none of the datasets has classes")
    return [d if d.task == "retrieval" else replace(d, templates=templates) for d in changed]


def _jobs(models: Mapping[str, str], datasets: Sequence[DatasetConfig], config: EvalConfig) -> list[Job]:
    """The results that are not there yet, or are to be replaced."""
    jobs, paths = [], set()
    for name, dataset in product(models, datasets):
        path = result_path(config.output, dataset.result_name, name)
        if path in paths:
            raise UserError(f"two results would be {path}: name the models, --model NAME=..., or the datasets, `name:`")
        paths.add(path)
        if path.exists() and config.skip_existing:
            _check_same(path, models[name], dataset, config)
            log.info("skipping %s: %s exists", dataset.name, path)
            continue
        export = None
        if config.export_features is not None:
            export = config.export_features / f"{dataset.result_name}_{name}.{config.export_format}"
        # Features without a result are what a run that was stopped has left
        features = [export, export.with_suffix(".jsonl")] if export is not None and not config.skip_existing else []
        for file in (path, *features):
            if file.exists() and not config.overwrite:
                raise UserError(f"{file} exists: --overwrite replaces it, --skip-existing leaves the dataset out")
        jobs.append(Job(name, dataset, path, export))
    return jobs


def _check_same(path: Path, spec: str, dataset: DatasetConfig, config: EvalConfig) -> None:
    """Refuse to take a result for one of another checkpoint, or made with other options."""
    result = read_result(path)
    made_of, now = result.get("checkpoint"), checkpoint_of(spec)
    if made_of not in (None, now):
        raise UserError(f"{path} is of {made_of}, not of {now}: --overwrite replaces it, --model NAME=... adds another")
    protocol = {"clips": 1, "crops": 1} | result["protocol"]
    asked = {key: getattr(dataset, key) for key in ("clips", "crops", "limit")}
    asked |= {"precision": config.encode.precision, "templates": list(dataset.templates)}
    asked |= {} if config.num_frames is None else {"frames": config.num_frames}
    for key, value in asked.items():
        if protocol.get(key, value) != value:
            raise UserError(f"{path} was made with other {key}: --overwrite replaces it, --model NAME=... adds another")


def _evaluate(spec: str, jobs: Sequence[Job], config: EvalConfig, process: Process, done: Done) -> None:
    """Make a model's results, each written as soon as it is made."""
    modality = config.modality
    if modality is None and reads_any(spec):
        held = {job.dataset.modality for job in jobs}
        modality = held.pop() if len(held) == 1 else None
    model, reader = load(spec, process.device, modality, config.num_frames)
    own = modality_name(reader)
    done.modalities.add(own)
    weights = weights_digest(model) if getattr(model, "known", True) else None
    identity = {"checkpoint": checkpoint_of(spec), "weights_sha256": weights}
    several = config.all or len(config.model) > 1
    options = asdict(replace(config.encode, device=str(process.device)))
    for job in jobs:
        if several and job.dataset.modality not in (None, own):
            continue
        done.tried.add(job.dataset.name)
        try:
            result = evaluate(
                model, reader, job.dataset, dual_softmax=config.dual_softmax, export=job.export, **options
            )
            result |= {"pretrained": job.model} | identity
            if process.is_main:
                _write(result, job.path, config)
        except UserError as error:
            if process.world_size > 1:  # one alone may have failed, and the others wait for it
                raise
            log.error("%s could not be scored; why is said at the end", job.dataset.name)
            done.failures.append(str(error))
            continue
        done.results.append(result)


def _write(result: dict[str, Any], path: Path, config: EvalConfig) -> None:
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} was made by another run meanwhile, and is left as it is")
    write_result(with_clip_benchmark_keys(result) if config.clip_benchmark_keys else result, path)
    log.info("wrote %s", path)


def _check_read(done: Done, jobs: Sequence[Job], selection: Selection, config: EvalConfig) -> None:
    """Raise `UserError` where no model reads a dataset that was named, or any dataset of all."""
    unread = {job.dataset.name: job.dataset.modality for job in jobs if job.dataset.name not in done.tried}
    modalities = " or ".join(sorted(done.modalities))
    fitting = [dataset for dataset in selection.datasets if dataset.modality in (None, *done.modalities)]
    if config.all and done.modalities and not fitting:
        raise UserError(f"none of the datasets that are there is {modalities}")
    if unread and not config.all:
        kinds = ", ".join(f"{name} is of {modality}" for name, modality in unread.items())
        raise UserError(f"{kinds}; the models read {modalities}")


def _report(done: Done, models: Mapping[str, str], selection: Selection, config: EvalConfig) -> None:
    """Print what was found, and which datasets are absent."""
    if config.compare:
        made = {(result["dataset"], result["pretrained"]): result for result in done.results}
        paths = {
            (dataset.name, name): result_path(config.output, dataset.result_name, name)
            for dataset in selection.datasets
            for name in models
        }
        kept = [key for key, path in paths.items() if config.skip_existing and path.exists()]
        results = [made.get(key) or read_result(paths[key]) for key in paths if key in made or key in kept]
        print(comparison(results))
    else:
        for name in models:
            own = [result for result in done.results if result["pretrained"] == name]
            if own and len(models) > 1:
                print(f"{name}:")
            if own:
                print(table(own))
    absent = [dataset for dataset in selection.absent if dataset.modality in (None, *done.modalities)]
    for dataset in absent:
        print(f"absent: {dataset.name} ({dataset.data}); get it from: {(dataset.source or 'not said').strip()}")


if __name__ == "__main__":
    run(main)
