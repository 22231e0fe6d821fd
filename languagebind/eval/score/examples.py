"""Pick the samples or queries with a model's best and worst results, for a person to look at."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from ..data.samples import Sample
from ..data.shards import Member

EXAMPLES = 12
# The last bits of features depend on the batch size and the number of ranks, but the order of examples must not
DIGITS = 5


def pick_examples(ranks: Tensor, scores: Tensor, describe: Callable[[int], dict[str, Any]]) -> dict:
    """Return at most EXAMPLES `best` queries (rank 1, highest score first) and `worst` queries (highest rank first).

    `ranks` and `scores` (Q,) belong to each query's best right item. `describe` returns the other facts of a query.
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
    """Return a sample's key, and the path or the place in a shard of each of its files."""
    sources: Sequence[Any] = sample.source if isinstance(sample.source, tuple) else (sample.source,)
    places = [asdict(x) | {"shard": str(x.shard)} if isinstance(x, Member) else str(x) for x in sources]
    return {"key": sample.key, "source": places}
