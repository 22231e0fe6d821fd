"""A logistic regression (L-BFGS, L2) on the unit-norm features of one encoder, as in CLIP's paper (section A.3).

docs/evaluation_pairs.md describes how the inverse penalty C is chosen, for few shots as in CoOp (Zhou et al., 2022).
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config import UserError
from .metrics import chance_of_class, classification_metrics, rank_pairs
from .statistics import classification_intervals

log = logging.getLogger(__name__)

WIDEST = [1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6]
STEPS = (1.0, 0.5, 0.25, 0.125)  # decades
HELD_OUT = 0.2
HELD_OUT_SHOTS = 4
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Labelled:
    """Features (N, D), float64, and class indices (N,)."""

    features: np.ndarray
    labels: np.ndarray


def probe(
    train: Labelled, test: Labelled, num_classes: int, shots: Sequence[int] = (), seeds: int = 3
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit probes and return the metrics with the protocol, and the intervals.

    `top1`, `top5`, `mean_per_class` and their intervals belong to the probe on all the training data with the first
    seed. `full/...` and `shots_<k>/...` are the mean and the sample standard deviation (0 for one seed) over the seeds.
    Raises `UserError` if a class has too few samples for the shots.
    """
    check_shots(train.labels, shots, range(num_classes))  # again, as some samples may have been unreadable
    labels = torch.from_numpy(test.labels)
    metrics: dict[str, float] = {}
    found_c: dict[str, list[float]] = {}
    for name, count in [("full", None), *((f"shots_{k}", k) for k in shots)]:
        tops, found_c[name] = [], []
        for seed in range(seeds):
            fit, held_out = _split(train.labels, count, np.random.default_rng(seed))
            strength = choose_c(train, fit, held_out)
            everything = np.concatenate([fit, held_out]) if count is None else fit
            scores = _scores(train, np.sort(everything), strength, test.features, num_classes)
            found = classification_metrics(scores, labels)
            if not metrics:
                metrics, ranks = dict(found), rank_pairs(scores, torch.arange(len(labels)), labels).ranks
            tops.append(found["top1"])
            found_c[name].append(strength)
            log.info("%s, seed %d: C %.3g, top-1 %.4f", name, seed, strength, tops[-1])
        deviation = float(np.std(tops, ddof=1)) if seeds > 1 else 0.0
        metrics |= {f"{name}/top1_mean": float(np.mean(tops)), f"{name}/top1_std": deviation}
    protocol = {"C": found_c, "classes": num_classes, "classes_trained": len(np.unique(train.labels))}
    protocol["chance"] = chance_of_class(num_classes)
    intervals = classification_intervals(ranks, labels, num_classes)
    return {"metrics": metrics, "protocol": protocol}, {"intervals": intervals}


def check_shots(labels: np.ndarray, shots: Sequence[int], names: Sequence[Any]) -> None:
    """Raise `UserError` if a class has samples, but too few for the shots."""
    most = max(shots, default=0)
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if count <= most:
            found = f"class {names[label]} has {count} training samples"
            raise UserError(f"{found}: {most} shots need at least one more, to choose C")


def choose_c(train: Labelled, fit: np.ndarray, held_out: np.ndarray) -> float:
    """Return the C whose probe, fitted to the samples `fit`, scores best on the samples `held_out`."""

    @cache
    def score(c: float) -> float:
        return _fitted(train, fit, c).score(train.features[held_out], train.labels[held_out])

    tried = set(WIDEST)
    for step in STEPS:
        best = max(sorted(tried), key=score)
        near = [float(f"{best * 10**shift:.6g}") for shift in (-step, step)]
        tried |= {c for c in near if WIDEST[0] <= c <= WIDEST[-1]}
    return max(sorted(tried), key=score)  # of equals the smallest, as it gives the simplest probe


def _split(labels: np.ndarray, shots: int | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the samples to fit to and of the held-out samples, both in order."""
    fit, held_out = [], []
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        spare = max(1, round(HELD_OUT * len(own))) if len(own) > 1 else 0
        taken = len(own) - spare if shots is None else shots
        fit += own[:taken].tolist()
        held_out += own[taken : None if shots is None else taken + min(shots, HELD_OUT_SHOTS)].tolist()
    return np.sort(fit), np.sort(np.array(held_out, dtype=int))


def _fitted(train: Labelled, rows: np.ndarray, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # The first warning is expected with one shot. A C that needs more iterations is still judged by its score
        warnings.filterwarnings("ignore", "The number of unique classes is greater than", UserWarning)
        warnings.filterwarnings("ignore", "lbfgs failed to converge", UserWarning)
        estimator = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
        return estimator.fit(train.features[rows], train.labels[rows])


def _scores(train: Labelled, rows: np.ndarray, strength: float, features: np.ndarray, num_classes: int) -> Tensor:
    """Return log-probabilities (N, K), -inf for classes without training samples, so that their samples are wrong."""
    fitted = _fitted(train, rows, strength)
    if fitted.n_iter_.max() >= MAX_ITERATIONS:
        log.warning("the probe with C %.3g did not converge in %d iterations", strength, MAX_ITERATIONS)
    scores = torch.full((len(features), num_classes), -torch.inf, dtype=torch.float64)
    scores[:, torch.from_numpy(fitted.classes_)] = torch.from_numpy(fitted.predict_log_proba(features))
    return scores
