"""What a result holds beside its metrics: intervals, curves, examples; and the memory of a large retrieval."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from languagebind.config import UserError
from languagebind.eval import overlaps
from languagebind.eval.data.samples import Sample
from languagebind.eval.data.shards import Member
from languagebind.eval.results import ceiling_note, write_result
from languagebind.eval.score import statistics
from languagebind.eval.score.examples import EXAMPLES, pick_examples
from languagebind.eval.score.metrics import classification_metrics, multilabel_metrics, rank_metrics
from languagebind.eval.score.retrieval import Captioned, describe_retrieval, retrieve
from languagebind.eval.score.statistics import classification_intervals, multilabel_intervals, rank_intervals
from languagebind.eval.score.zero_shot import describe_classification, describe_multilabel

REPO = Path(__file__).parents[1]
SCALE = torch.tensor(2.0)


def resample(count):
    """What the intervals draw, one resample at a time."""
    generator = np.random.default_rng(statistics.SEED)
    return [generator.integers(count, size=count) for _ in range(statistics.RESAMPLES)]


def interval(values):
    """25 of 1000 are left out on each side."""
    return [sorted(values)[25], sorted(values)[-26]]


def test_intervals_of_ranks_are_percentiles_of_the_metrics_of_resamples(monkeypatch):
    ranks = torch.from_numpy(np.random.default_rng(1).geometric(0.2, 37))
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found = rank_intervals(ranks, torch.arange(37), 50)
    assert (torch.get_rng_state() == state[0]).all()
    assert np.random.get_state()[1].tolist() == state[1], "training must go on as if there had been no evaluation"
    drawn = [rank_metrics(ranks[torch.from_numpy(indices)]) for indices in resample(37)]
    assert found == {key: pytest.approx(interval([metrics[key] for metrics in drawn])) for key in drawn[0]}
    metrics = rank_metrics(ranks)
    assert all(low <= metrics[key] <= high for key, (low, high) in found.items())
    assert found["R@1"][0] < found["R@1"][1]
    monkeypatch.setattr(statistics, "DRAWS_AT_A_TIME", 50)  # one at a time changes the memory alone
    assert rank_intervals(ranks, torch.arange(37), 50) == found


def test_captions_of_a_sample_are_drawn_together(monkeypatch):
    generator = np.random.default_rng(1)
    ranks, samples = torch.from_numpy(generator.geometric(0.2, 37)), torch.arange(37) % 7
    found = rank_intervals(ranks, samples, 50)
    drawn = [torch.cat([ranks[samples == i] for i in indices]) for indices in resample(7)]
    drawn = [rank_metrics(each) for each in drawn]
    assert found == {key: pytest.approx(interval([metrics[key] for metrics in drawn])) for key in drawn[0]}
    # Ten captions of each of 40 samples, found or missed together: as wide as of 40 queries, not of 400
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    truth, covered, samples = 0.4, 0, torch.arange(40).repeat_interleave(10)
    for _ in range(200):
        low, high = rank_intervals(torch.from_numpy(2 - (generator.random(40) < truth))[samples], samples, 50)["R@1"]
        covered += low <= truth <= high
    assert 0.88 < covered / 200 < 0.99


def test_intervals_of_classification():
    generator = np.random.default_rng(0)
    logits, labels = torch.from_numpy(generator.normal(size=(60, 7))), torch.from_numpy(generator.integers(0, 6, 60))
    logits[torch.arange(60), labels] += 1
    ranks = 1 + (logits > logits.gather(1, labels[:, None])).sum(1)
    found = classification_intervals(ranks, labels, 7)
    drawn = [classification_metrics(logits[i], labels[i]) for i in map(torch.from_numpy, resample(60))]
    assert found["top1"] == pytest.approx(interval([metrics["top1"] for metrics in drawn]))
    assert found["top5"] == pytest.approx(interval([metrics["top5"] for metrics in drawn]))
    # Samples of each class among themselves, drawn plainly; the draws are others, so the interval is only near.
    within = []
    for _ in range(1000):
        places = [generator.choice(np.flatnonzero(labels.numpy() == k), int((labels == k).sum())) for k in range(6)]
        indices = torch.from_numpy(np.concatenate(places))
        within.append(classification_metrics(logits[indices], labels[indices])["mean_per_class"])
    assert found["mean_per_class"] == pytest.approx(interval(within), abs=0.02)
    assert "top5" not in classification_intervals(ranks, labels % 4, 4)


def test_shares_of_none_and_of_all_have_the_interval_of_clopper_and_pearson():
    from scipy.stats import binomtest

    for hits, count in ((0, 12), (12, 12), (1, 1)):
        ranks = torch.where(torch.arange(count) < hits, 1, 7)
        expected = list(binomtest(hits, count).proportion_ci(0.95, "exact"))
        assert rank_intervals(ranks, torch.arange(count), 9)["R@5"] == pytest.approx(expected)
        found = classification_intervals(ranks, torch.zeros(count, dtype=torch.long), 9)
        assert found["top5"] == pytest.approx(expected)
        assert "mean_per_class" not in found, "which never varies"
    # Three captions of each of four samples are four chances, not twelve
    found = rank_intervals(torch.ones(12, dtype=torch.long), torch.arange(4).repeat_interleave(3), 9)
    assert found["R@1"] == pytest.approx(list(binomtest(4, 4).proportion_ci(0.95, "exact")))
    # What is certain has no width
    assert found["R@10"] == [1, 1]
    assert classification_intervals(torch.ones(4), torch.arange(4), 5)["top5"] == [1, 1]


def test_intervals_of_multilabel_match_scikit_learn(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 40)
    generator = np.random.default_rng(0)
    scores, targets = generator.integers(0, 30, (50, 4)).astype(np.float32), generator.random((50, 4)) < 0.3
    targets[:, 3] = False
    found = multilabel_intervals(torch.from_numpy(scores), torch.from_numpy(targets))
    precisions, areas = [], []
    for i in resample(50):
        precisions.append(np.mean([average_precision_score(targets[i, k], scores[i, k]) for k in range(3)]))
        areas.append(np.mean([roc_auc_score(targets[i, k], scores[i, k]) for k in range(3)]))
    measured = np.mean([average_precision_score(targets[:, k], scores[:, k]) for k in range(3)])
    moved = sorted(precisions - np.mean(precisions) + measured)
    assert found["mAP"] == pytest.approx([moved[1], moved[-2]])
    assert found["mAUC"] == pytest.approx([sorted(areas)[1], sorted(areas)[-2]])
    assert set(found) == {"mAP", "mAUC", "d_prime"}
    # Every sample has the class, so that no resample has an area.
    assert set(multilabel_intervals(torch.rand(9, 1), torch.ones(9, 1, dtype=torch.bool))) == {"mAP"}


def test_intervals_cover_the_truth_about_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    generator = np.random.default_rng(0)
    truth, covered = 0.4, 0
    for _ in range(300):
        ranks = torch.from_numpy(2 - (generator.random(200) < truth))
        low, high = rank_intervals(ranks, torch.arange(200), 500)["R@1"]
        covered += low <= truth <= high
    assert 0.91 < covered / 300 < 0.98


def test_intervals_of_rare_classes_hold_the_value(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(1000, 80, generator=generator) < 0.01
    scores = torch.randn(1000, 80, generator=generator) + targets
    intervals, metrics = multilabel_intervals(scores, targets), multilabel_metrics(scores, targets)
    assert set(intervals) == {"mAP", "mAUC", "d_prime"}
    assert all(low < metrics[key] < high for key, (low, high) in intervals.items())
    # Another test set of the same size gives another value: 95 % of them lie in an interval as wide as this one.
    others = []
    for _ in range(100):
        targets = torch.rand(1000, 80, generator=generator) < 0.01
        others.append(multilabel_metrics(torch.randn(1000, 80, generator=generator) + targets, targets)["mAP"])
    assert np.diff(intervals["mAP"])[0] == pytest.approx(np.diff(np.quantile(others, (0.025, 0.975)))[0], rel=0.35)


def test_overlaps_name_what_is_not_decided(tmp_path):
    first = {"dataset": "a", "protocol": {"data_sha256": "x"}, "metrics": {"d_prime": float("inf")}}
    first["intervals"] = {"top1": [0.5, 0.6], "top5": [0.7, 0.8], "d_prime": [3.0, float("inf")], "old": [0, 1]}
    second = first | {"intervals": {"top1": [0.6, 0.7], "top5": [0.81, 0.9], "d_prime": [9.0, 10.0]}}
    assert overlaps(first, second) == overlaps(second, first) == ["top1", "d_prime"]
    write_result(first, tmp_path / "a.json")  # without infinities
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["intervals"]["d_prime"] == [3.0, None]
    assert overlaps(read, second) == ["top1", "d_prime"]
    assert overlaps({key: value for key, value in first.items() if key != "intervals"}, second) == []
    with pytest.raises(UserError, match="different data cannot be compared: data_sha256 is x and y"):
        overlaps(first, second | {"protocol": {"data_sha256": "y"}})
    # The same list, of which one model could not read all
    with pytest.raises(UserError, match="different data cannot be compared: samples is 9 and 10"):
        overlaps(*({"dataset": "a", "protocol": {"data_sha256": "x", "samples": count}} for count in (9, 10)))


# ---------------------------------------------------------------------------------------------- details


def files(count):
    return [Sample(f"{i}.png", Path(f"/data/{i}.png")) for i in range(count)]


def test_details_of_classification_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.2, 0.3, 0.1], [0.8, 0.1, 0.7]])
    targets = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]).bool()
    samples = [*files(3), Sample("s/3", (Member(Path("/a.tar"), "3.0.png", 512, 9), Path("/b.png")))]
    found = describe_classification(scores, targets, SCALE.exp() * scores, {"x": "ex", "y": "why", "z": "zed"}, samples)
    assert found["ties"] == 1
    assert found["confusion"] == [[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]]  # a tie is a mistake
    assert found["classes"][0] == {"label": "x", "name": "ex", "samples": 2, "top1": 0.5}
    assert found["classes"][2] == {"label": "z", "name": "zed", "samples": 0, "top1": None}
    confidence = (SCALE.exp() * scores).softmax(1).amax(1)
    expected = (confidence - torch.tensor([1.0, 0, 1, 0])).double()
    assert sum(count for *_, count in found["calibration"]["bins"]) == 4
    assert found["calibration"]["ece"] <= expected.abs().mean().item() + 1e-6
    best, worst = found["examples"]["best"], found["examples"]["worst"]
    assert [(x["key"], x["rank"]) for x in best] == [("0.png", 1), ("2.png", 1)]
    source = [{"shard": "/a.tar", "name": "3.0.png", "offset": 512, "size": 9}, "/b.png"]
    assert worst[0] == {"key": "s/3", "source": source, "text": "why", "found": "ex", "rank": 3, "score": 0.1}
    assert worst[1] == {
        "key": "1.png", "source": ["/data/1.png"], "text": "ex", "found": "why", "rank": 2, "score": 0.5
    }  # fmt: skip


def test_details_of_multilabel_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.6], [0.2, 0.3], [0.8, 0.8]])
    targets = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 1]]).bool()
    found = describe_multilabel(scores, targets, {"x": "ex", "y": "why"}, files(4))
    x, y = found["classes"]
    assert (x["samples"], x["AP"], x["AUC"]) == (2, pytest.approx((1 + 2 / 3) / 2), pytest.approx(3 / 4))
    assert (x["threshold"], y["threshold"]) == (pytest.approx(0.5), pytest.approx(0.8))
    assert found["ties"] == 1
    assert found["intervals"].keys() <= multilabel_metrics(scores, targets).keys()
    assert [(e["key"], e["text"], e["found"], e["rank"]) for e in found["examples"]["worst"]] == [
        ("1.png", "ex", "why", 2), ("3.png", "why", "ex", 2)
    ]  # fmt: skip
    assert [e["key"] for e in found["examples"]["best"]] == ["0.png"]  # the sample without a label is not among them


def test_examples_are_the_first_and_the_last():
    ranks, scores = torch.arange(100) // 30 + 1, torch.arange(100).float().roll(7)
    found = pick_examples(ranks, scores, lambda i: {"at": i})
    assert [example["at"] for example in found["best"]] == [*range(6, -1, -1), *range(29, 24, -1)]  # by score
    assert [example["rank"] for example in found["worst"]] == [4] * 10 + [3] * 2
    assert found["worst"][0] == {"at": 90, "rank": 4, "score": 83.0}
    everything_right = pick_examples(torch.ones(2), torch.zeros(2), lambda i: {})
    assert (len(everything_right["best"]), everything_right["worst"]) == (2, [])


# ---------------------------------------------------------------------------------------------- retrieval


def problem(seed):
    """Features of few distinct values, so that scores tie exactly; several captions a sample, some of them shared."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 9, (1,), generator=generator))
    features = torch.randint(-1, 2, (count, 3), generator=generator).float()
    text_features = torch.randint(-1, 2, (12, 3), generator=generator).float()
    owners = torch.cat([torch.arange(count), torch.randint(0, count, (count,), generator=generator)])
    owners = owners[torch.randperm(len(owners), generator=generator)]
    return Captioned(features, text_features, torch.randint(0, 12, owners.shape, generator=generator), owners)


def brute_force(scores, right):
    """Rank of each row's best right item, among equals the last."""
    ranks = []
    for row, good in zip(scores.tolist(), right.tolist(), strict=True):
        best = max(score for score, is_right in zip(row, good, strict=True) if is_right)
        wrong = [score for score, is_right in zip(row, good, strict=True) if not is_right]
        ranks.append(1 + sum(score >= best for score in wrong))
    return ranks


@pytest.mark.parametrize("seed", range(200))
def test_retrieval_both_ways_matches_brute_force_in_any_blocks(seed, monkeypatch):
    data = problem(seed)
    scores = data.text_features[data.rows] @ data.features.T  # (Q, N)
    right = data.owners[:, None] == torch.arange(len(data.features))
    logits = (SCALE.exp() * scores).double()
    dual = logits.softmax(dim=0) * logits.softmax(dim=1)
    for size in (2**24, 5):
        monkeypatch.setattr("languagebind.eval.score.retrieval.SCORES_AT_A_TIME", size)
        found, ranked = retrieve(data, SCALE)
        assert ranked["text_to_modality"].ranks.tolist() == brute_force(scores, right)
        assert ranked["modality_to_text"].ranks.tolist() == brute_force(scores.T, right.T)
        for name, logs, good in (("text_to_modality", dual.log(), right), ("modality_to_text", dual.log().T, right.T)):
            # Products that are equal on paper differ in the last bits.
            wins, ties = (brute_force(logs + sign * 1e-4 * good, good) for sign in (1, -1))
            ranks = ranked[f"dual_softmax/{name}"].ranks.tolist()
            assert all(low <= rank <= high for low, rank, high in zip(wins, ranks, ties, strict=True))
        assert found["metrics"]["text_to_modality/mean_rank"] == np.mean(brute_force(scores, right))
        assert found["protocol"]["chance"]["dual_softmax/text_to_modality/R@1"] == pytest.approx(1 / len(data.features))
    plain, _ = retrieve(data)
    assert plain["metrics"] == {key: x for key, x in found["metrics"].items() if not key.startswith("dual_softmax")}


def test_a_collapsed_model_scores_nothing_by_the_dual_softmax_either():
    features = torch.nn.functional.normalize(torch.linspace(-1, 2, 64)[None], dim=1).expand(37, -1)
    _, ranked = retrieve(Captioned(features, features, torch.zeros(37, dtype=torch.long), torch.arange(37)), SCALE * 2)
    assert all(found.ranks.tolist() == [37] * 37 for found in ranked.values())
    assert all(found.tied.all() for found in ranked.values())


def test_curves_and_examples_of_retrieval():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(30, 4, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(features + torch.randn(30, 4, generator=generator) / 2, dim=1)
    data = Captioned(features, texts, torch.arange(30), torch.arange(30))
    found, ranked = retrieve(data)
    details = describe_retrieval(data, ranked, files(30), [f"text {i}" for i in range(30)])
    curve = dict(details["curves"]["text_to_modality"])
    assert list(curve) == [1, 2, 3, 5, 10, 20, 30]
    for k in (1, 5, 10):
        assert curve[k] == found["metrics"][f"text_to_modality/R@{k}"]
    assert curve[30] == 1
    assert details["intervals"].keys() == found["metrics"].keys()
    scores = texts @ features.T
    for kind, examples in details["examples"].items():
        assert 0 < len(examples) <= EXAMPLES
        for example in examples:
            i = int(example["text"].split()[1])
            assert example["key"] == f"{i}.png"
            assert example["found"] == f"{int(scores[i].argmax())}.png"
            assert (example["found"] == example["key"]) == (example["rank"] == 1) == (kind == "best")
            assert example["score"] == pytest.approx(float(scores[i, i]), abs=1e-5)
    assert details["ties"] == 0


def test_features_that_are_no_numbers_are_refused():
    features, texts, one = torch.rand(2, 3), torch.full((1, 3), torch.nan), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="the features hold NaN or infinity"):
        Captioned(features, texts, one, torch.arange(2))
    with pytest.raises(ValueError, match="the features hold NaN or infinity"):
        Captioned(features * torch.nan, features, one, torch.arange(2))
    # inf - inf is NaN, which no score is above: an overflow would rank first
    with pytest.raises(ValueError, match="the features hold NaN or infinity"):
        Captioned(features * torch.inf, features, one, torch.arange(2))


GALLERY = """
import sys, torch
from languagebind.eval.score import retrieval
torch.set_num_threads(2)
queries = int(sys.argv[1])
features = torch.nn.functional.normalize(torch.randn(100_000, 64), dim=1)
data = retrieval.Captioned(features, features[:queries], torch.arange(queries), torch.arange(queries))
direction = data.direction("text_to_modality")
assert direction.ranks().ranks.max() == 1
direction.ranks_of_dual_softmax(torch.tensor(2.0))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_of_retrieval_does_not_grow_with_the_queries():
    """100,000 x 100,000 takes minutes on a CPU; beside the features it needs one block, however many there are.

    500 and 2,000 queries: 0.2 and 0.8 GB of scores, were they whole.
    """
    peaks = []
    for queries in ("500", "2000"):
        done = subprocess.run([sys.executable, "-c", GALLERY, queries], cwd=REPO, capture_output=True, check=True)
        peaks.append(int(done.stdout) / 1024)  # MiB
    assert peaks[1] < 1200  # of 2048, a good part of it PyTorch
    assert peaks[1] - peaks[0] < 150


@pytest.mark.parametrize("seed", range(40))
def test_captions_that_samples_share_are_right_for_all_of_them_if_asked(seed, monkeypatch):
    data = problem(seed)
    data = Captioned(data.features, data.text_features, data.rows % 5, data.owners, twins=True)
    scores = data.text_features[data.rows] @ data.features.T  # (Q, N)
    has = torch.zeros(12, len(data.features), dtype=torch.bool)
    has[data.rows, data.owners] = True
    right = has[data.rows]
    for size in (2**24, 5):
        monkeypatch.setattr("languagebind.eval.score.retrieval.SCORES_AT_A_TIME", size)
        found, ranked = retrieve(data)
        assert ranked["text_to_modality"].ranks.tolist() == brute_force(scores, right)
        assert ranked["modality_to_text"].ranks.tolist() == brute_force(scores.T, right.T)
        assert "ceiling" not in found["protocol"]
        for name, good in (("text_to_modality", right), ("modality_to_text", right.T)):
            expected = [1 - good.shape[1] ** -1 * (good.shape[1] - n) for n in good.sum(dim=1).tolist()]
            assert found["protocol"]["chance"][f"{name}/R@1"] == pytest.approx(np.mean(expected))


def test_the_highest_possible_recall_of_shared_captions():
    """30 samples of one caption each; six captions belong to two samples. A perfect model reaches the bounds."""
    texts = torch.nn.functional.normalize(torch.eye(24) + 0.01, dim=1)
    rows = torch.cat([torch.arange(24), torch.arange(6)])
    found, _ = retrieve(Captioned(texts[rows] + torch.linspace(0, 1e-3, 30)[:, None], texts, rows, torch.arange(30)))
    ceiling = found["protocol"]["ceiling"]
    assert ceiling["text_to_modality/R@1"] == found["metrics"]["text_to_modality/R@1"] == pytest.approx(24 / 30)
    assert ceiling["modality_to_text/R@1"] == found["metrics"]["modality_to_text/R@1"] == pytest.approx(18 / 30)
    assert ceiling["text_to_modality/R@5"] == ceiling["modality_to_text/R@5"] == 1
    shared = "12 of 30 captions belong to several samples: R@1 cannot exceed 0.80 / 0.60"
    assert ceiling_note(found["protocol"]).startswith(shared)
    apart, _ = retrieve(Captioned(texts, texts, torch.arange(24), torch.arange(24)))
    assert ceiling_note(apart["protocol"]) is None
    assert apart["protocol"]["captions_of_several_samples"] == 0


@pytest.mark.parametrize("seed", range(40))
def test_no_ranking_exceeds_the_highest_possible_recall(seed):
    data = problem(seed)
    data = Captioned(torch.randn(len(data.features), 3), torch.randn(12, 3), data.rows % 4, data.owners)
    found, _ = retrieve(data)
    for name, bound in found["protocol"].get("ceiling", {}).items():
        assert found["metrics"][name] <= bound + 1e-12
