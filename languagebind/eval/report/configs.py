"""What the datasets' configs say about the results on a page."""

from collections.abc import Sequence
from pathlib import Path

from ..data.datasets import DatasetConfig, load_dataset_config
from ..data.pairing import PairsConfig, load_pairs_config
from ..results import HEADLINES, Result

PAIRS_HEADLINE = "query_to_gallery/R@1"
Config = DatasetConfig | PairsConfig


def headline(config: Config | None, results: Sequence[Result]) -> str:
    """The metric to quote of the results of one dataset: the config's, or that of the task."""
    if config and config.metric:
        return config.metric
    usual = HEADLINES[results[0]["task"]]
    held = {metric for result in results for metric in result["metrics"]}
    return PAIRS_HEADLINE if usual not in held and PAIRS_HEADLINE in held else usual


def lower_is_better(metric: str) -> bool:
    return metric.endswith("_rank")


def read_configs(folder: Path, wanted: Sequence[str]) -> dict[str, Config]:
    """By name, those of the wanted results that a folder describes: datasets, and in `pairs` below it comparisons.

    Raises:
        UserError: a config is malformed.
    """
    configs: list[Config] = [load_dataset_config(file, prepared=False) for file in sorted(folder.glob("[!.]*.yaml"))]
    configs += [load_pairs_config(file, there=False) for file in sorted(folder.glob("pairs/[!.]*.yaml"))]
    return {config.name: config for config in configs if config.name in wanted}
