"""The page's examples: of the sample world, each with its own class and others; and those of a folder."""

import pytest
from helpers import ROOT

import languagebind
from languagebind.app.examples import Example, knows_world, read_examples, world_examples
from languagebind.config import UserError
from languagebind.data.world.scenes import CLASS_ATTRIBUTES, draw_scenes, seen_pairs
from languagebind.data.world.words import class_name
from languagebind.modalities import modality_class

MODALITIES = sorted(CLASS_ATTRIBUTES)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return world_examples(tmp_path_factory.mktemp("examples"), [*MODALITIES, "image"])


def test_each_example_has_its_class_among_seven_others_that_training_showed(examples):
    assert [example.modality for example in examples] == [name for name in MODALITIES for _ in range(8)]
    for example in examples:
        classes = {class_name(example.modality, pair) for pair in seen_pairs(example.modality)}
        assert len(set(example.texts)) == 8
        assert {example.path.stem} < set(example.texts) < classes
    assert len({example.path.read_bytes() for example in examples}) == len(examples)


def test_examples_are_files_of_their_modality_and_of_scenes_in_no_split(examples):
    for example in examples:
        modality = modality_class(example.modality)()
        assert modality.preprocess(example.path).shape == modality.input_shape
    splits = {scene.seed for split in ("train", "test", "unseen") for scene in draw_scenes(split, 2000, seed=0)}
    assert splits.isdisjoint(scene.seed for scene in draw_scenes("examples", 500, seed=0))


def test_examples_of_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"there are no examples: put files into .*depth or .*audio"):
        read_examples(tmp_path, ["depth", "audio"])
    (tmp_path / "depth" / "rooms").mkdir(parents=True)
    (tmp_path / "depth" / "rooms" / "hall.png").touch()
    (tmp_path / "depth" / "texts.txt").write_text("\na hall \r\na kitchen\n\n")
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "bell.wav").touch()
    assert read_examples(tmp_path, ["depth", "audio", "video"]) == [
        Example(tmp_path / "depth" / "rooms" / "hall.png", "depth", ("a hall", "a kitchen")),
        Example(tmp_path / "audio" / "bell.wav", "audio", ()),
    ]


def test_the_runs_that_trained_on_the_world_are_known(tmp_path):
    assert not knows_world(tmp_path)
    assert not knows_world("LanguageBind_Depth")
    for data, known in {"data/demo/world-2000-512-0-depth/shards/depth": True, "shards/depth": False}.items():
        (tmp_path / "config.yaml").write_text(f"data:\n  train_data: {data}\n")
        assert knows_world(tmp_path) is known


@pytest.mark.slow
def test_the_demos_models_find_the_classes_of_nine_examples_in_ten(examples):
    runs = [ROOT / "logs" / "demo" / name for name in MODALITIES]
    if not all((run / "checkpoints").is_dir() for run in runs):
        pytest.skip("there are no runs of the demo in logs/demo: bash scripts/demo.sh")
    model, right = languagebind.load(*runs), {}
    for name in MODALITIES:
        own = [example for example in examples if example.modality == name]
        features = model.encode(**{name: [example.path for example in own]})
        best = (features @ model.encode(text=own[0].texts, of=name).T).argmax(dim=1).tolist()
        right[name] = sum(example.texts[k] == example.path.stem for example, k in zip(own, best, strict=True))
    print(right)
    assert sum(right.values()) >= 0.9 * len(examples), right
