"""Retrieval in both directions: from captions to samples, and from samples to captions.

By default, a caption is relevant to its own sample only. If two samples share a caption, each copy counts as wrong for
the other sample. No model can tell such copies apart, so the protocol records their number and the highest possible
recall.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, eye_array
from torch import Tensor
from torch.nn import functional as F

from ...temporal import PairHead
from ..data.datasets import DIRECTIONS, RECALL_AT
from ..data.samples import Sample
from .examples import media, pick_examples
from .metrics import Ranked, chance_at, rank_metrics, rank_pairs
from .statistics import rank_intervals

RERANKED = 100  # a model that scores pairs ranks this many items again, the best for a query by cosine
PAIRS_AT_A_TIME = 1024
SCORES_AT_A_TIME = 2**24  # 64 MiB of scores, so that memory does not grow with the gallery


@dataclass(frozen=True)
class Captioned:
    """Features of samples and of their captions on one device, with unit norm for cosine similarity."""

    features: Tensor  # (N, D) of the samples
    text_features: Tensor  # (U, D) of the distinct captions
    rows: Tensor  # (Q,) row of each caption in `text_features`
    owners: Tensor  # (Q,) sample of each caption; every sample has a caption
    twins: bool = False  # a caption is relevant to every sample that has it
    by_sample: bool = False  # a sample's captions are one item of the gallery, with the score of the best
    pairs: PairHead | None = None  # scores pairs of `text_features` (U, D) and `features` (N, T * D), which are raw

    def __post_init__(self):
        if not (self.features.isfinite().all() and self.text_features.isfinite().all()):
            raise ValueError("the features hold NaN or infinity")  # their products would be NaN and rank first

    def direction(self, name: str) -> "Direction":
        """Return the queries and the gallery of a direction in `DIRECTIONS`."""
        rows, features = self.rows, self.features
        captions, owners = np.arange(len(rows)), self.owners.cpu().numpy()
        text = rows.cpu().numpy() if self.twins else captions  # of each caption; by default, each has its own
        of_captions, of_samples = (csr_array((text >= 0, (text, items))) for items in (captions, owners))
        if name == "text_to_modality":
            return Direction(self._of_samples, len(rows), len(features), of_captions.T.tocsr(), of_samples, rows.device)
        if self.by_sample:
            each = eye_array(len(features), format="csr", dtype=bool)
            return Direction(self._of_best_captions, len(features), len(features), each, each, rows.device)
        return Direction(self._of_captions, len(features), len(rows), of_samples.T.tocsr(), of_captions, rows.device)

    def scores(self, queries: Tensor, gallery: Tensor, from_text: bool = True) -> Tensor:
        """Return the scores (q, g) of features of texts with those of samples, or the other way round."""
        if self.pairs is None:
            return queries @ gallery.T
        return rerank(self.pairs, queries, gallery, 1) if from_text else rerank(self.pairs, gallery, queries, 0).T

    def _of_samples(self, queries: Tensor) -> Tensor:
        return self.scores(self.text_features[self.rows[queries]], self.features)

    def _of_captions(self, queries: Tensor) -> Tensor:
        # Scores of equal captions are copied, so that they tie exactly
        return self.scores(self.features[queries], self.text_features, from_text=False)[:, self.rows]

    def _of_best_captions(self, queries: Tensor) -> Tensor:
        best = self.features.new_full((len(queries), len(self.features)), -torch.inf)
        return best.scatter_reduce(1, self.owners.expand(len(queries), -1), self._of_captions(queries), "amax")


@torch.no_grad()
def rerank(head: PairHead, texts: Tensor, frames: Tensor, dim: int) -> Tensor:
    """Return scores (U, N): of pairs for the best along `dim` by cosine, and below these the cosines of the others.

    `texts` are raw features (U, D), and `frames` those of frames (N, T * D), of which zeros are padding.
    """
    clips = frames.unflatten(1, (-1, texts.shape[1]))
    mask = clips.ne(0).any(dim=2)
    scores = F.normalize(texts, dim=1) @ F.normalize(head(clips, mask), dim=1).T
    best = scores.topk(min(RERANKED, scores.shape[dim]), dim=dim).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, best, True).nonzero()
    found = [head.pairs(texts[t], clips[n], mask[n]) for t, n in map(torch.t, chosen.split(PAIRS_AT_A_TIME))]
    pairs = torch.cat(found).float()
    scores[chosen[:, 0], chosen[:, 1]] = pairs - pairs.min() + 2  # above every cosine
    return scores


@dataclass(frozen=True)
class Direction:
    """The queries and the gallery of one direction, scored in blocks of queries."""

    scores: Callable[[Tensor], Tensor]  # (q,) queries -> (q, G) similarities
    num_queries: int
    gallery: int
    queries: csr_array  # (Q, T): the texts of each query
    items: csr_array  # (T, G): the gallery items of each text, which are relevant to its queries
    device: torch.device

    def ranks(self, adjust: Callable[[Tensor], Tensor] | None = None) -> Ranked:
        """Return the ranks of all queries, on the CPU. `adjust` maps similarities (q, G) to other scores."""
        # Allocated first: small results between large freed blocks would fragment the memory
        found = Ranked(*(torch.empty(self.num_queries, dtype=kind) for kind in (torch.long, torch.bool, torch.float)))
        for block in self.blocks():
            scores = self.scores(block)
            ranked = rank_pairs(scores if adjust is None else adjust(scores), *self.pairs(block))
            for values, new in zip(found, ranked, strict=True):
                values[block[0] : block[-1] + 1] = new
        return found

    def ranks_of_dual_softmax(self, logit_scale: Tensor) -> Ranked:
        """Return the ranks by the product of two softmaxes of the logits, over gallery and over queries (CAMoE, 2021).

        The softmax over queries favours items that no other query matches as well. It needs all queries at once, so the
        metrics say nothing about a search with one query and must not be compared with those of the plain cosine.
        """
        scale = logit_scale.detach().float().exp()
        over_queries = torch.full((self.gallery,), -torch.inf, device=self.device)
        for block in self.blocks():
            over_queries = torch.logaddexp(over_queries, (scale * self.scores(block)).logsumexp(dim=0))
        # In log space. The denominator of the softmax over the gallery is left out: it is the same for all items
        return self.ranks(lambda scores: scores.mul_(2 * scale).sub_(over_queries))

    def pairs(self, queries: Tensor) -> Tensor:
        """Return the relevant pairs of some queries, (2, P): the place in `queries`, and the gallery item."""
        found = (self.queries[queries.tolist()] @ self.items).nonzero()
        return torch.from_numpy(np.stack(found)).long().to(queries.device)

    def blocks(self) -> Sequence[Tensor]:
        """Return the queries in order, as many at a time as SCORES_AT_A_TIME allows."""
        queries = torch.arange(self.num_queries, device=self.device)
        return queries.split(max(1, SCORES_AT_A_TIME // self.gallery))


def retrieve(captioned: Captioned, dual_softmax: Tensor | None = None) -> tuple[dict[str, Any], dict[str, Ranked]]:
    """Return the metrics and protocol of retrieval in both directions, and the ranks per direction.

    For a sample with several captions, the best-ranked caption counts. If `dual_softmax`, a logit scale in log space,
    is given, the metrics of the dual softmax are added.
    """
    directions = {name: captioned.direction(name) for name in DIRECTIONS}
    ranked = {name: direction.ranks() for name, direction in directions.items()}
    if dual_softmax is not None:
        ranked |= {f"dual_softmax/{name}": d.ranks_of_dual_softmax(dual_softmax) for name, d in directions.items()}
    metrics = {f"{name}/{key}": x for name, found in ranked.items() for key, x in rank_metrics(found.ranks).items()}
    rows, owners = captioned.rows.tolist(), captioned.owners.tolist()
    counts = Counter(owners).values()
    chance: dict[str, float] = {}
    for name, direction in directions.items():
        positives = (direction.queries @ np.diff(direction.items.indptr)).tolist()
        chance |= {f"{name}/R@{k}": chance_at(k, direction.gallery, positives) for k in RECALL_AT}
    having = "every sample that has it" if captioned.twins else "its own sample alone"
    protocol: dict[str, Any] = {
        "captions": len(rows),
        "captions_per_sample": [min(counts), max(counts)],
        **recall_bounds(rows, owners, captioned.twins, captioned.by_sample),
        "relevance": f"a caption is relevant to {having}",
        "chance": chance,
    }
    if dual_softmax is not None:
        protocol["dual_softmax"] = "softmax over the gallery times softmax over all queries, at the model's logit scale"
        protocol["chance"] |= {f"dual_softmax/{key}": value for key, value in protocol["chance"].items()}
    return {"metrics": metrics, "protocol": protocol}, ranked


def recall_bounds(captions: Sequence[int], owners: Sequence[int], twins: bool, by_sample: bool) -> dict[str, Any]:
    """Return the number of captions that several samples have, and the highest possible recalls if these bound it."""
    copies: dict[Any, Counter[int]] = defaultdict(Counter)  # how often each sample has a caption
    for caption, owner in zip(captions, owners, strict=True):
        copies[caption][owner] += 1
    # The copies of a text rank the samples alike, and for a sample, they all tie
    foreign = dict.fromkeys(owners, len(captions))
    for caption, owner in zip(captions, owners, strict=True):
        others = len(copies[caption]) - 1 if by_sample else copies[caption].total() - copies[caption][owner]
        foreign[owner] = min(foreign[owner], others)
    ceiling = {}
    for k in RECALL_AT:
        hits = sum(count for having in copies.values() for _, count in having.most_common(k))
        ceiling[f"text_to_modality/R@{k}"] = hits / len(captions)
        ceiling[f"modality_to_text/R@{k}"] = sum(others < k for others in foreign.values()) / len(foreign)
    shared = sum(len(copies[caption]) > 1 for caption in captions)
    return {"captions_of_several_samples": shared} | ({"ceiling": ceiling} if shared and not twins else {})


def describe_retrieval(
    captioned: Captioned, ranked: dict[str, Ranked], samples: Sequence[Sample], captions: Sequence[str]
) -> dict[str, Any]:
    """Return the intervals, ties, recall curves and examples of `retrieve`. The examples have captions as queries."""
    samples_of = {"text_to_modality": captioned.owners.cpu(), "modality_to_text": torch.arange(len(samples))}
    intervals = {
        f"{name}/{key}": interval
        for name, found in ranked.items()
        for way in [name.removeprefix("dual_softmax/")]
        for key, interval in rank_intervals(found.ranks, samples_of[way], captioned.direction(way).gallery).items()
    }
    direction, found = captioned.direction("text_to_modality"), ranked["text_to_modality"]

    def describe(query: int) -> dict[str, Any]:
        owner = first = int(captioned.owners[query])
        if found.ranks[query] > 1:
            scores = direction.scores(torch.tensor([query], device=captioned.owners.device))[0]
            scores[direction.pairs(torch.tensor([query], device=scores.device))[1]] = -torch.inf
            first = int(scores.argmax())
        return media(samples[owner]) | {"text": captions[query], "found": samples[first].key}

    return {
        "intervals": intervals,
        "ties": sum(int(ranked[name].tied.sum()) for name in DIRECTIONS),
        "curves": {name: _curve(ranked[name].ranks, captioned.direction(name).gallery) for name in DIRECTIONS},
        "examples": pick_examples(found.ranks, found.best, describe),
    }


def _curve(ranks: Tensor, gallery: int) -> list[list[float]]:
    """Return pairs [k, recall] for k = 1, 2, 3, 5, 10, 20, 50, 100, ... and k = the size of the gallery."""
    steps = {1, 2, 3, 5, gallery} | {digit * 10**power for power in range(1, 12) for digit in (1, 2, 5)}
    return [[k, (ranks <= k).double().mean().item()] for k in sorted(steps) if k <= gallery]
