"""The samples or queries that a model does best and worst on, for a person to look at."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from ..data.samples import Sample
from ..data.shards import Member

EXAMPLES = 12
# The last bits of features depend on batch size and number of ranks; the order of examples should not
DIGITS = 5


def pick_examples(ranks: Tensor, scores: Tensor, describe: Callable[[int], dict[str, Any]]) -> dict:
    """Return the best of those ranked first, by score, and the worst of the others, by rank; at most EXAMPLES each.

    Takes the rank (Q,) of the best right item of each query, its score (Q,), and what returns the other facts of one.
    """
    places, values = ranks.cpu().numpy(), scores.double().cpu().numpy().round(DIGITS)
    order = np.lexsort((-values, places)).tolist()
    chosen = {
        "best": [i for i in order[:EXAMPLES] if places[i] == 1],
        "worst": [i for i in order[: -EXAMPLES - 1 : -1] if places[i] > 1],
    }
    return {
        name: [describe(i) | {"rank": int(places[i]), "score": float(values[i])} for i in positions]
        for name, positions in chosen.items()
    }


def media(sample: Sample) -> dict[str, Any]:
    """Return a sample's key, and the path of each of its files or its place in a shard."""
    sources: Sequence[Any] = sample.source if isinstance(sample.source, tuple) else (sample.source,)
    places = [
        asdict(source) | {"shard": str(source.shard)} if isinstance(source, Member) else str(source)
        for source in sources
    ]
    return {"key": sample.key, "source": places}
