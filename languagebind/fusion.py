"""Arithmetic on features: combine several modalities of a sample, or a sample and a text, into one vector."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import UserError

# A shorter sum of unit vectors is rounding error and has no direction
SHORTEST = 1e-4


def fuse(features: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum of unit-norm features, normalised again: (N, D), float32.

    Each row of the features (N, D) is normalised first, so that the weights are comparable. A weight may be negative:
    image + "day" - "night" approximates the features of the same scene by day.

    Raises `UserError` if there are no weights, one is 0 or not finite, a name is unknown, shapes differ, or a sum is 0.
    """
    unknown = weights.keys() - features.keys()
    if not weights or unknown or not all(weight and math.isfinite(weight) for weight in weights.values()):
        raise UserError(f"weights should be finite, non-zero numbers for some of {list(features)}, got {weights}")
    units = [F.normalize(features[name].float(), dim=-1) for name in weights]
    if len({unit.shape for unit in units}) > 1:
        raise UserError(f"features of different shapes cannot be added: {[tuple(unit.shape) for unit in units]}")
    total = torch.zeros_like(units[0])
    for weight, unit in zip(weights.values(), units, strict=True):
        total = total + weight * unit
    short = (total.norm(dim=-1) < SHORTEST * max(map(abs, weights.values()))).nonzero()
    if len(short):
        raise UserError(f"the features of {' and '.join(weights)} cancel out; the first such row is {int(short[0, 0])}")
    return F.normalize(total, dim=-1)
