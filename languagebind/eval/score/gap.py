"""The gap between modalities: features of two encoders lie in two narrow cones, even after training together."""

from torch import Tensor


def modality_gap(query: Tensor, gallery: Tensor, right: Tensor) -> dict[str, float | None]:
    """Return the gap between unit-norm queries (Q, D) and items (G, D), of which `right` (Q,) names one for each query.

    `distance` is the L2 distance of the two means (Liang et al. 2022, arXiv 2203.02053). The others are mean cosines:
    `matched` of each query with its item, `across` of all queries with all items, and `within_query` and
    `within_gallery` of two different ones of a side, None if it has only one.
    """
    query, gallery = query.double(), gallery.double()
    centres = query.mean(dim=0), gallery.mean(dim=0)
    return {
        "distance": (centres[0] - centres[1]).norm().item(),
        "matched": (query * gallery[right]).sum(dim=1).mean().item(),
        "across": (centres[0] @ centres[1]).item(),
        "within_query": _within(query),
        "within_gallery": _within(gallery),
    }


def _within(x: Tensor) -> float | None:
    """Return the mean product of two different rows, from the sum of all products, or None for a single row."""
    count = len(x)
    return ((x.sum(dim=0).square().sum() - x.square().sum()) / (count * (count - 1))).item() if count > 1 else None
