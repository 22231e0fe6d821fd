"""Linear probes: the choice of the penalty, shots, and the command on real files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, write_shards
from PIL import Image
from sklearn.linear_model import LogisticRegression

from languagebind.config import UserError, to_dict
from languagebind.eval.probe import main
from languagebind.eval.score import linear
from languagebind.eval.score.linear import Labelled, choose_c, probe
from languagebind.modalities.depth import Depth
from languagebind.model import DualEncoder, EncoderConfig, InitConfig, ModelConfig, TextConfig
from languagebind.text import build_text

CLASSES = 3


def clouds(count, seed, spread=0.6, classes=CLASSES):
    """Unit vectors around one direction a class, `count` of each."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(classes), count)
    points = np.eye(6)[labels] + spread * rng.normal(size=(len(labels), 6))
    return Labelled(points / np.linalg.norm(points, axis=1, keepdims=True), labels)


def test_separable_features_are_separated_and_shots_help():
    found, details = probe(clouds(30, 0), clouds(60, 1), CLASSES, shots=(1, 16), seeds=2)
    metrics = found["metrics"]
    one, many = metrics["shots_1/top1_mean"], metrics["shots_16/top1_mean"]
    assert 0.4 < one < many <= metrics["full/top1_mean"] + 0.03
    low, high = details["intervals"]["top1"]
    assert low <= metrics["top1"] <= high
    assert low > 1 / CLASSES
    assert set(details["intervals"]) == {"top1", "mean_per_class"}
    assert found["protocol"]["chance"] == {"top1": 1 / CLASSES, "mean_per_class": 1 / CLASSES}
    assert metrics["shots_1/top1_std"] > 0
    assert probe(clouds(30, 0), clouds(60, 1), CLASSES, shots=(1, 16), seeds=2) == (found, details), "the same bits"
    alone, _ = probe(clouds(30, 0), clouds(60, 1), CLASSES, shots=(1,), seeds=1)
    assert alone["metrics"]["shots_1/top1_std"] == 0
    clear, _ = probe(clouds(20, 0, 0.05), clouds(20, 1, 0.05), CLASSES, shots=(2,), seeds=1)
    assert clear["metrics"]["top1"] == clear["metrics"]["shots_2/top1_mean"] == 1


def test_features_that_say_nothing_give_chance():
    rng = np.random.default_rng(0)
    train, test = (Labelled(rng.normal(size=(300, 6)), rng.integers(3, size=300)) for _ in range(2))
    found, details = probe(train, test, CLASSES, seeds=1)
    assert details["intervals"]["top1"][0] < 1 / 3 < details["intervals"]["top1"][1]
    assert found["metrics"]["top1"] < 0.45


def test_c_is_as_good_on_the_held_out_part_as_any_of_the_whole_grid():
    data = clouds(60, 3, 0.9)
    fit, held_out = np.arange(90), np.arange(90, 180)

    def score(c):
        model = LogisticRegression(C=c, max_iter=1000).fit(data.features[fit], data.labels[fit])
        return model.score(data.features[held_out], data.labels[held_out])

    chosen = choose_c(data, fit, held_out)
    assert score(chosen) >= max(score(10**power) for power in (-6, -4, -2, 0, 2, 4, 6))
    assert score(chosen) > score(1e-6)
    assert abs(np.log10(chosen) * 8 - round(np.log10(chosen) * 8)) < 1e-3, "eight steps a decade"


@pytest.mark.parametrize(("shots", "expected"), [(None, (8, 2)), (1, (1, 1)), (6, (6, 4))])
def test_the_split_is_by_class_and_its_parts_are_disjoint(shots, expected):
    labels = np.repeat(np.arange(4), 10)
    fit, held_out = linear._split(labels, shots, np.random.default_rng(0))
    assert not set(fit) & set(held_out)
    assert [np.bincount(labels[part]).tolist() for part in (fit, held_out)] == [[n] * 4 for n in expected]
    other, _ = linear._split(labels, shots, np.random.default_rng(1))
    assert other.tolist() != fit.tolist()


def test_the_test_data_chooses_nothing(monkeypatch):
    """The probe with the chosen C, fitted to all the training data, is scikit-learn's; C does not see the test."""
    train, test = clouds(20, 0), clouds(20, 1)
    found, _ = probe(train, test, CLASSES, seeds=1)
    strength = found["protocol"]["C"]["full"][0]
    expected = LogisticRegression(C=strength, max_iter=1000).fit(train.features, train.labels)
    assert found["metrics"]["top1"] == expected.score(test.features, test.labels)
    shuffled = Labelled(test.features, np.roll(test.labels, 1))
    assert probe(train, shuffled, CLASSES, seeds=1)[0]["protocol"]["C"]["full"] == [strength]


def test_a_class_without_training_samples_is_always_wrong():
    found, _ = probe(clouds(20, 0, 0.1, 2), clouds(20, 1, 0.1, 3), 3, seeds=1)
    assert found["metrics"]["top1"] == pytest.approx(2 / 3)
    assert (found["protocol"]["classes"], found["protocol"]["classes_trained"]) == (3, 2)


def test_too_few_samples():
    with pytest.raises(UserError, match="class 0 has 4 training samples: 4 shots need at least one more"):
        probe(clouds(4, 0), clouds(4, 1), CLASSES, shots=(4,))
    with pytest.raises(ValueError, match="at least 2 classes"):  # scikit-learn's words
        probe(clouds(4, 0, classes=1), clouds(4, 1), CLASSES)
    with pytest.raises(ValueError, match="0 sample"):
        probe(clouds(1, 0), clouds(4, 1), CLASSES)


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def world(clip_folder, tmp_path_factory):
    """A checkpoint of random weights, class folders to train on and shards to test on: a near stripe in 4 columns."""
    root = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(1)
    for i in range(32):
        depth = np.full((72, 72), 9000, np.uint16)
        depth[:, i % 4 * 18 : (i % 4 + 1) * 18] = 1000 + rng.integers(500)
        (root / "train" / str(i % 4)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(depth).save(root / "train" / str(i % 4) / f"{i}.png")
    write_shards(root / "test", [12, 12])
    torch.manual_seed(0)
    modality = Depth(image_size=32)
    encoder = EncoderConfig(patch_size=16, width=16, depth=1, num_heads=2, mlp_dim=32)
    config = ModelConfig(encoder, TextConfig(f"local-dir:{clip_folder}"), init=InitConfig("none"))
    model = DualEncoder(modality.input_shape, encoder, build_text(config.text)).eval()
    saved = {"model": to_dict(config), "modality": "depth", "inputs": to_dict(modality)}
    fingerprint = model.text_fingerprint()
    torch.save({"model": model.encoder_state(), "config": saved, "text_fingerprint": fingerprint}, root / "depth.pt")
    (root / "stripes.yaml").write_text("task: classification\ndata: unused\n")
    return root


def flags(world, output, *more):
    return [f"--model={world / 'depth.pt'}", f"--config={world / 'stripes.yaml'}", f"--train={world / 'train'}",
            f"--test={world / 'test'}", f"--output={output}", "--workers=0", "--device=cpu", *more]  # fmt: skip


def test_command_line(world, tmp_path, capsys):
    main(flags(world, tmp_path, "--shots", "1", "4", "--seeds=2"))
    output = capsys.readouterr()
    assert "shots_4/top1_mean" in output.out
    assert "Warning" not in output.err
    (file,) = tmp_path.glob("*.json")
    assert file.name == "stripes_probe_depth.json"
    result = json.loads(file.read_text())
    keys = ["dataset", "model", "pretrained", "task", "metrics", "language", "protocol", "statistics", "intervals"]
    assert list(result) == [*keys, "checkpoint", "weights_sha256"]
    # Features of random weights tell four places of a stripe apart.
    assert result["metrics"]["top1"] > 0.5
    assert result["protocol"]["samples"] == 24
    assert result["protocol"]["train"]["samples"] == 32
    assert len(result["protocol"]["C"]["shots_4"]) == 2
    with pytest.raises(UserError, match="exists: --overwrite replaces it"):
        main(flags(world, tmp_path))


def test_features_are_kept_where_a_cache_is_asked_for(world, tmp_path):
    results = []
    for folder in ("first", "second"):
        main(flags(world, tmp_path / folder, "--seeds=1", f"--feature-cache={tmp_path / 'cache'}"))
        results.append((tmp_path / folder / "stripes_probe_depth.json").read_text())
        parts = sorted(file.name for file in tmp_path.glob("cache/stripes-*/*.features"))
        assert len(parts) == 2, "of the training data and of the test data, and none anew"
    assert results[0] == results[1]


def test_mistakes(world, tmp_path, capsys):
    same = [f"--test={world / 'train'}/../train"]
    for more, message in ((["--shots", "0"], "at least 1"), (same, "--train and --test are both")):
        with pytest.raises(SystemExit) as stop:
            main(flags(world, tmp_path / "out", *more))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    (tmp_path / "retrieval.yaml").write_text("task: retrieval\ndata: x\n")
    (tmp_path / "clip.yaml").write_text("task: classification\ndata: x\nclip: [0, 2]\n")
    for more, message in (
        ([f"--config={tmp_path / 'retrieval.yaml'}"], "a probe needs a dataset for classification, not retrieval"),
        (["--test=nowhere"], "nowhere does not exist"),
        ([f"--config={tmp_path / 'clip.yaml'}"], "for videos, not for depth"),
        (["--shots", "8", "--seeds=1"], r"train: class '\w+' has 8 training samples: 8 shots need at least one more"),
        ([f"--train={world / 'test'}", f"--test={world / 'train'}"], "class_names is needed"),
    ):
        with pytest.raises(UserError, match=message):
            main(flags(world, tmp_path / "out", *more))


def test_without_scikit_learn_the_extra_is_named(world, tmp_path):
    code = "import sys; sys.modules['sklearn'] = None; from languagebind.config import run; " + (
        "from languagebind.eval.probe import main; run(main)"
    )
    command = [sys.executable, "-c", code, *flags(world, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: a probe needs sklearn: pip install 'languagebind[eval]'" in done.stderr
