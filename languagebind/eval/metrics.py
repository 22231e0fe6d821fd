"""Metrics as pure functions of tensors: fractions, not percent; ties count against the model.

A tie counts against the model because a collapsed encoder scores everything alike: it must look like chance, not
like a perfect one. A score that is not a number is an error, never a metric.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)


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
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)  # (Q, 1)
    return 1 + ((scores >= best) & ~relevant).sum(dim=1)


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
    ranks = best_ranks(logits, labels[:, None] == torch.arange(num_classes, device=labels.device))
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
    occurs = [k for k in range(targets.shape[1]) if targets[:, k].any()]
    if not occurs:
        raise ValueError("no class has a positive sample")
    precisions, areas = zip(*(_ap_and_auc(scores[:, k], targets[:, k]) for k in occurs), strict=True)
    areas = [area for area in areas if not math.isnan(area)]
    metrics = {"mAP": sum(precisions) / len(precisions)}
    if areas:
        area = torch.tensor(sum(areas) / len(areas), dtype=torch.float64)
        metrics |= {"mAUC": area.item(), "d_prime": math.sqrt(2) * torch.special.ndtri(area).item()}
    return metrics


def chance_at(k: int, gallery: int, positives: Sequence[int]) -> float:
    """Expected R@k of a random order of `gallery` items, for queries with these numbers of relevant ones."""
    draws = range(min(k, gallery))
    misses = [math.prod(max(gallery - count - j, 0) / (gallery - j) for j in draws) for count in positives]
    return 1 - sum(misses) / len(misses)


def _ap_and_auc(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """Average precision and area under the ROC curve of one class; samples of equal score are taken as one step."""
    order = scores.argsort(descending=True)
    hits = targets[order].double().cumsum(0)  # (N,) true positives among the first n
    is_last = torch.ones_like(targets)  # the last of its run of equal scores
    is_last[:-1] = scores[order][:-1] != scores[order][1:]
    hits, seen = hits[is_last], is_last.nonzero()[:, 0].double() + 1
    misses = seen - hits
    new_hits, new_misses = hits.diff(prepend=hits.new_zeros(1)), misses.diff(prepend=misses.new_zeros(1))
    precision = (new_hits * hits / seen).sum() / hits[-1]
    # Each negative is worth the positives above it, and half of those it ties with.
    area = (new_misses * (hits - new_hits / 2)).sum() / (hits[-1] * misses[-1])
    return precision.item(), area.item()


def _check(scores: Tensor, mask: Tensor) -> None:
    if scores.ndim != 2 or scores.shape != mask.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and mask {tuple(mask.shape)} should both be (rows, columns)")
    if scores.isnan().any():
        row, column = scores.isnan().nonzero()[0].tolist()
        raise ValueError(f"the scores hold NaN, first at row {row}, column {column}")


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
