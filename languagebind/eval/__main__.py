"""python -m languagebind.eval --model SPEC [SPEC ...] --config FILE.yaml [...] --data-root DIR --output results"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..config import UserError, parse, run, take_flag
from ..distributed import Process, close_process, init_process
from ..modalities import modality_name
from . import EncodeOptions, evaluate
from .clip_benchmark import with_clip_benchmark_keys
from .datasets import DatasetConfig
from .models import load, model_name, reads_any
from .report import result_path, table, writable, write_result
from .report.compare import comparison
from .report.results import read_result
from .selection import Selection, select

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate models on each --config FILE.yaml (one or several, see configs/eval/), on --data, or on --all."""

    checkpoint: str | None = None
    """a training checkpoint, a run's folder, a folder in the published layout, or a hub id"""
    model: tuple[str, ...] = ()
    """in place of --checkpoint, one or several: what it takes, open_clip:NAME/TAG (or NAME/FILE, or
    open_clip:local-dir:FOLDER), or MODULE:FUNCTION, see languagebind/eval/models.py"""
    modality: str | None = None
    """what an open_clip model reads; default: what the datasets hold, where it is the same for all of them"""
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
    """leave out the datasets whose result file exists"""
    compare: bool = False
    """print a column for each model, with results that --skip-existing left out"""
    protocol: Literal["ours", "paper"] | None = None
    """evaluate as the original did, to reproduce its figures, or our way; default: what each config says, or ours"""
    dual_softmax: bool = False
    """for retrieval, the metrics of the dual softmax too, which needs all queries at once; named dual_softmax/..."""
    export_features: Path | None = None
    """write the features to this folder: <dataset>_<model>.safetensors, and .jsonl with what each row is of"""
    clip_benchmark_keys: bool = False
    """write CLIP_benchmark's names of metrics (acc1, image_retrieval_recall@5, ...) into the results too"""
    encode: EncodeOptions = field(default_factory=EncodeOptions)


def main(argv: Sequence[str] | None = None) -> None:
    files, rest = take_flag(sys.argv[1:] if argv is None else argv, "--config", several=True)
    config = parse(EvalConfig, rest, prog="python -m languagebind.eval", description=EvalConfig.__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    specs = _specs(config)
    selection = select(files, config.data, config.configs if config.all else None, config.data_root)
    if config.protocol:
        selection = replace(selection, datasets=[replace(d, protocol=config.protocol) for d in selection.datasets])
    jobs = {spec: _jobs(spec, selection.datasets, config) for spec in specs}
    if not any(jobs.values()) and not config.compare:
        return
    process = init_process(config.encode.device)
    if not process.is_main:  # one rank says how far all are
        logging.getLogger().setLevel(logging.WARNING)
    try:
        results, modalities = [], set()
        for spec in (spec for spec in specs if jobs[spec]):
            found, modality = _evaluate(spec, jobs[spec], config, process)
            results += found
            modalities.add(modality)
        if process.is_main:
            _report(results, specs, selection, config, modalities)
    finally:
        close_process()
    fitting = [dataset for dataset in selection.datasets if dataset.modality in (None, *modalities)]
    if config.all and modalities and not fitting:
        raise UserError(f"none of the datasets that are there is {' or '.join(sorted(modalities))}")


def _specs(config: EvalConfig) -> list[str]:
    """The models; every mistake that can be seen without loading one is found here and in `_jobs`."""
    if (config.checkpoint is None) == (not config.model):
        raise UserError("name what to evaluate, with --checkpoint or else with --model")
    specs = [config.checkpoint] if config.checkpoint is not None else list(config.model)
    names = [model_name(spec) for spec in specs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two models are named {twice}, so that their results would be one file")
    if config.compare and len(specs) < 2:
        raise UserError("--compare needs two models or more: --model SPEC SPEC")
    if config.overwrite and config.skip_existing:
        raise UserError("--overwrite and --skip-existing exclude each other")
    # A folder that cannot be written should be found before the model has seen every sample.
    for flag, folder in (("--output", config.output), ("--export-features", config.export_features)):
        if folder is not None and not writable(folder):
            raise UserError(f"{flag} {folder} cannot be written")
    return specs


def _jobs(spec: str, datasets: Sequence[DatasetConfig], config: EvalConfig) -> list[DatasetConfig]:
    """The datasets without a result of the model."""
    wanted = []
    for dataset in datasets:
        path = result_path(config.output, dataset.result_name, model_name(spec))
        if path.exists() and config.skip_existing:
            log.info("skipping %s: %s exists", dataset.name, path)
            continue
        if path.exists() and not config.overwrite:
            raise UserError(f"{path} exists: --overwrite replaces it, --skip-existing leaves the dataset out")
        wanted.append(dataset)
    return wanted


def _evaluate(spec: str, datasets: Sequence[DatasetConfig], config: EvalConfig, process: Process):
    """The results of a model, written as they are made, and the name of its modality."""
    modality = config.modality
    if modality is None and reads_any(spec):
        held = {dataset.modality for dataset in datasets}
        modality = held.pop() if len(held) == 1 else None
    model, reader = load(spec, process.device, modality)
    name, results = model_name(spec), []
    for dataset in datasets:
        if config.all and dataset.modality not in (None, modality_name(reader)):
            continue
        options = asdict(replace(config.encode, device=str(process.device)))
        export = config.export_features and config.export_features / f"{dataset.result_name}_{name}"
        result = evaluate(model, reader, dataset, dual_softmax=config.dual_softmax, export=export, **options)
        results.append(result | {"pretrained": name})
        if process.is_main:
            path = result_path(config.output, dataset.result_name, name)
            write_result(with_clip_benchmark_keys(results[-1]) if config.clip_benchmark_keys else results[-1], path)
            log.info("wrote %s", path)
    return results, modality_name(reader)


def _report(
    results: Sequence[dict], specs: Sequence[str], selection: Selection, config: EvalConfig, modalities: set[str]
) -> None:
    """Print what was found, and which datasets are absent."""
    if config.compare:
        made = {(result["dataset"], result["pretrained"]): result for result in results}
        paths = {
            (dataset.name, model_name(spec)): result_path(config.output, dataset.result_name, model_name(spec))
            for dataset in selection.datasets
            for spec in specs
        }
        results = [made.get(k) or read_result(path) for k, path in paths.items() if k in made or path.exists()]
        print(comparison(results))
    else:
        for spec in specs:
            own = [result for result in results if result["pretrained"] == model_name(spec)]
            if own and len(specs) > 1:
                print(f"{model_name(spec)}:")
            if own:
                print(table(own))
    absent = [dataset for dataset in selection.absent if dataset.modality in (None, *modalities)]
    for dataset in absent:
        print(f"absent: {dataset.name} ({dataset.data}); get it from: {(dataset.source or 'not said').strip()}")


if __name__ == "__main__":
    run(main)
