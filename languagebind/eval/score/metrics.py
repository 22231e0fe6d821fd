"""Metrics as pure functions of tensors: fractions, not percent; ties count against the model.

A tie counts against the model because a collapsed encoder scores everything alike: it must look like chance, not
like a perfect one. A score that is not a number is an error, never a metric.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.datasets import RECALL_AT


def retrieval_metrics(scores: Tensor, relevant: Tensor) -> dict[str, float]:
    """R@1, R@5, R@10, median_rank and mean_rank of the best-ranked relevant item of each query.

    Args:
        scores: (Q, G) similarity of each query to each gallery item.
        relevant: (Q, G) bool, at least one True a row.

    Raises:
        ValueError: the scores hold NaN, the shapes differ, or a query has nothing relevant.
    """
    return rank_metrics(best_ranks(scores, relevant))


def best_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """(Q, G) scores and relevance -> (Q,) rank, from 1, of the best relevant item. Raises as `retrieval_metrics`."""
    _check(scores, relevant)
    if not relevant.any(dim=1).all():
        raise ValueError(f"query {int((~relevant.any(dim=1)).nonzero()[0])} has no relevant item")
    return rank_pairs(scores, *relevant.nonzero(as_tuple=True)).ranks


class Ranked(NamedTuple):
    """How queries did."""

    ranks: Tensor
    """(Q,) from 1: one more than the wrong items that score at least as high as the best right one"""
    tied: Tensor
    """(Q,) bool: a wrong item scores exactly as the best right one"""
    best: Tensor
    """(Q,) the score of the best right item"""


def rank_pairs(scores: Tensor, queries: Tensor, items: Tensor) -> Ranked:
    """Ranks where the right answers are given as pairs, which needs no (Q, G) mask.

    Args:
        scores: (Q, G), none of them NaN.
        queries: (P,) the query of each pair; every query has one.
        items: (P,) the gallery item that is right for it.
    """
    right = scores[queries, items]
    best = torch.full_like(scores[:, 0], -torch.inf).scatter_reduce(0, queries, right, "amax")  # (Q,)
    tied_right = (right == best[queries]).long()  # (P,)
    tied_right = tied_right.new_zeros(len(scores)).index_add(0, queries, tied_right)
    above = _count(scores > best[:, None])
    tied_wrong = _count(scores == best[:, None]) - tied_right
    return Ranked(1 + above + tied_wrong, tied_wrong > 0, best)


def rank_metrics(ranks: Tensor) -> dict[str, float]:
    """(Q,) ranks, from 1, to retrieval metrics. With an even count the median is the mean of the two middle ranks."""
    if not len(ranks):
        raise ValueError("no queries")
    ordered = ranks.double().sort().values
    recalls = {f"R@{k}": _mean(ordered <= k) for k in RECALL_AT}
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return {**recalls, "median_rank": median.item(), "mean_rank": _mean(ordered)}


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """top1, top5 (where there are five classes) and mean_per_class: top1 averaged over the classes that occur.

    Args:
        logits: (N, K).
        labels: (N,) class indices.

    Raises:
        ValueError: the logits hold NaN, there are no samples, or a label is not one of the K classes.
    """
    num_classes = logits.shape[1]
    if len(logits) != len(labels) or not len(labels):
        raise ValueError(f"{len(logits)} rows of logits for {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels {int(labels.min())}..{int(labels.max())} for {num_classes} classes")
    _check_nan(logits)
    ranks = rank_pairs(logits, torch.arange(len(labels), device=labels.device), labels).ranks
    hits = (ranks == 1).double().cpu()
    counts = labels.cpu().bincount(minlength=num_classes)
    recalls = labels.cpu().bincount(weights=hits, minlength=num_classes) / counts
    top5 = {"top5": _mean(ranks <= 5)} if num_classes >= 5 else {}
    return {"top1": _mean(hits), **top5, "mean_per_class": _mean(recalls[counts > 0])}


def multilabel_metrics(scores: Tensor, targets: Tensor) -> dict[str, float]:
    """mAP, mAUC and d_prime over the classes where they are defined.

    A class that no sample has is left out; one that every sample has is left out of mAUC. d_prime is that of the mean
    AUC, as in AudioSet's own evaluation, and infinite where that is 1. Where no class has both kinds of sample, mAUC
    and d_prime are left out.

    Args:
        scores: (N, K), any monotonic score.
        targets: (N, K) bool or 0/1.

    Raises:
        ValueError: the scores hold NaN, the shapes differ, or no class has a positive sample.
    """
    targets = targets.bool()
    _check(scores, targets)
    if not targets.any():
        raise ValueError("no class has a positive sample")
    precisions, areas = (values[:, 0] for values in precisions_and_areas(scores, targets))  # (K,)
    metrics = {"mAP": precisions.nanmean().item()}
    if not areas.isnan().all():
        area = areas.nanmean()
        metrics |= {"mAUC": area.item(), "d_prime": d_prime(area).item()}
    return metrics


def d_prime(area: Tensor) -> Tensor:
    """The distance of two normal distributions of variance 1 that would give this area under the ROC curve."""
    return math.sqrt(2) * torch.special.ndtri(area)


def precisions_and_areas(scores: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average precision and area under the ROC curve, (K, B) float64 each; NaN where they are not defined.

    Args:
        scores: (N, K), none of them NaN.
        targets: (N, K) bool.
        weights: (N, B) how often each sample occurs, for B resamples at once; by default once, and B is 1. Whole
            numbers, which float32 adds up exactly.
    """
    if weights is None:
        weights = torch.ones(len(scores), 1, device=scores.device)
    columns = [_precision_and_area(scores[:, k], targets[:, k], weights) for k in range(scores.shape[1])]
    return tuple(torch.stack(values) for values in zip(*columns, strict=True))


def calibration(logits: Tensor, right: Tensor, bins: int = 15) -> dict[str, Any]:
    """Expected calibration error of the softmax, over bins of equal width (Guo et al., 2017).

    Args:
        logits: (N, K), the logit scale in them.
        right: (N,) bool, whether the first class of each is the right one.
        bins: how many.

    Returns:
        `ece`, and `bins`: mean confidence, accuracy and number of samples, of the bins that are not empty.
    """
    confidence = logits.softmax(dim=1).amax(dim=1).double().cpu()  # on a GPU the order of a sum is left to chance
    places = (confidence * bins).long().clamp(max=bins - 1)
    counts, sums, hits = (
        places.bincount(weights=values, minlength=bins)
        for values in (torch.ones_like(confidence), confidence, right.double().cpu())
    )
    rows = [
        [total / count, hit / count, int(count)]
        for total, hit, count in zip(sums.tolist(), hits.tolist(), counts.tolist(), strict=True)
        if count
    ]
    return {"ece": sum(abs(x - y) * count for x, y, count in rows) / len(logits), "bins": rows}


def best_thresholds(scores: Tensor, targets: Tensor) -> list[float | None]:
    """The score of each class from which on to say yes, for the best F1; None for a class that no sample has.

    Of several that are as good the highest.

    Args:
        scores: (N, K).
        targets: (N, K) bool.
    """
    ordered, order = scores.sort(dim=0, descending=True)
    hits = targets.gather(0, order).double().cumsum(0)  # (N, K)
    said_yes = torch.arange(1, len(scores) + 1, device=scores.device)[:, None]
    f1 = 2 * hits / (said_yes + hits[-1])
    # A threshold takes all samples of its score or none.
    f1[:-1][ordered[:-1] == ordered[1:]] = -1
    found = ordered.gather(0, f1.argmax(dim=0, keepdim=True))[0].tolist()
    return [score if occurs else None for score, occurs in zip(found, targets.any(dim=0).tolist(), strict=True)]


def chance_at(k: int, gallery: int, positives: Sequence[int]) -> float:
    """Expected R@k of a random order of `gallery` items, for queries with these numbers of relevant ones."""
    draws = range(min(k, gallery))
    misses = [math.prod(max(gallery - count - j, 0) / (gallery - j) for j in draws) for count in positives]
    return 1 - sum(misses) / len(misses)


def chance_of_class(num_classes: int) -> dict[str, float]:
    """Expected `classification_metrics` of a random order of the classes."""
    top5 = {"top5": 5 / num_classes} if num_classes >= 5 else {}
    return {"top1": 1 / num_classes, **top5, "mean_per_class": 1 / num_classes}


def chance_of_precision(positives: Tensor, samples: int) -> float:
    """Expected mAP of random orders of the samples, of which each class has `positives` (K,); those with none left out.

    Of rare classes it is well above their share of the samples (Bestgen, 2015).
    """
    positives = positives[positives > 0].double()
    first = (1 / torch.arange(1, samples + 1, dtype=torch.float64)).mean().item()  # of a class with one positive
    return _mean(first + (1 - first) * (positives - 1) / max(samples - 1, 1))


def _precision_and_area(scores: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`precisions_and_areas` of one class: (B,) each. Samples of equal score are taken as one step.

    Only the scores of right samples are steps; what lies between two of them is added up at once, which makes a
    thousand resamples of hundreds of classes a matter of seconds.
    """
    ordered, order = scores.sort(descending=True)
    steps = scores[targets].unique().flip(0)  # (M,)
    if not len(steps):
        nothing = torch.full_like(weights[0], torch.nan, dtype=torch.float64)
        return nothing, nothing
    # Samples above each step and those on it, in turns: 2 M + 1 runs of the ordered samples.
    bounds = torch.stack([torch.searchsorted(-ordered, -steps), torch.searchsorted(-ordered, -steps, right=True)], 1)
    starts = torch.cat([bounds.new_zeros(1), bounds.flatten()])
    seen = F.embedding_bag(order, weights, starts, mode="sum").double().cumsum(0)  # (2 M + 1, B)
    before, until, everything = seen[0:-1:2], seen[1::2], seen[-1]
    places = torch.searchsorted(-steps, -scores[targets])
    new_hits = torch.zeros_like(until).index_add(0, places, weights[targets].double())  # (M, B)
    hits = new_hits.cumsum(0)
    precision = (new_hits * (hits / until).nan_to_num()).sum(0) / hits[-1]
    # Each right sample is worth the wrong ones below it, and half of those it ties with.
    wrong = everything - hits[-1]
    wrong_above = before - (hits - new_hits)
    wrong_until = until - hits
    area = (new_hits * (wrong - (wrong_above + wrong_until) / 2)).sum(0) / (hits[-1] * wrong)
    return precision, area


def _check(scores: Tensor, mask: Tensor) -> None:
    if scores.ndim != 2 or scores.shape != mask.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and mask {tuple(mask.shape)} should both be (rows, columns)")
    _check_nan(scores)


def _check_nan(scores: Tensor) -> None:
    if scores.isnan().any():
        row, column = scores.isnan().nonzero()[0].tolist()
        raise ValueError(f"the scores hold NaN, first at row {row}, column {column}")


def _count(mask: Tensor) -> Tensor:
    """(Q, G) bool -> (Q,) how many of each row; on a CPU NumPy counts ten times as fast as PyTorch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return mask.count_nonzero(dim=1)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
