"""Metrics as pure functions of tensors. They are fractions, not percentages.

Ties count against the model, so that a collapsed encoder, which scores all alike, looks bad. NaN is an error.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...config import UserError
from ..data.datasets import RECALL_AT


class Ranked(NamedTuple):
    """The outcome of each query."""

    ranks: Tensor  # (Q,) 1 + the number of wrong items that score at least as high as the best right item
    tied: Tensor  # (Q,) bool: a wrong item scores exactly as high as the best right item
    best: Tensor  # (Q,) the score of the best right item


def rank_pairs(scores: Tensor, queries: Tensor, items: Tensor) -> Ranked:
    """Return the ranks for scores (Q, G) without NaN. `items[p]` is right for `queries[p]`, (P,); all queries occur."""
    right = scores[queries, items]
    best = torch.full_like(scores[:, 0], -torch.inf).scatter_reduce(0, queries, right, "amax")  # (Q,)
    tied_right = (right == best[queries]).long()  # (P,)
    tied_right = tied_right.new_zeros(len(scores)).index_add(0, queries, tied_right)
    above = _count(scores > best[:, None])
    tied_wrong = _count(scores == best[:, None]) - tied_right
    return Ranked(1 + above + tied_wrong, tied_wrong > 0, best)


def rank_metrics(ranks: Tensor) -> dict[str, float]:
    """Return the retrieval metrics of ranks (Q,). For an even count, the median is the mean of the two middle ranks."""
    recalls = {f"R@{k}": _mean(ranks <= k) for k in RECALL_AT}
    return {**recalls, "median_rank": float(np.median(ranks.cpu())), "mean_rank": _mean(ranks)}


def modality_gap(query: Tensor, gallery: Tensor, right: Tensor) -> dict[str, float | None]:
    """Return the gap between unit-norm queries (Q, D) and items (G, D), of which `right` (Q,) names one for each query.

    `distance` is the L2 distance of the two means (Liang et al. 2022, arXiv 2203.02053). The others are mean cosines:
    `matched` of each query with its item, `across` of all queries with all items, and `within_query` and
    `within_gallery` of two different ones of a side, None if it has only one.
    """
    x, y = query.double(), gallery.double()
    gap = {"distance": (x.mean(dim=0) - y.mean(dim=0)).norm(), "matched": (x * y[right]).sum(dim=1).mean()}
    gap["across"] = x.mean(dim=0) @ y.mean(dim=0)
    for name, side in (("within_query", x), ("within_gallery", y)):
        # The sum of all products, without those of a row with itself
        products = side.sum(dim=0).square().sum() - side.square().sum()
        gap[name] = products / (len(side) * (len(side) - 1))  # 0 / 0 for a single row
    return {name: None if value.isnan() else value.item() for name, value in gap.items()}


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return top1, top5 (only for five or more classes) and mean_per_class (top1 averaged over the classes present).

    The logits are (N, K), the labels class indices (N,). Raises `ValueError` if the logits hold NaN, there are no
    samples, or a label is not one of the K classes.
    """
    num_classes = logits.shape[1]
    if len(logits) != len(labels) or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"logits {tuple(logits.shape)} need as many labels, from 0 to {num_classes - 1}: {labels}")
    _check(logits)
    ranks = rank_pairs(logits, torch.arange(len(labels), device=labels.device), labels).ranks
    hits = (ranks == 1).double().cpu()
    counts = labels.cpu().bincount(minlength=num_classes)
    recalls = labels.cpu().bincount(weights=hits, minlength=num_classes) / counts
    top5 = {"top5": _mean(ranks <= 5)} if num_classes >= 5 else {}
    return {"top1": _mean(hits), **top5, "mean_per_class": _mean(recalls[counts > 0])}


def multilabel_metrics(scores: Tensor, targets: Tensor) -> dict[str, float]:
    """Return mAP, mAUC and d_prime of scores (N, K), for targets (N, K) bool or 0/1, over the classes that have them.

    A class without positive samples is left out. A class without negative samples is left out of mAUC only. d_prime is
    computed from the mean AUC, as in AudioSet's own evaluation, and is infinite if the mean is 1. mAUC and d_prime are
    missing if no class has both positive and negative samples. Raises `ValueError` if the scores hold NaN, the shapes
    differ, or no class has a positive sample.
    """
    targets = targets.bool()
    if scores.shape != targets.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and mask {tuple(targets.shape)} should have the same shape")
    _check(scores)
    if not targets.any():
        raise UserError("no class has a positive sample, since none of the readable samples has a label")
    precisions, areas = (values[:, 0] for values in precisions_and_areas(scores, targets))  # (K,)
    metrics = {"mAP": precisions.nanmean().item()}
    if not areas.isnan().all():
        area = areas.nanmean()
        metrics |= {"mAUC": area.item(), "d_prime": d_prime(area).item()}
    return metrics


def d_prime(area: Tensor) -> Tensor:
    """Return the distance between two unit-variance normal distributions whose area under the ROC curve is `area`."""
    return math.sqrt(2) * torch.special.ndtri(area)


def precisions_and_areas(scores: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the average precision and the area under the ROC curve, (K, B) float64 each, NaN where undefined.

    Scores and targets are (N, K). `weights` (N, B) says how often each sample occurs in each of B resamples. By default
    there is one resample, the data itself. Weights are whole numbers, which float32 sums exactly.
    """
    if weights is None:
        weights = torch.ones(len(scores), 1, device=scores.device)
    columns = [_precision_and_area(scores[:, k], targets[:, k], weights) for k in range(scores.shape[1])]
    precisions, areas = zip(*columns, strict=True)
    return torch.stack(precisions), torch.stack(areas)


def calibration(logits: Tensor, right: Tensor, bins: int = 15) -> dict[str, Any]:
    """Return the expected calibration error of the softmax of logits (N, K) (Guo et al., 2017).

    `right` (N,) says whether the predicted class is right. In the result, `ece` is the error over `bins` bins of equal
    width, and the key `bins` lists [mean confidence, accuracy, number of samples] of each non-empty bin.
    """
    confidence = logits.softmax(dim=1).amax(dim=1).double().cpu()  # a sum on a GPU has no fixed order
    places = (confidence * bins).long().clamp(max=bins - 1)
    columns = (confidence, right.double().cpu(), torch.ones_like(confidence))
    sums = [places.bincount(weights=values, minlength=bins).tolist() for values in columns]
    rows = [[total / count, hit / count, int(count)] for total, hit, count in zip(*sums, strict=True) if count]
    return {"ece": sum(abs(x - y) * count for x, y, count in rows) / len(logits), "bins": rows}


def best_thresholds(scores: Tensor, targets: Tensor) -> list[float | None]:
    """Return the threshold with the best F1 for each class, for scores and targets (N, K).

    Of equally good thresholds the highest wins. The threshold is None for a class without positive samples.
    """
    ordered, order = scores.sort(dim=0, descending=True)
    hits = targets.gather(0, order).double().cumsum(0)  # (N, K)
    accepted = torch.arange(1, len(scores) + 1, device=scores.device)[:, None]
    f1 = 2 * hits / (accepted + hits[-1])
    # A threshold accepts all samples of equal score or none
    f1[:-1][ordered[:-1] == ordered[1:]] = -1
    found = ordered.gather(0, f1.argmax(dim=0, keepdim=True))[0].tolist()
    return [score if occurs else None for score, occurs in zip(found, targets.any(dim=0).tolist(), strict=True)]


def chance_at(k: int, gallery: int, positives: Sequence[int]) -> float:
    """Return the expected R@k for a random order of `gallery` items. `positives` counts each query's relevant items."""
    draws = range(min(k, gallery))
    misses = [math.prod(max(gallery - count - j, 0) / (gallery - j) for j in draws) for count in positives]
    return 1 - sum(misses) / len(misses)


def chance_of_class(num_classes: int) -> dict[str, float]:
    """Return the expected `classification_metrics` for a random order of the classes."""
    top5 = {"top5": 5 / num_classes} if num_classes >= 5 else {}
    return {"top1": 1 / num_classes, **top5, "mean_per_class": 1 / num_classes}


def chance_of_precision(positives: Tensor, samples: int) -> float:
    """Return the expected mAP for a random order of the samples. `positives` (K,) counts each class's positive samples.

    Classes without positives are left out. For a rare class, the value is well above the class's share (Bestgen, 2015).
    """
    positives = positives[positives > 0].double()
    first = (1 / torch.arange(1, samples + 1, dtype=torch.float64)).mean().item()  # a class with one positive
    return _mean(first + (1 - first) * (positives - 1) / max(samples - 1, 1))


def _precision_and_area(scores: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the average precisions and the areas of one class, (B,) each. Samples of equal score form one step.

    Only the scores of positive samples are steps. All samples between two steps are summed at once, so that a thousand
    resamples of hundreds of classes take seconds.
    """
    ordered, order = scores.sort(descending=True)
    steps = scores[targets].unique().flip(0)  # (M,)
    if not len(steps):
        nothing = torch.full_like(weights[0], torch.nan, dtype=torch.float64)
        return nothing, nothing
    # The ordered samples form 2 M + 1 runs: alternately the samples above a step and the samples on the step
    bounds = torch.stack([torch.searchsorted(-ordered, -steps), torch.searchsorted(-ordered, -steps, right=True)], 1)
    starts = torch.cat([bounds.new_zeros(1), bounds.flatten()])
    seen = F.embedding_bag(order, weights, starts, mode="sum").double().cumsum(0)  # (2 M + 1, B)
    before, until, everything = seen[0:-1:2], seen[1::2], seen[-1]
    places = torch.searchsorted(-steps, -scores[targets])
    new_hits = torch.zeros_like(until).index_add(0, places, weights[targets].double())  # (M, B)
    hits = new_hits.cumsum(0)
    precision = (new_hits * (hits / until).nan_to_num()).sum(0) / hits[-1]
    # Each positive sample counts the negatives below it, and half of the negatives that it ties with
    wrong = everything - hits[-1]
    wrong_above = before - (hits - new_hits)
    wrong_until = until - hits
    area = (new_hits * (wrong - (wrong_above + wrong_until) / 2)).sum(0) / (hits[-1] * wrong)
    return precision, area


def _check(scores: Tensor) -> None:
    if scores.isnan().any():
        row, column = scores.isnan().nonzero()[0].tolist()
        raise ValueError(f"the scores hold NaN, first at row {row}, column {column}")


def _count(mask: Tensor) -> Tensor:
    """Count the True values per row. On a CPU, NumPy is ten times as fast as PyTorch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return mask.count_nonzero(dim=1)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
