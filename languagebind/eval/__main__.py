"""python -m languagebind.eval --checkpoint PATH --config FILE.yaml [--config ...] --data-root DIR --output results"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..config import UserError, parse, run, take_flag
from ..distributed import close_process, init_process
from . import DatasetConfig, EncodeOptions, evaluate, load_dataset_config
from .report import checkpoint_name, result_path, table, writable, write_result
from .samples import check_data

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a checkpoint on each --config FILE.yaml (required, one or several; see configs/eval/)."""

    checkpoint: str
    """a training checkpoint, a run's folder, a folder in the published layout, or a hub id"""
    output: Path = Path("results")
    """folder for the result files, <dataset>_<checkpoint>.json"""
    data_root: Path | None = None
    """folder that the data paths in the configs start from; default: each config's own folder"""
    overwrite: bool = False
    """replace result files that exist"""
    skip_existing: bool = False
    """leave out the datasets whose result file exists"""
    protocol: Literal["ours", "paper"] | None = None
    """evaluate as the original did, to reproduce its figures, or our way; default: what each config says, or ours"""
    dual_softmax: bool = False
    """for retrieval, the metrics of the dual softmax too, which needs all queries at once; named dual_softmax/..."""
    encode: EncodeOptions = field(default_factory=EncodeOptions)


def main(argv: Sequence[str] | None = None) -> None:
    files, rest = take_flag(sys.argv[1:] if argv is None else argv, "--config", several=True)
    config = parse(EvalConfig, rest, prog="python -m languagebind.eval", description=EvalConfig.__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    datasets = _datasets(files, config)
    if not datasets:
        return
    process = init_process(config.encode.device)
    try:
        from ..hub import load_model

        model, modality = load_model(config.checkpoint, process.device)
        results = []
        for dataset in datasets:
            options = asdict(replace(config.encode, device=str(process.device)))
            result = evaluate(model, modality, dataset, dual_softmax=config.dual_softmax, **options)
            results.append(result | {"pretrained": checkpoint_name(config.checkpoint)})
            if process.is_main:
                path = result_path(config.output, dataset.result_name, config.checkpoint)
                write_result(results[-1], path)
                log.info("wrote %s", path)
        if process.is_main:
            print(table(results))
    finally:
        close_process()


def _datasets(files: Sequence[str], config: EvalConfig) -> list[DatasetConfig]:
    """The datasets to evaluate on; every mistake that can be seen without the model is found here, before it loads."""
    if not files:
        raise UserError("name a dataset with --config FILE.yaml (configs/eval/ has some)")
    if config.overwrite and config.skip_existing:
        raise UserError("--overwrite and --skip-existing exclude each other")
    datasets = [load_dataset_config(Path(file), config.data_root) for file in files]
    if config.protocol:
        datasets = [replace(dataset, protocol=config.protocol) for dataset in datasets]
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise UserError(f"two configs are named {next(name for name in names if names.count(name) > 1)}")
    # A folder that cannot be written should be found before the model has seen every sample.
    if not writable(config.output):
        raise UserError(f"--output {config.output} cannot be written")
    wanted = []
    for dataset in datasets:
        path = result_path(config.output, dataset.result_name, config.checkpoint)
        if path.exists() and config.skip_existing:
            log.info("skipping %s: %s exists", dataset.name, path)
            continue
        if path.exists() and not config.overwrite:
            raise UserError(f"{path} exists: --overwrite replaces it, --skip-existing leaves the dataset out")
        check_data(dataset)
        wanted.append(dataset)
    return wanted


if __name__ == "__main__":
    run(main)
