"""Bootstrap intervals of metrics: the values to expect on other test sets of the same size and kind.

A resample draws as many samples as the data has, with replacement, and the metric is computed again on the resample.
The interval leaves out the same number of sorted values at both ends, which assumes no normal distribution. The seed is
fixed, so ranks and workers have no effect, and two models on the same data get the same resamples. An interval does not
cover the variation between training runs.

If all samples are hits, or none is, all resamples agree. Such a share gets the exact Clopper-Pearson interval.
"""

import math
from collections.abc import Callable, Container
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
    """Return the settings of the intervals, for the result file."""
    return {"bootstrap": RESAMPLES, "seed": SEED, "confidence": CONFIDENCE, "shares_of_0_and_1": "Clopper-Pearson"}


def rank_intervals(ranks: Tensor, samples: Tensor, gallery: int) -> Intervals:
    """Return the intervals of `rank_metrics` for the ranks (Q,) of queries against a gallery of fixed size.

    `samples` (Q,) holds the index of each query's sample. A resample draws samples with all of their queries. Captions
    of one sample tend to be found or missed together, so drawing single captions would make the intervals too narrow.
    """
    order = np.argsort(ranks.numpy(), kind="stable")
    ordered, owners = ranks.numpy()[order], samples.numpy()[order]
    within = {f"R@{k}": np.searchsorted(ordered, k, side="right") for k in RECALL_AT}

    def metrics(indices: np.ndarray) -> dict[str, np.ndarray]:
        weights = _occurrences(indices)[:, owners]  # (draws, Q)
        seen = np.pad(weights.cumsum(axis=1), ((0, 0), (1, 0)))  # queries among the 0, 1, ... Q lowest ranks
        total = seen[:, -1]
        found = {key: seen[:, count] / total for key, count in within.items()}
        low, high = (
            np.array([np.searchsorted(row, place) - 1 for row, place in zip(seen, places, strict=True)])
            for places in ((total + 1) // 2, total // 2 + 1)
        )
        return found | {"median_rank": (ordered[low] + ordered[high]) / 2, "mean_rank": weights @ ordered / total}

    count = int(samples.max()) + 1
    shares = [f"R@{k}" for k in RECALL_AT if k < gallery]  # for a larger k, the share is always 1
    return _intervals(_bootstrap(metrics, count, len(ranks)), shares, count)


def classification_intervals(ranks: Tensor, labels: Tensor, num_classes: int) -> Intervals:
    """Return the intervals of `classification_metrics` for the ranks (N,) of the right classes `labels` (N,).

    top1 and top5 resample all samples. mean_per_class resamples within each class, since a small class would otherwise
    be absent from many resamples. It has no interval if a class has only one sample, or if no class's share varies.
    """
    tops = {"top1": 1, "top5": 5} if num_classes >= 5 else {"top1": 1}

    def metrics(indices: np.ndarray) -> dict[str, np.ndarray]:
        drawn = ranks.numpy()[indices]
        return {key: np.count_nonzero(drawn <= k, axis=1) / drawn.shape[1] for key, k in tops.items()}

    counts = np.bincount(labels.numpy(), minlength=num_classes)
    hits = np.bincount(labels.numpy()[ranks.numpy() == 1], minlength=num_classes)[counts > 0]
    counts = counts[counts > 0]
    # The number of hits among n draws from n samples of a class is binomial
    draws = np.random.default_rng(SEED).binomial(counts, hits / counts, size=(RESAMPLES, len(counts)))
    means = (draws / counts).mean(axis=1)
    known = counts.min() > 1 and np.ptp(means)
    shares = [key for key, k in tops.items() if k < num_classes]
    found = _intervals(_bootstrap(metrics, len(ranks)), shares, len(ranks))
    return found | ({"mean_per_class": _ends(means)} if known else {})


def multilabel_intervals(scores: Tensor, targets: Tensor) -> Intervals:
    """Return the intervals of `multilabel_metrics` for the same arguments.

    A class that a resample lacks is left out of that resample's mean. A positive sample that is drawn twice raises the
    precision at its own rank, so resamples have a higher mAP than the data. If classes are rare, the difference is
    larger than the interval. The resampled values are therefore shifted so that their mean is the data's mAP. A metric
    has no interval if it is undefined for some resample.
    """

    def metrics(indices: np.ndarray) -> dict[str, np.ndarray]:
        weights = torch.from_numpy(_occurrences(indices)).T.to(scores.device, torch.float32).contiguous()  # (N, draws)
        precisions, areas = precisions_and_areas(scores, targets, weights)  # (K, draws)
        area = areas.nanmean(dim=0)
        found = {"mAP": precisions.nanmean(dim=0), "mAUC": area, "d_prime": d_prime(area)}
        return {key: value.cpu().numpy() for key, value in found.items()}

    values = _bootstrap(metrics, len(scores))
    measured = precisions_and_areas(scores, targets)[0].nanmean().item()
    values["mAP"] = (values["mAP"] - values["mAP"].mean() + measured).clip(0, 1)
    return {key: _ends(value) for key, value in values.items() if not np.isnan(value).any()}


def sum_intervals(counts: np.ndarray, metrics: Callable[[np.ndarray], dict[str, np.ndarray]]) -> Intervals:
    """Return the intervals of shares of the sums over samples of counts (N, ...), if no resample lacks a value."""
    resampled = _bootstrap(lambda x: metrics(np.tensordot(_occurrences(x), counts, 1)), len(counts), counts[0].size)
    defined = {key: value for key, value in resampled.items() if not np.isnan(value).any()}
    return _intervals(defined, defined, len(counts))


def overlaps(result_a: dict[str, Any], result_b: dict[str, Any]) -> list[str]:
    """Return the metrics whose intervals overlap in two results, so that neither model is shown to be better.

    Raises `UserError` if the results are for different data or different samples.
    """
    for key in ("dataset", "data_sha256", "samples"):
        a, b = ((result["protocol"] | {"dataset": result["dataset"]}).get(key) for result in (result_a, result_b))
        if a != b:
            raise UserError(f"results for different data cannot be compared: {key} is {a} and {b}")
    found = []
    for metric in result_a.get("intervals", {}):
        first, second = interval(result_a, metric), interval(result_b, metric)
        if first and second and first[0] <= second[1] and second[0] <= first[1]:
            found.append(metric)
    return found


def interval(result: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """Return the ends of a metric's interval, or None if the result has none. A null end in a file is infinite."""
    if metric not in result.get("intervals", {}):
        return None
    low, high = result["intervals"][metric]
    # A single infinite end has a known sign. If both ends are infinite, they are positive: the AUC is 1
    if low is None:
        low = math.inf if high is None else -math.inf
    return low, math.inf if high is None else high


def _bootstrap(
    metrics: Callable[[np.ndarray], dict[str, np.ndarray]], count: int, width: int = 0
) -> dict[str, np.ndarray]:
    """Return RESAMPLES values per metric. `metrics` takes indices (draws, count) and uses `width` values per draw."""
    generator = np.random.default_rng(SEED)
    size = max(1, DRAWS_AT_A_TIME // max(count, width))
    draws = [min(size, RESAMPLES - start) for start in range(0, RESAMPLES, size)]
    blocks = [metrics(generator.integers(count, size=(number, count))) for number in draws]
    return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}


def _occurrences(indices: np.ndarray) -> np.ndarray:
    """Return the number of times that each index occurs in each row of indices (draws, count), in the same shape."""
    draws, count = indices.shape
    places = indices + count * np.arange(draws)[:, None]
    return np.bincount(places.ravel(), minlength=draws * count).reshape(draws, count)


def _intervals(values: dict[str, np.ndarray], shares: Container[str], count: int) -> Intervals:
    """Return the intervals of metrics. The metrics in `shares` are fractions of `count` samples."""
    from scipy.stats import binomtest  # takes a second to import

    found = {key: _ends(value) for key, value in values.items()}
    for key, (low, high) in found.items():
        if key in shares and low == high and low in (0, 1):
            exact = binomtest(round(low * count), count).proportion_ci(CONFIDENCE, method="exact")
            found[key] = [float(exact.low), float(exact.high)]
    return found


def _ends(values: np.ndarray) -> list[float]:
    """Return the ends of the interval: of 1000 values, the 26th from the bottom and the 26th from the top."""
    tail = (1 - CONFIDENCE) / 2
    return [float(np.quantile(values, tail, method="higher")), float(np.quantile(values, 1 - tail, method="lower"))]
