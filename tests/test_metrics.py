"""Metrics: hand-worked matrices, and brute force or scikit-learn on random ones full of ties."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import retrieval_metrics
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from languagebind.eval.score.metrics import (
    best_thresholds,
    calibration,
    chance_at,
    chance_of_precision,
    classification_metrics,
    multilabel_metrics,
    precisions_and_areas,
    rank_metrics,
    rank_pairs,
)

PROBLEMS = 200  # random ones, for each comparison with brute force

# Ranks of the diagonal, by hand: 1; 2 (one above); 2 (one tie); 4 (all above).
SCORES = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.8, 0.5, 0.1, 0.0], [0.1, 0.7, 0.7, 0.2], [0.4, 0.3, 0.2, 0.1]])
DIAGONAL = torch.eye(4, dtype=torch.bool)


def ranks(scores, relevant):
    return rank_pairs(scores, *relevant.nonzero(as_tuple=True)).ranks.tolist()


def test_retrieval_by_hand():
    metrics = retrieval_metrics(SCORES, DIAGONAL)
    assert metrics == {"R@1": 0.25, "R@5": 1.0, "R@10": 1.0, "median_rank": 2.0, "mean_rank": 2.25}


def test_retrieval_with_several_relevant_items_takes_the_best():
    relevant = DIAGONAL.clone()
    relevant[3, 0] = True  # the fourth query's best relevant item is now its first
    assert ranks(SCORES, relevant) == [1, 2, 2, 1]


def test_relevant_items_that_tie_with_each_other_do_not_count_against_themselves():
    assert ranks(torch.zeros(1, 3), torch.tensor([[True, True, False]])) == [2]
    assert ranks(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)) == [1]


def test_a_collapsed_model_scores_nothing():
    metrics = retrieval_metrics(torch.zeros(20, 20), torch.eye(20, dtype=torch.bool))
    assert metrics["R@10"] == 0.0
    assert metrics["median_rank"] == 20.0
    assert classification_metrics(torch.zeros(20, 10), torch.arange(20) % 10)["top5"] == 0.0


def test_median_rank_is_the_mean_of_the_two_middle_ranks():
    assert rank_metrics(torch.tensor([5, 1, 2, 9]))["median_rank"] == 3.5
    assert rank_metrics(torch.tensor([5, 1, 2]))["median_rank"] == 2.0


def worst_rank(scores, right):
    """In the worst order that the scores allow: among equals, the wrong ones come first."""
    order = sorted(range(len(scores)), key=lambda g: (-scores[g], right[g]))
    return 1 + next(place for place, g in enumerate(order) if right[g])


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_retrieval_matches_brute_force_with_ties_and_several_positives(seed):
    generator = np.random.default_rng(seed)
    queries, gallery = generator.integers(1, 18), generator.integers(1, 24)
    scores = generator.integers(0, 6, (queries, gallery)).astype(np.float32)
    relevant = generator.random((queries, gallery)) < 0.15
    relevant[np.arange(queries), generator.integers(0, gallery, queries)] = True
    ranks = [worst_rank(row, good) for row, good in zip(scores, relevant, strict=True)]
    metrics = retrieval_metrics(torch.tensor(scores), torch.tensor(relevant))
    for k in (1, 5, 10):
        assert metrics[f"R@{k}"] == pytest.approx(np.mean(np.array(ranks) <= k))
    assert metrics["median_rank"] == np.median(ranks)
    assert metrics["mean_rank"] == pytest.approx(np.mean(ranks))
    # The pairs may come in any order.
    pairs = torch.tensor(relevant).nonzero()
    ranked = rank_pairs(torch.tensor(scores), *pairs[torch.from_numpy(generator.permutation(len(pairs)))].T)
    best = [row[good].max() for row, good in zip(scores, relevant, strict=True)]
    tied = [(row[~good] == top).any() for row, good, top in zip(scores, relevant, best, strict=True)]
    assert (ranked.ranks.tolist(), ranked.best.tolist(), ranked.tied.tolist()) == (ranks, best, tied)


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_classification_matches_brute_force_with_ties_and_empty_classes(seed):
    generator = np.random.default_rng(seed)
    samples, classes = generator.integers(1, 30), generator.integers(1, 12)
    logits = generator.integers(0, 5, (samples, classes)).astype(np.float32)
    labels = generator.integers(0, classes, samples)
    ranks = np.array([worst_rank(logits[i], np.arange(classes) == labels[i]) for i in range(samples)])
    metrics = classification_metrics(torch.tensor(logits), torch.tensor(labels))
    assert metrics["top1"] == pytest.approx(np.mean(ranks == 1))
    assert metrics.get("top5") == (pytest.approx(np.mean(ranks <= 5)) if classes >= 5 else None)
    assert metrics["mean_per_class"] == pytest.approx(np.mean([np.mean(ranks[labels == k] == 1) for k in set(labels)]))


def test_classification_by_hand():
    logits = torch.tensor([[3.0, 1, 2, 0], [3, 1, 2, 0], [0, 5, 5, 1], [0, 9, 1, 1]])
    metrics = classification_metrics(logits, torch.tensor([0, 2, 1, 1]))
    # Right, wrong, a tie (wrong), right; class 0 1/1, class 1 1/2, class 2 0/1, class 3 does not occur.
    assert metrics == {"top1": 0.5, "mean_per_class": 0.5}


def test_top5_appears_with_five_classes_and_matches_topk_without_ties():
    logits = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 12
    metrics = classification_metrics(logits, labels)
    assert metrics["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert metrics["top5"] == pytest.approx((logits.topk(5).indices == labels[:, None]).any(1).double().mean().item())
    per_class = [(logits[labels == k].argmax(1) == k).double().mean().item() for k in range(12)]
    assert metrics["mean_per_class"] == pytest.approx(np.mean(per_class))


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_multilabel_matches_scikit_learn_with_ties_and_empty_classes(seed):
    generator = np.random.default_rng(seed)
    samples, classes = generator.integers(5, 40), generator.integers(3, 7)
    levels = (3, 1000)[seed % 2]
    scores = (generator.integers(0, levels, (samples, classes)) / levels).astype(np.float32)
    targets = generator.random((samples, classes)) < 0.2
    targets[:, 0] = False  # left out
    targets[:, 1] = True  # no AUC
    targets[:2, 2] = (True, False)  # both
    metrics = multilabel_metrics(torch.tensor(scores), torch.tensor(targets))
    with_ap = [k for k in range(classes) if targets[:, k].any()]
    expected = [average_precision_score(targets[:, k], scores[:, k]) for k in with_ap]
    assert metrics["mAP"] == pytest.approx(np.mean(expected), abs=1e-6)
    area = np.mean([roc_auc_score(targets[:, k], scores[:, k]) for k in with_ap if not targets[:, k].all()])
    assert metrics["mAUC"] == pytest.approx(area, abs=1e-6)
    from scipy.stats import norm

    expected = math.sqrt(2) * norm.ppf(area)
    assert metrics["d_prime"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_weights_are_how_often_a_sample_occurs(seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 8, 20).astype(np.float32)
    targets = generator.random(20) < 0.3
    weights = generator.integers(0, 3, (20, 4))
    found = precisions_and_areas(
        torch.tensor(scores)[:, None], torch.tensor(targets)[:, None], torch.tensor(weights, dtype=torch.float32)
    )
    precisions, areas = (values[0].tolist() for values in found)
    for times, precision, area in zip(weights.T, precisions, areas, strict=True):
        drawn_targets, drawn_scores = np.repeat(targets, times), np.repeat(scores, times)
        if not drawn_targets.any():
            assert math.isnan(precision)
            continue
        assert precision == pytest.approx(average_precision_score(drawn_targets, drawn_scores))
        expected = math.nan if drawn_targets.all() else roc_auc_score(drawn_targets, drawn_scores)
        assert area == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_best_thresholds_match_brute_force(seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 9, (15, 3)).astype(np.float32)
    targets = generator.random((15, 3)) < 0.3
    for k, found in enumerate(best_thresholds(torch.tensor(scores), torch.tensor(targets))):
        if not targets[:, k].any():
            assert found is None
            continue
        f1 = {x: f1_score(targets[:, k], scores[:, k] >= x) for x in sorted(set(scores[:, k].tolist()), reverse=True)}
        best = max(f1.values())
        assert found == next(x for x in f1 if f1[x] >= best - 1e-12)


def test_calibration_by_hand_and_by_brute_force():
    # Confidences 0.75 (right and wrong) and 0.9 (right).
    logits = torch.tensor([[3.0, 1], [1, 3], [9, 1]]).log()
    found = calibration(logits, torch.tensor([True, False, True]), bins=10)
    assert found["ece"] == pytest.approx((0.25 * 2 + 0.1) / 3)
    assert found["bins"] == [pytest.approx([0.75, 0.5, 2]), pytest.approx([0.9, 1, 1])]
    generator = np.random.default_rng(0)
    logits, right = generator.normal(0, 2, (500, 7)), generator.random(500) < 0.5
    confidence = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(1)
    within = [(confidence >= b / 15) & (confidence < (b + 1) / 15) for b in range(15)]
    expected = sum(abs(confidence[w].mean() - right[w].mean()) * w.mean() for w in within if w.any())
    found = calibration(torch.tensor(logits), torch.tensor(right))
    assert found["ece"] == pytest.approx(expected)
    assert sum(count for *_, count in found["bins"]) == 500
    assert calibration(torch.tensor([[1e4, 0.0]]), torch.tensor([True])) == {"ece": 0.0, "bins": [[1.0, 1.0, 1]]}


def test_multilabel_extremes():
    perfect = multilabel_metrics(torch.tensor([[1.0], [0.0]]), torch.tensor([[1], [0]]))
    assert perfect == {"mAP": 1.0, "mAUC": 1.0, "d_prime": math.inf}
    assert multilabel_metrics(torch.tensor([[1.0], [0.0]]), torch.tensor([[1], [1]])) == {"mAP": 1.0}
    with pytest.raises(ValueError, match="no class has a positive"):
        multilabel_metrics(torch.zeros(2, 2), torch.zeros(2, 2))


def test_what_is_no_number_is_an_error():
    scores = SCORES.clone()
    scores[2, 1] = math.nan
    for call in (
        lambda: classification_metrics(scores, torch.arange(4)),
        lambda: multilabel_metrics(scores, DIAGONAL),
    ):
        with pytest.raises(ValueError, match="NaN, first at row 2, column 1"):
            call()


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match=r"scores \(4, 4\) and mask \(4, 3\)"):
        multilabel_metrics(SCORES, DIAGONAL[:, :3])
    for labels in ([0, 1, 2, 4], [0, 1, 2, -1], [0, 1, 2], []):
        with pytest.raises(ValueError, match=r"logits .* need as many labels, from 0 to 3"):
            classification_metrics(SCORES, torch.tensor(labels, dtype=torch.long))


def test_chance_is_that_of_a_random_order():
    assert chance_at(1, 1000, [1]) == pytest.approx(0.001)
    assert chance_at(10, 5, [1]) == 1.0
    generator = np.random.default_rng(0)
    hits = [generator.permutation(12)[:3].min() < 5 for _ in range(20_000)]  # 3 of 12 relevant, any in the first five
    assert chance_at(5, 12, [3]) == pytest.approx(np.mean(hits), abs=0.01)


def test_chance_of_precision_is_that_of_every_order():
    targets = np.zeros((6, 4), dtype=bool)
    targets[:1, 0] = targets[:2, 1] = targets[:, 2] = True  # the last class has no sample
    orders = np.array(list(itertools.permutations(range(6))), dtype=float)
    mean = [np.mean([average_precision_score(targets[:, k], scores) for scores in orders]) for k in range(3)]
    assert chance_of_precision(torch.tensor([1, 2, 6, 0]), 6) == pytest.approx(np.mean(mean))
    assert np.mean(mean) > 1.2 * np.mean([1 / 6, 2 / 6, 1]), "the share of the samples is not enough"
    assert chance_of_precision(torch.tensor([1]), 1) == 1
