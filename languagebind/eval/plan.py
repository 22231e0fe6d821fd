"""What evaluation's command line asks for: models, datasets, and the results to be made."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from ..config import UserError, digest
from ..files import twice
from .data.datasets import DatasetConfig, load_dataset_config, load_folder
from .data.samples import check_data
from .data.validation import validate
from .export import check_format
from .features import EncodeOptions
from .models import checkpoint_of, named
from .results import read_result, result_path, writable

log = logging.getLogger(__name__)

# Of a dataset, what a result depends on beside the files
ASKED = ("task", "data", "templates", "caption_source", "limit", "clip", "clips", "crops", "protocol", "paper", "split")


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


@dataclass(frozen=True)
class Job:
    """One result to be made, or left as it is."""

    model: str
    """its name"""
    dataset: DatasetConfig
    path: Path
    """of the result"""
    export: Path | None
    """of the features"""
    asked: dict[str, Any]
    """what the result depends on, as the result file holds it"""
    skipped: bool
    """the result is there"""


def name_models(config: EvalConfig) -> dict[str, str]:
    """Name -> specification; every mistake that can be seen without loading one is found here and in `plan_jobs`."""
    if (config.checkpoint is None) == (not config.model):
        raise UserError("name what to evaluate, with --checkpoint or else with --model")
    models = [named(spec) for spec in ([config.checkpoint] if config.checkpoint is not None else config.model)]
    names = [name for name, _ in models]
    if name := twice(names):
        raise UserError(f"two models are named {name}, so that their results would be one file: --model NAME=... ...")
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


def as_asked(datasets: Sequence[DatasetConfig], config: EvalConfig) -> list[DatasetConfig]:
    """The datasets with what the command line says in place of their configs."""
    changes = {key: getattr(config, key) for key in ("protocol", "clips", "crops") if getattr(config, key) is not None}
    if config.all and config.protocol == "paper":
        for dataset in (dataset for dataset in datasets if dataset.paper is None):
            log.info("%s is left out: the original has no protocol for it", dataset.name)
        datasets = [dataset for dataset in datasets if dataset.paper is not None]
        if not datasets:
            raise UserError("none of the datasets that are there has a paper protocol")
    prompts = {} if config.templates is None else {"templates": config.templates}
    if prompts and all(dataset.task == "retrieval" for dataset in datasets):
        raise UserError("--templates: none of the datasets has classes")
    return [
        validate(DatasetConfig, vars(d) | changes | ({} if d.task == "retrieval" else prompts), d.name)
        for d in datasets
    ]


def plan_jobs(models: Mapping[str, str], datasets: Sequence[DatasetConfig], config: EvalConfig) -> list[Job]:
    """Every model on every dataset.

    Raises:
        UserError: two results would be one file, or a file is there and is not to be replaced or to be left.
    """
    jobs, paths = [], set()
    for name, dataset in product(models, datasets):
        path = result_path(config.output, dataset.result_name, name)
        if path in paths:
            raise UserError(f"two results would be {path}: name the models, --model NAME=..., or the datasets, `name:`")
        paths.add(path)
        export = None
        if config.export_features is not None:
            export = config.export_features / f"{dataset.result_name}_{name}.{config.export_format}"
        asked = _asked(models[name], dataset, config)
        skipped = config.skip_existing and path.exists()
        if skipped:
            _check_same(path, asked)
            log.info("skipping %s: %s exists", dataset.name, path)
        elif not config.overwrite:
            # Features without a result are what a run that was stopped has left
            features = [export, export.with_suffix(".jsonl")] if export is not None and not config.skip_existing else []
            if there := next((file for file in (path, *features) if file.exists()), None):
                raise UserError(f"{there} exists: --overwrite replaces it, --skip-existing leaves the dataset out")
        jobs.append(Job(name, dataset, path, export, asked, skipped))
    return jobs


def _asked(spec: str, dataset: DatasetConfig, config: EvalConfig) -> dict[str, Any]:
    """Plain values, as JSON gives them back."""
    checkpoint = Path(checkpoint_of(spec))
    asked = {
        "checkpoint": str(checkpoint),
        "checkpoint_changed": checkpoint.stat().st_mtime_ns if checkpoint.is_file() else None,
        **{key: getattr(dataset, key) for key in ASKED},
        "class_names": None if dataset.class_names is None else digest(dict(dataset.class_names)),
        **{key: getattr(config, key) for key in ("num_frames", "dual_softmax", "clip_benchmark_keys")},
        "precision": config.encode.precision,
        "exported": config.export_features is not None,
    }
    return json.loads(json.dumps(asked))


def _check_same(path: Path, asked: Mapping[str, Any]) -> None:
    """Refuse to take a result for one of another checkpoint, or made with other options."""
    result = read_result(path)
    made = result.get("asked")
    if not isinstance(made, dict):
        log.warning("%s does not say how it was made: is it of the same checkpoint and options?", path)
        return
    for key, value in asked.items():
        if made.get(key) != value and not (value is False and made.get(key) is True):  # more than asked for
            what = f"is of {made.get(key)}, not of {value}" if key == "checkpoint" else f"was made with other {key}"
            raise UserError(f"{path} {what}: --overwrite replaces it, --model NAME=... adds another")


@dataclass(frozen=True)
class Selection:
    datasets: list[DatasetConfig]
    """whose data is there"""
    absent: list[DatasetConfig]
    """those of a folder of configs whose data is not"""


def select(files: Sequence[str], folders: Sequence[Path], configs: Path | None, data_root: Path | None) -> Selection:
    """Read what is known of the datasets; the data itself is not read.

    Args:
        files: configs, whose data has to be there.
        folders: webdataset folders of CLIP_benchmark.
        configs: a folder of configs, whose data may be absent.
        data_root: where the data of the configs is; default: each config's own folder.

    Raises:
        UserError: nothing is named, or nothing of `configs` is there; two have one name; a config or what it
            names is wrong, or its data is absent.
    """
    if configs is not None and (files or folders):
        raise UserError("--all takes the datasets of --configs: leave out --config and --data")
    datasets, absent = _all(configs, data_root) if configs is not None else ([], [])
    datasets += [load_dataset_config(Path(file), data_root) for file in files]
    datasets += [load_folder(folder) for folder in folders]
    if not datasets:
        raise UserError("name a dataset with --config FILE.yaml (configs/eval/ has some), --data FOLDER, or take --all")
    if name := twice(dataset.name for dataset in datasets):
        raise UserError(f"two {'datasets' if folders else 'configs'} are named {name}")
    for dataset in datasets:
        check_data(dataset)
    return Selection(datasets, absent)


def _all(configs: Path, data_root: Path | None) -> tuple[list[DatasetConfig], list[DatasetConfig]]:
    files = sorted(configs.glob("[!.]*.yaml"))
    if not files:
        raise UserError(f"--configs {configs} holds no configs (*.yaml)")
    datasets, absent = [], []
    for file in files:
        config = load_dataset_config(file, data_root, prepared=False)
        try:
            check_data(config)
        except UserError:
            absent.append(config)
        else:  # with the class names that come with the data; what is wrong with them is not that they are absent
            datasets.append(load_dataset_config(file, data_root))
    if not datasets:
        lines = [f"{dataset.name} ({dataset.data}): {(dataset.source or 'not said').strip()}" for dataset in absent]
        raise UserError("\n  ".join([f"the data of none of the {len(absent)} configs is there; get it from:", *lines]))
    return datasets, absent
