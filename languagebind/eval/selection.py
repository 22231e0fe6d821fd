"""The datasets that a command line means: by config, by folder, or all that are there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import UserError
from ..files import twice
from .clip_benchmark import fill_in, task_of
from .datasets import DatasetConfig, load_dataset_config
from .samples import check_data


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
    datasets += [_of_folder(folder) for folder in folders]
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


def _of_folder(folder: Path) -> DatasetConfig:
    return fill_in(DatasetConfig(name=folder.absolute().name, task=task_of(folder), data=str(folder)))
