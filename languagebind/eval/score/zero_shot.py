"""Zero-shot classification: the classes are texts, a sample belongs to those it is closest to."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...config import UserError
from ..data.samples import Sample
from .examples import media, pick_examples
from .metrics import (
    Ranked,
    best_thresholds,
    calibration,
    chance_of_class,
    chance_of_precision,
    classification_metrics,
    multilabel_metrics,
    precisions_and_areas,
    rank_pairs,
)
from .statistics import classification_intervals, multilabel_intervals

log = logging.getLogger(__name__)


def label_targets(samples: Sequence[Sample], classes: Mapping[str, str], name: str) -> Tensor:
    """Whether each sample (N) has each class (K), bool. `classes` is label -> name in prompts, in class order.

    Raises:
        UserError: a label is no class, or a number that names one class and is the index of another.
    """
    positions = {label: k for k, label in enumerate(classes)}
    targets = torch.zeros(len(samples), len(classes), dtype=torch.bool)
    for row, sample in enumerate(samples):
        for label in sample.labels:
            column = _position(label, positions)
            if column is None:
                nearest = difflib.get_close_matches(str(label), list(positions), n=1)
                hint = f", did you mean {nearest[0]!r}?" if nearest else f" ({len(positions)} classes)"
                raise UserError(f"{name}: the label {label!r} of {sample.key} is not in class_names{hint}")
            if positions.get(str(label), column) != column:
                raise UserError(
                    f"{name}: the label {label} of {sample.key} is the index of one class and the label of another:"
                    f" write it as text, '{label}', or give class_names as a list in the order of the indices"
                )
            targets[row, column] = True
    return targets


def classify(scores: Tensor, targets: Tensor, task: str) -> dict[str, Any]:
    """The metrics and the protocol of a classification.

    Args:
        scores: (N, K) cosine of each sample and class.
        targets: (N, K) bool; for `classification`, one True a row.
        task: `classification` or `multilabel`.
    """
    present = int(targets.any(dim=0).sum())
    protocol = {"classes": targets.shape[1], "classes_with_samples": present}
    if present < targets.shape[1]:
        log.warning("%d of %d classes have no sample", targets.shape[1] - present, targets.shape[1])
    if task == "multilabel":
        chance = {"mAP": chance_of_precision(targets.sum(dim=0), len(targets)), "mAUC": 0.5, "d_prime": 0.0}
        return {"metrics": multilabel_metrics(scores, targets), "protocol": protocol | {"chance": chance}}
    metrics = classification_metrics(scores, single_labels(targets))
    chance = chance_of_class(targets.shape[1])
    return {"metrics": metrics | {"chance": chance["top1"]}, "protocol": protocol | {"chance": chance}}


def describe_classification(
    scores: Tensor, targets: Tensor, logits: Tensor, classes: Mapping[str, str], samples: Sequence[Sample]
) -> dict[str, Any]:
    """Intervals, ties, classes, confusion, calibration and examples.

    The class predicted for a sample is its own where that scores above all others, else the best of the others.

    Args:
        scores: (N, K) of each sample and class, cosines or what the views of a sample give.
        targets: (N, K) bool, one True a row.
        logits: (N, K), whose softmax is the confidence of the predictions.
        classes: K of label -> name in prompts, in class order.
        samples: N of them.
    """
    labels = single_labels(targets)
    ranked = rank_pairs(scores, torch.arange(len(scores), device=scores.device), labels)
    right = ranked.ranks == 1
    predicted = torch.where(right, labels, scores.masked_fill(targets, -torch.inf).argmax(dim=1))
    counts, hits = (x.bincount(minlength=len(classes)).tolist() for x in (labels, labels[right]))
    pairs, pair_counts = torch.stack([labels, predicted], dim=1).unique(dim=0, return_counts=True)
    confusion = torch.cat([pairs, pair_counts[:, None]], dim=1).tolist()
    return {
        "intervals": classification_intervals(ranked.ranks.cpu(), labels.cpu(), len(classes)),
        "ties": int(ranked.tied.sum()),
        "classes": [
            {"label": label, "name": name, "samples": count, "top1": hit / count if count else None}
            for (label, name), count, hit in zip(classes.items(), counts, hits, strict=True)
        ],
        "confusion": confusion,
        "calibration": calibration(logits, right),
        "examples": _examples(ranked, predicted.tolist(), targets, list(classes.values()), samples),
    }


def describe_multilabel(
    scores: Tensor, targets: Tensor, classes: Mapping[str, str], samples: Sequence[Sample]
) -> dict[str, Any]:
    """Intervals, ties, classes with the threshold of the cosine that gives the best F1 here, and examples.

    Ties and examples are of the samples that have a label. Arguments as in `describe_classification`; any number of
    True in a row.
    """
    counts = targets.sum(dim=0).tolist()
    columns = zip(*precisions_and_areas(scores, targets), best_thresholds(scores, targets), strict=True)
    rows = [
        {"label": label, "name": name, "samples": count, "AP": _or_none(ap), "AUC": _or_none(auc), "threshold": best}
        for (label, name), count, (ap, auc, best) in zip(classes.items(), counts, columns, strict=True)
    ]
    labelled = targets.any(dim=1)
    own, own_targets = scores[labelled], targets[labelled]
    ranked = rank_pairs(own, *own_targets.nonzero(as_tuple=True))
    # The class ranked first: a right one where the rank is 1.
    allowed = own_targets == (ranked.ranks == 1)[:, None]
    found = own.masked_fill(~allowed, -torch.inf).argmax(dim=1).tolist()
    of_samples = [samples[i] for i in labelled.nonzero()[:, 0].tolist()]
    return {
        "intervals": multilabel_intervals(scores, targets),
        "ties": int(ranked.tied.sum()),
        "classes": rows,
        "examples": _examples(ranked, found, own_targets, list(classes.values()), of_samples),
    }


def _examples(
    ranked: Ranked, found: Sequence[int], targets: Tensor, names: Sequence[str], samples: Sequence[Sample]
) -> dict[str, Any]:
    def describe(positions: list[int]) -> list[dict[str, Any]]:
        true = {i: ", ".join(names[k] for k in targets[i].nonzero()[:, 0].tolist()) for i in positions}
        return [media(samples[i]) | {"text": true[i], "found": names[found[i]]} for i in positions]

    return pick_examples(ranked.ranks, ranked.best, describe)


def single_labels(targets: Tensor) -> Tensor:
    """(N, K) bool with one True a row -> (N,) its column."""
    return targets.byte().argmax(dim=1)


def _or_none(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


def _position(label: str | int, positions: Mapping[str, int]) -> int | None:
    """The class that a text is the label of, or, unless labels are numbers, the index; of a number, the index."""
    if isinstance(label, str):
        if label in positions:
            return positions[label]
        # Python refuses to read a number of thousands of digits, which is no index either.
        if not label.isdecimal() or len(label) > 18 or any(name.isdecimal() for name in positions):
            return None
        label = int(label)
    return label if 0 <= label < len(positions) else None
