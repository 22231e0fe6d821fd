"""Zero-shot classification, retrieval and segmentation: `languagebind eval`, or `evaluate` from a training loop."""

from .data.datasets import DatasetConfig, load_dataset_config
from .evaluate import ListedDataset, check_dataset, evaluate
from .features import EncodeOptions
from .score.statistics import overlaps

__all__ = [
    "DatasetConfig",
    "EncodeOptions",
    "ListedDataset",
    "check_dataset",
    "evaluate",
    "load_dataset_config",
    "overlaps",
]
