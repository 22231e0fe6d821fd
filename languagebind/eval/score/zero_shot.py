"""Zero-shot classification: classes are texts, and a sample belongs to the class with the closest text."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...config import UserError
from ..data.samples import Sample
from . import metrics
from .examples import media, pick_examples
from .metrics import Ranked, precisions_and_areas, rank_pairs
from .statistics import classification_intervals, multilabel_intervals

log = logging.getLogger(__name__)


def label_targets(samples: Sequence[Sample], classes: Mapping[str, str], name: str) -> Tensor:
    """Return the targets (N, K), bool: which sample has which class. `classes` maps labels to names in prompts.

    Raises `UserError` if a label is not a class, or is a number that names one class and is the index of another.
    """
    positions = {label: k for k, label in enumerate(classes)}
    targets = torch.zeros(len(samples), len(classes), dtype=torch.bool)
    for row, sample in enumerate(samples):
        for label in sample.labels:
            column = _position(label, positions)
            where = f"{name}: the label {label!r} of {sample.key}"
            if column is None:
                close = difflib.get_close_matches(str(label), list(classes), n=1)
                hint = f", did you mean {close[0]!r}?" if close else f" ({len(classes)} classes)"
                raise UserError(f"{where} is not in class_names{hint}")
            if positions.get(str(label), column) != column:
                remedy = f"write it as text, '{label}', or list class_names in the order of the indices"
                raise UserError(f"{where} is the index of one class and the label of another: {remedy}")
            targets[row, column] = True
    return targets


def _position(label: str | int, positions: Mapping[str, int]) -> int | None:
    """Return the index of a label's class. A number, or numeric text if no class has a numeric label, is an index."""
    if isinstance(label, str):
        if label in positions:
            return positions[label]
        # Python does not read a number of thousands of digits
        if not label.isdecimal() or len(label) > 18 or any(name.isdecimal() for name in positions):
            return None
        label = int(label)
    return label if 0 <= label < len(positions) else None


def classify(scores: Tensor, targets: Tensor, task: str) -> dict[str, Any]:
    """Return the metrics and protocol for scores and targets (N, K). For `classification`, each row has one target."""
    present = int(targets.any(dim=0).sum())
    protocol = {"classes": targets.shape[1], "classes_with_samples": present}
    if present < targets.shape[1]:
        log.warning("%d of %d classes have no samples", targets.shape[1] - present, targets.shape[1])
    if task == "multilabel":
        chance = {"mAP": metrics.chance_of_precision(targets.sum(dim=0), len(targets)), "mAUC": 0.5, "d_prime": 0.0}
        return {"metrics": metrics.multilabel_metrics(scores, targets), "protocol": protocol | {"chance": chance}}
    found = metrics.classification_metrics(scores, single_labels(targets))
    chance = metrics.chance_of_class(targets.shape[1])
    return {"metrics": found | {"chance": chance["top1"]}, "protocol": protocol | {"chance": chance}}


def describe_classification(
    scores: Tensor, targets: Tensor, logits: Tensor, classes: Mapping[str, str], samples: Sequence[Sample]
) -> dict[str, Any]:
    """Return the intervals, ties, classes, confusion, calibration and examples.

    A sample is predicted right only if its class scores above all others. Otherwise the best other class is predicted.
    `targets` (N, K) has one True per row. The softmax of `logits` (N, K) is the confidence of the predictions.
    """
    labels = single_labels(targets)
    ranked = rank_pairs(scores, torch.arange(len(scores), device=scores.device), labels)
    right = ranked.ranks == 1
    predicted = torch.where(right, labels, scores.masked_fill(targets, -torch.inf).argmax(dim=1))
    counts, hits = (x.bincount(minlength=len(classes)).tolist() for x in (labels, labels[right]))
    pairs, pair_counts = torch.stack([labels, predicted], dim=1).unique(dim=0, return_counts=True)
    return {
        "intervals": classification_intervals(ranked.ranks.cpu(), labels.cpu(), len(classes)),
        "ties": int(ranked.tied.sum()),
        "classes": [
            {"label": label, "name": name, "samples": count, "top1": hit / count if count else None}
            for (label, name), count, hit in zip(classes.items(), counts, hits, strict=True)
        ],
        "confusion": torch.cat([pairs, pair_counts[:, None]], dim=1).tolist(),
        "calibration": metrics.calibration(logits, right),
        "examples": _examples(ranked, predicted.tolist(), targets, list(classes.values()), samples),
    }


def describe_multilabel(
    scores: Tensor, targets: Tensor, classes: Mapping[str, str], samples: Sequence[Sample]
) -> dict[str, Any]:
    """Return the intervals, ties, classes (each with the threshold of its best F1) and examples.

    Ties and examples cover the samples with a label. Arguments are as in `describe_classification`, but a row of
    `targets` may have any number of True values.
    """
    counts = targets.sum(dim=0).tolist()
    columns = zip(*precisions_and_areas(scores, targets), metrics.best_thresholds(scores, targets), strict=True)
    rows = [
        {"label": label, "name": name, "samples": count, "AP": or_none(ap), "AUC": or_none(auc), "threshold": best}
        for (label, name), count, (ap, auc, best) in zip(classes.items(), counts, columns, strict=True)
    ]
    labelled = targets.any(dim=1)
    own, own_targets = scores[labelled], targets[labelled]
    ranked = rank_pairs(own, *own_targets.nonzero(as_tuple=True))
    # The class that ranks first: a right class if the rank is 1, else a wrong class
    allowed = own_targets == (ranked.ranks == 1)[:, None]
    found = own.masked_fill(~allowed, -torch.inf).argmax(dim=1).tolist()
    labelled_samples = [samples[i] for i in labelled.nonzero()[:, 0].tolist()]
    return {
        "intervals": multilabel_intervals(scores, targets),
        "ties": int(ranked.tied.sum()),
        "classes": rows,
        "examples": _examples(ranked, found, own_targets, list(classes.values()), labelled_samples),
    }


def single_labels(targets: Tensor) -> Tensor:
    """Return the column (N,) of the only True value in each row of targets (N, K)."""
    return targets.byte().argmax(dim=1)


def _examples(
    ranked: Ranked, found: Sequence[int], targets: Tensor, names: Sequence[str], samples: Sequence[Sample]
) -> dict[str, Any]:
    def describe(i: int) -> dict[str, Any]:
        true = ", ".join(names[k] for k in targets[i].nonzero()[:, 0].tolist())
        return media(samples[i]) | {"text": true, "found": names[found[i]]}

    return pick_examples(ranked.ranks, ranked.best, describe)


def or_none(value: Tensor) -> float | None:
    """Return the number, or None for NaN."""
    return None if value.isnan() else value.item()
