"""Arithmetic on features: several modalities of a sample, or a sample and a text, as one vector."""

import math
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

# A sum this short, of vectors of norm 1, is rounding error, and has no direction.
SHORTEST = 1e-4


def fuse(features: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of unit-norm features, at unit norm again: (N, D), float32.

    A weight may be negative: a picture plus one text and minus another is the picture with what the texts differ in
    exchanged.

    Args:
        features: (N, D) by name; each row is brought to unit norm first, so that weights mean the same for all.
        weights: by name, of one or more of the features.

    Raises:
        ValueError: a weight is 0 or no number, there are no features of its name, shapes differ, or a sum cancels out.
    """
    if not weights:
        raise ValueError("fuse needs at least one weight")
    for name, weight in weights.items():
        if name not in features:
            raise ValueError(f"a weight for {name!r}, but features of {', '.join(features) or 'nothing'} alone")
        if not math.isfinite(weight) or weight == 0:
            raise ValueError(f"the weight of {name} should be a number other than 0, not {weight}")
    shapes = {tuple(features[name].shape) for name in weights}
    if len(shapes) > 1:
        raise ValueError(f"features of different shapes cannot be added: {sorted(shapes)}")
    total = sum(weight * F.normalize(features[name].float(), dim=-1) for name, weight in weights.items())
    short = (total.norm(dim=-1) < SHORTEST * max(map(abs, weights.values()))).nonzero()
    if len(short):
        raise ValueError(f"the features of {' and '.join(weights)} cancel out, first at row {int(short[0, 0])}")
    return F.normalize(total, dim=-1)
