"""Zero-shot classification: the classes are texts, a sample belongs to those it is closest to."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import UserError
from .features import EncodeOptions, encode_texts
from .metrics import classification_metrics, multilabel_metrics
from .samples import Sample

log = logging.getLogger(__name__)


def build_classifier(model, names: Sequence[str], templates: Sequence[str], options: EncodeOptions) -> Tensor:
    """Prompts of each class to one unit-norm vector a class, (K, D): the mean of its unit-norm prompt features."""
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    features, rows = encode_texts(model, prompts, options)
    per_class = features[torch.tensor(rows, device=features.device)].unflatten(0, (len(names), len(templates)))
    return F.normalize(per_class.mean(dim=1), dim=-1)


def label_targets(samples: Sequence[Sample], classes: Mapping[str, str], name: str) -> Tensor:
    """Whether each sample (N) has each class (K), bool. `classes` is label -> name in prompts, in class order.

    Raises:
        UserError: a label is no class.
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
            targets[row, column] = True
    return targets


def classify(features: Tensor, classifier: Tensor, logit_scale: Tensor, targets: Tensor, task: str) -> dict[str, Any]:
    """The metrics and the protocol of a classification.

    Args:
        features: (N, D), unit norm.
        classifier: (K, D), unit norm.
        logit_scale: log-space; the metrics depend on the order of the logits alone.
        targets: (N, K) bool; for `classification`, one True a row.
        task: `classification` or `multilabel`.
    """
    logits = logit_scale.detach().float().exp() * features @ classifier.T  # (N, K)
    targets = targets.to(logits.device)
    present = int(targets.any(dim=0).sum())
    protocol = {"classes": targets.shape[1], "classes_with_samples": present}
    if present < targets.shape[1]:
        log.warning("%d of %d classes have no sample", targets.shape[1] - present, targets.shape[1])
    if task == "multilabel":
        prevalence = targets.double().mean(dim=0)
        chance = {"mAP": prevalence[prevalence > 0].mean().item(), "mAUC": 0.5, "d_prime": 0.0}
        return {"metrics": multilabel_metrics(logits, targets), "protocol": protocol | {"chance": chance}}
    metrics = classification_metrics(logits, targets.int().argmax(dim=1))
    at_random = 1 / targets.shape[1]
    chance = {"top1": at_random, "top5": min(1.0, 5 * at_random), "mean_per_class": at_random}
    chance = {key: value for key, value in chance.items() if key in metrics}
    return {"metrics": metrics | {"chance": at_random}, "protocol": protocol | {"chance": chance}}


def _position(label: str | int, positions: Mapping[str, int]) -> int | None:
    """The class that a label means: its label, or its index, unless the labels themselves are numbers."""
    if isinstance(label, str):
        if label in positions:
            return positions[label]
        if not label.isdecimal() or any(name.isdecimal() for name in positions):
            return None
        label = int(label)
    return label if 0 <= label < len(positions) else None
