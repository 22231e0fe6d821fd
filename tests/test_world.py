"""The sample world: the same for one seed, honest splits, and files that show what the scenes say."""

import hashlib
import io
import json
import random
import re
import wave
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import call
from PIL import Image

from languagebind.config import UserError, load_yaml
from languagebind.data.vidal import CAPTION_SOURCES, NUM_FRAMES, choose_caption
from languagebind.data.world import render as _render
from languagebind.data.world import words as _words
from languagebind.data.world.make import WorldOptions, draw_splits, make_world
from languagebind.data.world.scenes import (
    CLASS_ATTRIBUTES,
    FOLDER,
    VALUES,
    Scene,
    draw_scenes,
    scene_files,
    seen_pairs,
    unseen_pairs,
)
from languagebind.modalities import modality_class

MODALITIES = tuple(CLASS_ATTRIBUTES)
SIZES = {"num_train": 40, "num_test": 24, "size": 64, "workers": 2}
SCENE = Scene(
    id="a", shape="cube", colour="red", size="large", material="plastic", distance="near", temperature="hot",
    motion="sideways", sound="whistle", rhythm="steady", loudness="loud",
    x=0.1, y=-0.1, metres=1.7, celsius=93.0, seed=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    call("-m", "languagebind.data.world", f"--output={root}", "--seed=3", *flags)
    return root


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Scene]]:
    return draw_splits(WorldOptions(Path(), num_train=2000, num_test=500, seed=1))


def hashes(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def test_a_seed_gives_the_same_bytes_and_another_seed_does_not(world, tmp_path):
    make_world(WorldOptions(tmp_path / "again", seed=3, **{**SIZES, "workers": 1}))
    assert hashes(tmp_path / "again") == hashes(world)
    make_world(WorldOptions(tmp_path / "other", seed=4, **{**SIZES, "num_train": 4, "num_test": 2}))
    other = hashes(tmp_path / "other").items()
    media = {digest for name, digest in other if Path(name).suffix in (".mp4", ".wav", ".png")}
    assert media.isdisjoint(hashes(world).values())


def test_some_modalities_are_what_they_are_among_all(world, tmp_path):
    make_world(WorldOptions(tmp_path, seed=3, **SIZES, modalities=("audio",)))
    some, everything = hashes(tmp_path), hashes(world)
    assert all(everything[name] == digest for name, digest in some.items())
    assert {Path(name).suffix for name in some} == {".json", ".jsonl", ".txt", ".yaml", ".wav"}


def test_the_layout_is_vidals(world):
    for split in ("train", "test", "unseen"):
        annotation = json.loads((world / split / "vidal.json").read_text())
        assert len(annotation) == {"train": 40, "test": 24, "unseen": 12}[split]
        for name, entry in annotation.items():
            assert set(entry) == {"folder", *CAPTION_SOURCES}
            assert len(entry["ofa"]) == NUM_FRAMES
            assert (world / split / f"{FOLDER}_resize256_skip15" / f"{name}.mp4").is_file()
            assert (world / split / FOLDER / f"{name}_depth_f8glpn_folder" / "7.png").is_file()


def test_no_scene_is_in_two_splits(splits):
    contents = {name: {scene.contents() for scene in scenes} for name, scenes in splits.items()}
    assert contents["train"].isdisjoint(contents["test"] | contents["unseen"])
    assert len({scene.id for scenes in splits.values() for scene in scenes}) == 2750


@pytest.mark.parametrize("modality", MODALITIES)
def test_unseen_pairs_are_never_trained_on_but_their_values_are(splits, modality):
    pairs = {name: Counter(scene.pair(modality) for scene in scenes) for name, scenes in splits.items()}
    assert set(pairs["train"]) == set(pairs["test"]) == set(seen_pairs(modality))
    assert set(pairs["unseen"]) == set(unseen_pairs(modality))
    assert len(seen_pairs(modality)) >= 24
    assert len(unseen_pairs(modality)) >= 6
    for position in range(2):
        assert {pair[position] for pair in unseen_pairs(modality)} <= {pair[position] for pair in seen_pairs(modality)}


def test_each_shape_can_have_a_sound_of_its_own():
    """The pictures stay as they are, and the held-out pairs of sounds as well."""
    usual, bound = draw_scenes("train", 500, 0), draw_scenes("train", 500, 0, own_sounds=True)
    assert len({scene.sound for scene in usual if scene.shape == "ball"}) == 8
    assert len({(scene.shape, scene.sound) for scene in bound}) == 8
    assert [replace(a, sound=b.sound, rhythm=b.rhythm) for a, b in zip(usual, bound, strict=True)] == bound
    assert {scene.pair("audio") for scene in bound} <= set(seen_pairs("audio"))


def test_no_word_of_the_reworded_prompts_is_in_any_caption(world):
    said = set()
    for scene in draw_scenes("train", 3000, 0):
        for value in _words.captions_for(scene, random.Random(scene.id)).values():
            said |= words(value if isinstance(value, str) else " ".join(value))
    assert {"ball", "a", "the", "in", "red", "whistle"} <= said
    prompts = (world / "eval/reworded_templates.txt").read_text().replace("{c}", " ")
    for modality in MODALITIES:
        lines = (world / f"eval/{modality}_reworded_classes.txt").read_text().splitlines()
        prompts += " ".join([" ", *(line.split("\t")[1] for line in lines)])
    assert words(prompts).isdisjoint(said), words(prompts) & said


def test_every_word_for_a_value_is_used_and_belongs_to_it():
    tables = (_words.NOUNS, _words.ADJECTIVES, _words.CLAUSES, _words.SOUND_NOUNS, _words.SOUND_ADJECTIVES)
    named = [value for table in tables for value in table]
    values = {value for options in VALUES.values() for value in options}
    assert values <= set(named)
    classes = {value for pair in CLASS_ATTRIBUTES.values() for name in pair for value in VALUES[name]}
    assert classes == set(_words.REWORDED)
    for table in tables:
        phrases = [phrase for options in table.values() for phrase in options]
        assert len(phrases) == len(set(phrases))


def test_captions_say_what_their_source_could_know():
    captions = [_words.captions_for(SCENE, random.Random(i)) for i in range(200)]
    drawn = {source: " ".join(str(entry[source]) for entry in captions) for source in CAPTION_SOURCES}
    assert "hot" in words(drawn["mplug"])
    assert not words(drawn["ofa"]) & {"hot", "burning", "sliding", "whistle"}
    assert not words(drawn["sound_mplug"]) & {"red", "hot", "sliding"}
    texts = {choose_caption(captions[0], "ofa", random.Random(i)) for i in range(50)}
    assert {frame for _, frame in texts} == set(range(NUM_FRAMES))


def test_captions_of_a_frame_say_where_the_thing_is_in_that_frame():
    scene = replace(SCENE, x=0.0)
    for frame in range(NUM_FRAMES):
        x = float(scene.place(np.array(frame / NUM_FRAMES))[0])
        expected = "left" if x < -0.12 else "right" if x > 0.12 else "center"
        captions = [_words.retrieval_caption(scene, "depth", random.Random(i), frame) for i in range(5)]
        assert all(expected in words(caption) for caption in captions)


def pixel(scene: Scene, frame: int, count: int, size: int = 96) -> tuple[int, int]:
    """The row and column of the object's middle."""
    x, y = (float(value) for value in scene.place(np.array(frame / count)))
    return round((y + 1) / 2 * (size - 1)), round((x + 1) / 2 * (size - 1))


def test_depth_is_the_distance_in_millimetres():
    for frame, image in enumerate(_render.depth_frames(SCENE, 96)):
        assert int(image[pixel(SCENE, frame, NUM_FRAMES)]) == pytest.approx(1700, rel=0.03)
        assert int(image.max()) == pytest.approx(9500, rel=0.06)
    far = _render.depth_frames(replace(SCENE, metres=7.9, distance="far"), 96)[0]
    assert int(far[pixel(SCENE, 0, NUM_FRAMES)]) == pytest.approx(7900, rel=0.03)


def test_infrared_is_the_temperature():
    def celsius(scene: Scene) -> float:
        value = _render.infrared_frames(scene, 96)[2][pixel(scene, 2, NUM_FRAMES)]
        return _render.COLDEST + float(value) / 255 * (_render.HOTTEST - _render.COLDEST)

    assert celsius(SCENE) == pytest.approx(93, abs=4)
    assert celsius(replace(SCENE, celsius=-28.0)) == pytest.approx(-28, abs=4)


def test_each_sensor_shows_only_what_it_senses():
    hidden = {
        "depth": {"colour": "blue", "material": "metal", "celsius": -20.0, "sound": "bell"},
        "infrared": {"colour": "blue", "material": "metal", "sound": "bell"},
        "video": {"celsius": -20.0, "sound": "bell", "rhythm": "fast"},
        "audio": {"colour": "blue", "shape": "ring", "metres": 7.0, "celsius": -20.0, "motion": "still"},
    }
    render = {
        "depth": lambda scene: _render.depth_frames(scene, 64),
        "infrared": lambda scene: _render.infrared_frames(scene, 64),
        "video": lambda scene: _render.video_frames(scene, 64),
        "audio": _render.waveform,
    }
    for modality, changes in hidden.items():
        expected = render[modality](SCENE)
        for name, value in changes.items():
            assert np.array_equal(render[modality](replace(SCENE, **{name: value})), expected), (modality, name)
        for name in CLASS_ATTRIBUTES[modality]:
            others = {"distance": {"metres": 7.9}, "temperature": {"celsius": -28.0}}
            other = next(value for value in reversed(VALUES[name]) if value != getattr(SCENE, name))
            assert not np.array_equal(render[modality](replace(SCENE, **others.get(name, {name: other}))), expected)


def test_files_decode_and_show_the_scene(world):
    scenes = draw_splits(WorldOptions(Path(), **{**SIZES, "seed": 3}))["test"]
    for scene in scenes[:6]:
        files = {modality: scene_files(world / "test", scene, modality) for modality in MODALITIES}
        depth = np.array(Image.open(files["depth"][3]))
        assert (depth.dtype, depth.shape) == (np.uint16, (64, 64))
        assert np.array_equal(depth, _render.depth_frames(scene, 64)[3])
        infrared = np.array(Image.open(files["infrared"][3])).astype(float)
        assert np.abs(infrared - _render.infrared_frames(scene, 64)[3]).mean() < 5  # JPEG is lossy
        with wave.open(io.BytesIO(files["audio"][0].read_bytes())) as file:
            assert (file.getframerate(), file.getnframes()) == (16_000, _render.NUM_AUDIO_SAMPLES)
        video = modality_class("video")(num_frames=16, image_size=64).decode(files["video"][0])
        shown = np.asarray(video).transpose(0, 2, 3, 1).astype(float)
        assert shown.shape == (16, 64, 64, 3)
        assert np.abs(shown - _render.video_frames(scene, 64)).mean() < 8  # so is H.264


def test_every_modality_preprocesses_its_files(world):
    for modality in MODALITIES:
        for line in (world / f"eval/{modality}_test.jsonl").read_text().splitlines()[:3]:
            path = world / "eval" / json.loads(line)["path"]
            transform = modality_class(modality)()
            assert tuple(transform.preprocess(path).shape) == transform.input_shape


@pytest.mark.parametrize("modality", MODALITIES)
def test_evaluations_name_files_and_labels_that_are_there(world, modality):
    folder = world / "eval"
    sizes = {}
    for name in ("test", "unseen", "generalised", "reworded", "retrieval"):
        content = load_yaml(folder / f"{modality}_{name}.yaml")
        lines = [json.loads(line) for line in (folder / content["data"]).read_text().splitlines()]
        assert content["name"] == f"{modality}_{name}"
        assert all((folder / line["path"]).is_file() and line["captions"][0] for line in lines)
        if content["task"] == "classification":
            labels = [line.split("\t")[0] for line in (folder / content["class_names"]).read_text().splitlines()]
            assert {line["label"] for line in lines} <= set(labels)
            assert "{c}" in (folder / content["templates"]).read_text()
            sizes[name] = len(labels)
    assert sizes == {"test": 24, "unseen": 8, "generalised": 32, "reworded": 24}


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="scenes cannot be rendered as 'smell'"):
        make_world(WorldOptions(tmp_path, modalities=("smell",)))
    with pytest.raises(UserError, match="--size 33"):
        make_world(WorldOptions(tmp_path, size=33))
