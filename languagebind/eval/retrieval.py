"""Retrieval in both directions: from captions to samples, and from samples to captions.

A caption belongs to its own sample alone: where two samples have the same caption, each one's copy counts as wrong for
the other. How often that happens is in the protocol, as no model can rank such a pair.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .metrics import RECALL_AT, best_ranks, chance_at, rank_metrics

SCORES_AT_A_TIME = 2**24  # 64 MiB of scores: memory stays flat however large the gallery is


def retrieve(features: Tensor, text_features: Tensor, rows: Tensor, owners: Tensor) -> dict[str, Any]:
    """The metrics and the protocol of retrieval both ways; of a sample's several captions the best-ranked one counts.

    Args:
        features: (N, D) of the samples, unit norm.
        text_features: (U, D) of the distinct captions, unit norm.
        rows: (Q,) the row in `text_features` of each caption.
        owners: (Q,) the sample that each caption belongs to.
    """
    samples = torch.arange(len(features), device=owners.device)

    def from_text(queries: Tensor) -> tuple[Tensor, Tensor]:
        return text_features[rows[queries]] @ features.T, owners[queries, None] == samples

    def to_text(queries: Tensor) -> tuple[Tensor, Tensor]:
        # Scores of distinct captions are copied, not computed again: equal captions tie exactly.
        return (features[queries] @ text_features.T)[:, rows], samples[queries, None] == owners

    text_to_modality = rank_metrics(_ranks(from_text, len(rows), len(features)))
    modality_to_text = rank_metrics(_ranks(to_text, len(features), len(rows)))
    metrics = _prefixed("text_to_modality", text_to_modality) | _prefixed("modality_to_text", modality_to_text)
    return {"metrics": metrics, "protocol": _protocol(rows.tolist(), owners.tolist(), len(features))}


def _ranks(block: Callable[[Tensor], tuple[Tensor, Tensor]], num_queries: int, gallery: int) -> Tensor:
    """(num_queries,) ranks; `block` gives scores and relevance, (q, gallery) each, for q of the queries."""
    size = max(1, SCORES_AT_A_TIME // gallery)
    starts = range(0, num_queries, size)
    return torch.cat([best_ranks(*block(torch.arange(s, min(s + size, num_queries)))).cpu() for s in starts])


def _protocol(rows: Sequence[int], owners: Sequence[int], num_samples: int) -> dict[str, Any]:
    owners_of_text = Counter(row for row, _ in set(zip(rows, owners, strict=True)))
    counts = list(Counter(owners).values())
    chance = {f"text_to_modality/R@{k}": chance_at(k, num_samples, [1]) for k in RECALL_AT}
    chance |= {f"modality_to_text/R@{k}": chance_at(k, len(rows), counts) for k in RECALL_AT}
    return {
        "captions": len(rows),
        "captions_per_sample": [min(counts), max(counts)],
        "captions_of_several_samples": sum(owners_of_text[row] > 1 for row in rows),
        "relevance": "a caption is relevant to its own sample alone",
        "chance": chance,
    }


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{key}": value for key, value in metrics.items()}
