"""Intervals of metrics by the bootstrap: what another test set of the same size and kind could have given.

A resample draws as many samples as there are, with replacement, and the metric is computed anew on it.
The interval goes from one value of the sorted resamples to another, with the same number of them left out on both
sides: no normal distribution is assumed. Every rank draws the same resamples from the same seed, from the gathered
values in the order of the data, so neither ranks nor workers matter; two models on the same data meet the same
resamples. Global random state is neither read nor changed.

Where all samples are found, or none is, no resample differs: a share of 1 or 0 has the exact interval of Clopper and
Pearson instead, for as many samples as there are.

The model and the prompts are taken as given: an interval says nothing about another training run.
"""

import math
from collections.abc import Container, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config import UserError
from ..data.datasets import RECALL_AT
from .metrics import d_prime, precisions_and_areas

RESAMPLES = 1000
SEED = 0
CONFIDENCE = 0.95
DRAWS_AT_A_TIME = 2**21  # 16 MiB of indices

Intervals = dict[str, list[float]]


def settings() -> dict[str, Any]:
    """How the intervals were made, for the result."""
    return {"bootstrap": RESAMPLES, "seed": SEED, "confidence": CONFIDENCE, "shares_of_0_and_1": "Clopper-Pearson"}


def rank_intervals(ranks: Tensor, samples: Tensor, gallery: int) -> Intervals:
    """Intervals of `rank_metrics`, against the gallery as it is.

    Samples are resampled, each with all of its queries: another test set would have other samples, and the captions
    of one are found or missed together, so that drawing them on their own would make the intervals too narrow.

    Args:
        ranks: (Q,) from 1, of the queries.
        samples: (Q,) the sample that each query is of, from 0; every sample has one.
        gallery: how many items are ranked.
    """
    order = np.argsort(ranks.numpy(), kind="stable")
    ordered, owners = ranks.numpy()[order], samples.numpy()[order]
    within = {f"R@{k}": np.searchsorted(ordered, k, side="right") for k in RECALL_AT}

    def metrics(indices: np.ndarray) -> dict[str, np.ndarray]:
        weights = _occurrences(indices)[:, owners]  # (draws, Q)
        seen = np.pad(weights.cumsum(axis=1), ((0, 0), (1, 0)))  # of the 0, 1, ... Q queries of lowest rank
        total = seen[:, -1]
        found = {key: seen[:, count] / total for key, count in within.items()}
        low, high = (
            np.array([np.searchsorted(row, place) - 1 for row, place in zip(seen, places, strict=True)])
            for places in ((total + 1) // 2, total // 2 + 1)
        )
        return found | {"median_rank": (ordered[low] + ordered[high]) / 2, "mean_rank": weights @ ordered / total}

    count = int(samples.max()) + 1
    shares = [f"R@{k}" for k in RECALL_AT if k < gallery]  # of a larger k the share is 1, whatever the samples
    return _intervals(_gather(metrics(indices) for indices in _resamples(count, len(ranks))), shares, count)


def classification_intervals(ranks: Tensor, labels: Tensor, num_classes: int) -> Intervals:
    """Intervals of `classification_metrics`.

    For top1 and top5 all samples are resampled. For mean_per_class the samples of each class are resampled among
    themselves: how many each class has is a property of the test set, and a class of few samples would otherwise be
    absent from many resamples. There is no interval where a class has one sample, which says nothing of how much its
    share varies, or where no class's share does.

    Args:
        ranks: (N,) of the right class, from 1.
        labels: (N,) class indices.
        num_classes: of which some may have no sample.
    """

    def metrics(drawn: np.ndarray) -> dict[str, np.ndarray]:
        top5 = {"top5": _share(drawn <= 5)} if num_classes >= 5 else {}
        return {"top1": _share(drawn <= 1)} | top5

    counts = np.bincount(labels.numpy(), minlength=num_classes)
    hits = np.bincount(labels.numpy()[ranks.numpy() == 1], minlength=num_classes)[counts > 0]
    counts = counts[counts > 0]
    # The number of hits among n draws from n samples of a class is binomial.
    draws = np.random.default_rng(SEED).binomial(counts, hits / counts, size=(RESAMPLES, len(counts)))
    values = _gather(metrics(ranks.numpy()[indices]) for indices in _resamples(len(ranks)))
    means = (draws / counts).mean(axis=1)
    shares = [key for key, k in (("top1", 1), ("top5", 5)) if k < num_classes]
    known = counts.min() > 1 and np.ptp(means)
    return _intervals(values, shares, len(ranks)) | ({"mean_per_class": _ends(means)} if known else {})


def multilabel_intervals(scores: Tensor, targets: Tensor) -> Intervals:
    """Intervals of `multilabel_metrics`: samples are resampled; a class that a resample lacks is left out of its mean.

    A right sample that is drawn twice raises the precision at its own place, so that resamples have a higher average
    precision than the data; where classes are rare, by more than the interval is wide. The resamples of mAP are
    therefore moved until their mean is the mAP of the data.

    A metric has no interval where some resample has no class that it is defined for.

    Args:
        scores: (N, K), none of them NaN.
        targets: (N, K) bool, at least one True.
    """

    def metrics(indices: np.ndarray) -> dict[str, np.ndarray]:
        weights = torch.from_numpy(_occurrences(indices)).T.to(scores.device, torch.float32).contiguous()  # (N, draws)
        precisions, areas = precisions_and_areas(scores, targets, weights)  # (K, draws)
        area = areas.nanmean(dim=0)
        found = {"mAP": precisions.nanmean(dim=0), "mAUC": area, "d_prime": d_prime(area)}
        return {key: value.cpu().numpy() for key, value in found.items()}

    values = _gather(metrics(indices) for indices in _resamples(len(scores)))
    measured = precisions_and_areas(scores, targets)[0].nanmean().item()
    values["mAP"] = (values["mAP"] - values["mAP"].mean() + measured).clip(0, 1)
    return {key: _ends(value) for key, value in values.items() if not np.isnan(value).any()}


def overlaps(result_a: dict[str, Any], result_b: dict[str, Any]) -> list[str]:
    """The metrics of two results of the same data whose intervals overlap: there one model is not shown to be better.

    Raises:
        UserError: the results are of different data, or of different samples of it.
    """
    for key, a, b in (
        ("dataset", result_a["dataset"], result_b["dataset"]),
        *((key, result_a["protocol"].get(key), result_b["protocol"].get(key)) for key in ("data_sha256", "samples")),
    ):
        if a != b:
            raise UserError(f"results of different data cannot be compared: {key} is {a} and {b}")
    found = []
    for metric in result_a.get("intervals", {}):
        first, second = interval(result_a, metric), interval(result_b, metric)
        if second and first[0] <= second[1] and second[0] <= first[1]:
            found.append(metric)
    return found


def interval(result: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """The ends of a metric's interval, where the result has one; a result file holds an infinite end as null."""
    if metric not in result.get("intervals", {}):
        return None
    low, high = result["intervals"][metric]
    # Where one end alone is infinite, it is known which; where both are, it is above, as of an AUC of 1
    if low is None:
        low = math.inf if high is None else -math.inf
    return low, math.inf if high is None else high


def _resamples(count: int, width: int = 0) -> Iterator[np.ndarray]:
    """(draws, count) indices of samples, RESAMPLES rows in all; few at a time if `width` values are made of each."""
    generator = np.random.default_rng(SEED)
    size = max(1, DRAWS_AT_A_TIME // max(count, width))
    for start in range(0, RESAMPLES, size):
        yield generator.integers(count, size=(min(size, RESAMPLES - start), count))


def _occurrences(indices: np.ndarray) -> np.ndarray:
    """(draws, count) indices to how often each occurs, of the same shape."""
    draws, count = indices.shape
    places = indices + count * np.arange(draws)[:, None]
    return np.bincount(places.ravel(), minlength=draws * count).reshape(draws, count)


def _gather(blocks: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Values of blocks of resamples to those of all, (RESAMPLES,) for each metric."""
    blocks = list(blocks)
    return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}


def _intervals(values: dict[str, np.ndarray], shares: Container[str], count: int) -> Intervals:
    """The intervals of metrics, of which some are shares of `count` samples."""
    found = {key: _ends(value) for key, value in values.items()}
    far = ((1 - CONFIDENCE) / 2) ** (1 / count)
    exact = {(0.0, 0.0): [0.0, 1 - far], (1.0, 1.0): [far, 1.0]}
    return {key: exact.get(tuple(ends), ends) if key in shares else ends for key, ends in found.items()}


def _ends(values: np.ndarray) -> list[float]:
    """Of the sorted values, those that leave out as many on either side: the 26th from either end, of 1000."""
    left_out = round(len(values) * (1 - CONFIDENCE) / 2)
    ordered = np.sort(values)
    return [float(ordered[left_out]), float(ordered[-1 - left_out])]


def _share(hits: np.ndarray) -> np.ndarray:
    return np.count_nonzero(hits, axis=1) / hits.shape[1]
