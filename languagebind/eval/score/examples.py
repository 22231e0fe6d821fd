"""The samples or queries that a model is best and worst at, for a person to look at."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data.samples import Sample, Source

EXAMPLES = 12
# Features differ in the last bits from one batch size or number of ranks to another, and the order should not.
DIGITS = 5


def pick_examples(ranks: Tensor, scores: Tensor, describe: Callable[[list[int]], list[dict[str, Any]]]) -> dict:
    """The best of those ranked first, by score, and the worst of the others, by rank; at most EXAMPLES each.

    Args:
        ranks: (Q,) of the best right item, from 1.
        scores: (Q,) its cosine.
        describe: the rest of what is said of some queries, by their positions.
    """
    ranks, scores = ranks.cpu().numpy(), scores.double().cpu().numpy().round(DIGITS)
    order = np.lexsort((-scores, ranks)).tolist()
    chosen = {
        "best": [i for i in order[:EXAMPLES] if ranks[i] == 1],
        "worst": [i for i in order[: -EXAMPLES - 1 : -1] if ranks[i] > 1],
    }
    return {
        name: [
            {**text, "rank": int(ranks[i]), "score": float(scores[i])}
            for i, text in zip(positions, describe(positions), strict=True)
        ]
        for name, positions in chosen.items()
    }


def media(sample: Sample) -> dict[str, Any]:
    """Where the media of a sample is found: its key, and each file's path or its place in a shard."""
    sources: Sequence[Any] = sample.source if isinstance(sample.source, tuple) else (sample.source,)
    return {"key": sample.key, "source": [_place(source) for source in sources]}


def _place(source: Source) -> str | dict[str, Any]:
    if isinstance(source, Path):
        return str(source)
    return {"shard": str(source.shard), "name": source.name, "offset": source.offset, "size": source.size}
