"""Options of `languagebind eval`, and the models, datasets and jobs that they select."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Literal

from ..config import UserError, digest
from ..configs import FOLDER
from ..modalities import modality_class, modality_names
from .command import CommandOptions, check_output
from .data.datasets import DatasetConfig, load_dataset_config, load_folder
from .data.samples import check_data
from .data.shards import list_shards
from .data.validation import refuse, validate
from .evaluate import ListedDataset, list_dataset
from .models import checkpoint_of, split_name
from .results import Result, read_result, result_path

log = logging.getLogger(__name__)

# The fields of a dataset's config that a result depends on
ASKED = ("task", "data", "templates", "caption_source", "limit", "clip", "clips", "crops", "protocol", "paper", "split",
         "relevant")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalOptions(CommandOptions):
    """Evaluate models on the datasets of --config NAME_OR_FILE ..., of --data FOLDER ..., or on --all."""

    config: tuple[Path, ...] = ()
    """datasets: names such as nyu_v2 (see `languagebind configs`), or YAML files"""
    checkpoint: str | None = None
    """a training checkpoint, a run's folder, a folder in the published layout, or a hub id"""
    model: tuple[str, ...] = ()
    """one or more models instead of --checkpoint: a checkpoint, open_clip:NAME/TAG, imagebind:FILE, clip4clip:FILE or
    MODULE:FUNCTION (see languagebind/eval/models.py); prefix NAME= to name the model's results"""
    modality: str | None = None
    """modality to use with an open_clip model or ImageBind; None: that of the datasets, if all have the same"""
    num_frames: int | None = None
    """frames per clip, instead of the number that the model was trained with"""
    data: tuple[Path, ...] = ()
    """webdataset folders in CLIP_benchmark's layout, which need no config"""
    all: bool = False
    """evaluate on every dataset in --configs that has the model's modality; list the datasets whose data is absent"""
    configs: Path = FOLDER / "eval"
    """folder of configs for --all"""
    skip_existing: bool = False
    """skip datasets whose result file exists; fail if that result is of another checkpoint or other options"""
    compare: bool = False
    """print one table with a column per model, including results that --skip-existing skipped"""
    protocol: Literal["ours", "paper", "clip4clip"] | None = None
    """paper: evaluate as the original LanguageBind code does; clip4clip: as CLIP4Clip does; None: the protocol in
    each config, or ours"""
    templates: str | None = None
    """file of prompts, one per line with {c} for the class, instead of the datasets' own prompts"""
    clips: int | None = None
    """number of clips per video; their features are averaged; None: the number in each config, or 1"""
    crops: int | None = None
    """number of crops per clip along the longer side; their features are averaged; None: as for --clips"""
    dual_softmax: bool = False
    """for retrieval, add dual-softmax metrics, named dual_softmax/...; they need all queries at once"""
    export_features: Path | None = None
    """folder for the features: <dataset>_<model>.safetensors, and a .jsonl file that describes each row"""
    export_format: Literal["safetensors", "parquet"] = "safetensors"
    """format of the features; parquet: one table, <dataset>_<model>.parquet, with features and descriptions"""
    clip_benchmark_keys: bool = False
    """add the metrics to the results under CLIP_benchmark's names too (acc1, image_retrieval_recall@5, ...)"""


@dataclass
class Job:
    """The evaluation of one model on one dataset."""

    model: str  # name of the model in the results
    spec: str  # specification of the model
    dataset: DatasetConfig
    path: Path  # result file
    export: Path | None  # features file
    asked: dict[str, Any]  # what the result depends on, as the result file stores it
    result: Result | None = None  # set from the start if --skip-existing finds the file


def select_models(options: EvalOptions) -> list[tuple[str, str]]:
    """Return each model's name and specification. Raises `UserError` if the flags contradict each other."""
    faults = {
        "pass either --checkpoint or --model": bool(options.checkpoint) == bool(options.model),
        "use either --overwrite or --skip-existing, not both": options.overwrite and options.skip_existing,
        "with --all, leave out --config and --data": options.all and bool(options.config or options.data),
        "--export-format parquet needs the package pyarrow: pip install pyarrow": (
            options.export_format == "parquet" and find_spec("pyarrow") is None
        ),
    }
    refuse(faults)
    return [split_name(spec) for spec in options.model or [str(options.checkpoint)]]


def select_datasets(options: EvalOptions) -> tuple[list[DatasetConfig], list[DatasetConfig]]:
    """Return the datasets to evaluate on, with the flags applied, and the datasets in --configs whose data is absent.

    Raises `UserError` if there are no datasets, a config is wrong, or the data of a dataset named by a flag is absent.
    """
    datasets, absent = _all_configs(options) if options.all else ([], [])
    datasets += [load_dataset_config(file, options.data_root) for file in options.config]
    datasets += [load_folder(folder) for folder in options.data]
    keys = ("protocol", "clips", "crops", "templates")
    changes = {key: value for key in keys if (value := getattr(options, key)) is not None}
    if options.templates and datasets and all(dataset.task == "retrieval" for dataset in datasets):
        raise UserError("--templates has no effect: none of the datasets has classes")
    for i, dataset in enumerate(datasets):
        check_data(dataset)
        own = {key: value for key, value in changes.items() if key != "templates" or dataset.task != "retrieval"}
        datasets[i] = validate(DatasetConfig, vars(dataset) | own, dataset.name)
    if not datasets:
        usage = "name some with --config (see `languagebind configs`) or --data FOLDER, or use --all"
        if options.all:
            usage = f"{options.data_root or options.configs} holds the data of none of the configs in {options.configs}"
        raise UserError("\n  ".join([f"no datasets: {usage}", *map(describe_absent, absent)]))
    return datasets, absent


def list_early(datasets: Sequence[DatasetConfig], options: EvalOptions) -> ListedDataset | None:
    """List the samples of a single dataset, so that errors in its data come before a model is loaded."""
    kind = datasets[0].modality or options.modality
    if kind is None and not list_shards(datasets[0].data):
        kind = modality_names()[0]  # outside shards, all modalities list the same files
    single = len(datasets) == 1 and not options.all
    return list_dataset(datasets[0], modality_class(kind)()) if kind and single else None


def describe_absent(dataset: DatasetConfig) -> str:
    """Return a line that says that a dataset's data is absent and where to get it."""
    return f"absent: {dataset.name} ({dataset.data}); get it from: {(dataset.source or 'unknown').strip()}"


def plan_jobs(models: Sequence[tuple[str, str]], datasets: Sequence[DatasetConfig], options: EvalOptions) -> list[Job]:
    """Return a job for every model on every dataset. Raises `UserError` if an output file exists or is unusable."""
    jobs, folder = [], options.export_features
    for (name, spec), dataset in product(models, datasets):
        suffix = "" if dataset.protocol == "ours" else f"_{dataset.protocol}"
        path = result_path(options.output, dataset.name + suffix, name)
        export = folder / f"{path.stem}.{options.export_format}" if folder else None
        jobs.append(Job(name, spec, dataset, path, export, _asked(spec, dataset, options)))
    exports = [job.export for job in jobs if job.export]
    files = [*(job.path for job in jobs), *exports, *(export.with_suffix(".jsonl") for export in exports)]
    # With --skip-existing, a features file without a result comes from a run that was stopped
    check_output(files, options.overwrite or options.skip_existing)
    for job in jobs:
        if options.skip_existing and job.path.exists():
            job.result = _read_same(job.path, job.asked)
            log.info("skipping %s: %s exists", job.dataset.name, job.path)
    return jobs


def _all_configs(options: EvalOptions) -> tuple[list[DatasetConfig], list[DatasetConfig]]:
    """Return the datasets in --configs whose data is present, and the datasets whose data is absent."""
    datasets, absent = [], []
    for file in sorted(options.configs.glob("[!.]*.yaml")):
        config = load_dataset_config(file, options.data_root, prepared=False)
        if options.protocol not in (None, "ours") and getattr(config, options.protocol) is None:
            log.info("%s is left out: it has no %s protocol", config.name, options.protocol)
            continue
        try:
            check_data(config)
        except UserError:
            absent.append(config)
        else:  # Load again, with the class names that come with the data
            datasets.append(load_dataset_config(file, options.data_root))
    return datasets, absent


def _asked(spec: str, dataset: DatasetConfig, options: EvalOptions) -> dict[str, Any]:
    """Return the settings that a result depends on, as values that survive a JSON round trip."""
    checkpoint = Path(checkpoint_of(spec))
    asked = {
        "checkpoint": str(checkpoint),
        "checkpoint_changed": checkpoint.stat().st_mtime_ns if checkpoint.is_file() else None,
        **{key: getattr(dataset, key) for key in ASKED},
        "split": dataset.split or "test",  # as earlier versions wrote it
        "class_names": None if dataset.class_names is None else digest(dict(dataset.class_names)),
        **{key: getattr(options, key) for key in ("num_frames", "dual_softmax", "clip_benchmark_keys")},
        "precision": options.encode.precision,
        "exported": options.export_features is not None,
    }
    return json.loads(json.dumps(asked))


def _read_same(path: Path, asked: Mapping[str, Any]) -> Result:
    """Return the result in a file. Raises `UserError` if it is of another checkpoint or was made with other options."""
    if (result := read_result(path)) is None:
        raise UserError(f"{path} is not a result: --overwrite replaces it")
    made = result.get("asked")
    if not isinstance(made, dict):
        log.warning("%s does not say how it was made: check that the checkpoint and the options are the same", path)
        return result
    for key, value in asked.items():
        if made.get(key) != value and not (value is False and made.get(key) is True):  # True: more than was asked for
            what = f"is for {made.get(key)}, not {value}" if key == "checkpoint" else f"was made with another {key}"
            raise UserError(f"{path} {what}: --overwrite replaces it, --model NAME=... writes another file")
    return result
