"""The page's examples, of the sample world: each with its own class and others."""

import pytest
from helpers import ROOT

import languagebind
from languagebind.data.world.make import render_examples
from languagebind.data.world.scenes import CLASS_ATTRIBUTES, draw_scenes, seen_pairs
from languagebind.data.world.words import class_name
from languagebind.modalities import modality_class

MODALITIES = sorted(CLASS_ATTRIBUTES)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return render_examples(tmp_path_factory.mktemp("examples"), [*MODALITIES, "image"])


def test_each_example_has_its_class_among_seven_others_that_training_showed(examples):
    assert sorted(examples) == MODALITIES
    for name, own in examples.items():
        assert len(own) == 8
        texts = {path.stem for path in own}
        assert len(texts) == 8
        assert texts < {class_name(name, pair) for pair in seen_pairs(name)}
        assert len({path.read_bytes() for path in own}) == 8


def test_examples_are_files_of_their_modality_and_of_scenes_in_no_split(examples):
    for name, own in examples.items():
        modality = modality_class(name)()
        assert all(modality.preprocess(path).shape == modality.input_shape for path in own)
    splits = {scene.seed for split in ("train", "test", "unseen") for scene in draw_scenes(split, 2000, seed=0)}
    assert splits.isdisjoint(scene.seed for scene in draw_scenes("examples", 500, seed=0))


@pytest.mark.slow
def test_the_demos_models_find_the_classes_of_nine_examples_in_ten(examples):
    runs = [ROOT / "logs" / "demo" / name for name in MODALITIES]
    if not all((run / "checkpoints").is_dir() for run in runs):
        pytest.skip("there are no runs of the demo in logs/demo: bash scripts/demo.sh")
    model, right = languagebind.load(*runs), {}
    for name, own in examples.items():
        texts = model.encode(text=[path.stem for path in own], of=name)
        best = (model.encode(**{name: own}) @ texts.T).argmax(dim=1).tolist()
        right[name] = sum(row == k for row, k in enumerate(best))
    print(right)
    assert sum(right.values()) >= 0.9 * 8 * len(examples), right
