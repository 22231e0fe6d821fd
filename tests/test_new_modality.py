"""The page about a new modality: its files and commands work as they stand, and mistakes in them are explained."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT

import languagebind.__main__
import languagebind.modalities
from languagebind import load
from languagebind.config import UserError
from languagebind.hub.config import LanguageBindConfig, to_config
from languagebind.modalities import Modality, modality_class
from languagebind.modalities.depth import Depth
from languagebind.text import ClipTextConfig
from languagebind.vit import EncoderConfig, VisionTransformer
from training.main import main as train
from training.params import parse_args

PAGE = (ROOT / "docs" / "new_modality.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
IMU, TEST, MAKE, USE = (text for kind, text in BLOCKS if kind == "python")
RECIPE, DATASET = (text for kind, text in BLOCKS if kind == "yaml")
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
SMALL = ["--depth=1", "--epochs=1", "--workers=0"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of modalities beside the package's; the tests run in the folder that holds it."""
    monkeypatch.chdir(tmp_path)
    for name in ("modalities", "configs"):
        (tmp_path / name).mkdir()
    path = [*languagebind.modalities.__path__, str(tmp_path / "modalities")]
    monkeypatch.setattr(languagebind.modalities, "__path__", path)
    before = set(sys.modules)
    yield tmp_path / "modalities"
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "my_package" or name == "languagebind.modalities.imu":
            del sys.modules[name]


def run(line: str, *more: str) -> None:
    """Run a command of the page in this process, where the modality is known."""
    program, *words = shlex.split(line)
    if program == "languagebind":
        languagebind.__main__.main([*words, *more])
    elif words[:2] == ["-m", "training.main"]:
        train([*words[2:], *SMALL, *more])
    else:
        assert words == ["make_motion.py"]
        exec(compile(MAKE, "make_motion.py", "exec"), {})


def test_the_page_from_beginning_to_end(place):
    (place / "imu.py").write_text(IMU)
    (place.parent / "configs" / "imu.yaml").write_text(RECIPE)
    (place.parent / "motion.yaml").write_text(DATASET)
    for line in COMMANDS:
        run(line)
    result = json.loads(next((place.parent / "results").glob("motion_*.json")).read_bytes())
    assert result["protocol"]["samples"] == 16
    names = {}
    exec(compile(USE, "docs/new_modality.md", "exec"), names)
    assert names["motion"].shape == (2, 384)
    own, exported = load("logs/imu-1"), load("exports/imu-1")
    recordings = np.random.default_rng(1).normal(size=(3, 6, 1200))
    assert torch.equal(own.encode(imu=recordings), exported.encode(imu=recordings))
    assert torch.equal(own.encode(text=["a person"]), exported.encode(text=["a person"]))
    files = {path.name for path in (place.parent / "exports" / "imu-1").rglob("*") if path.is_file()}
    assert files == {"README.md", "imu.py", "step_00000004.pt"}
    saved = torch.load(next(place.parent.glob("exports/*/checkpoints/*")), weights_only=True)
    assert "optimizer" not in saved
    assert str(place.parent) not in str(saved["config"])
    with pytest.raises(UserError, match="--adapter needs the published layout, which does not support imu"):
        run("languagebind export --checkpoint logs/imu-1 --output exports/other --adapter")
    (place / "imu.py").unlink()
    with pytest.raises(UserError, match=r"imu-1 does not fit this installation: unknown modality 'imu'"):
        load("exports/imu-1")


def test_the_test_on_the_page_passes(place):
    (place / "imu.py").write_text(IMU)
    names = {}
    exec(compile(TEST, "test_imu.py", "exec"), names)
    names["test_any_length_becomes_the_input_shape"]()
    names["test_gravity_is_one_and_the_rest_is_zero"](place)
    names["test_only_training_crops_at_random"]()
    (values,) = names["test_bad_recordings_are_refused"].pytestmark
    for value in values.args[1]:
        names["test_bad_recordings_are_refused"](value)


def test_a_modality_in_a_package_of_your_own(place, monkeypatch):
    monkeypatch.syspath_prepend(place.parent)
    (place.parent / "my_package").mkdir()
    (place.parent / "my_package" / "imu.py").write_text(IMU)
    (place.parent / "configs" / "imu.yaml").write_text(RECIPE.replace("modality: imu", "modality: my_package.imu"))
    exec(compile(MAKE, "make_motion.py", "exec"), {})
    run("languagebind make-shards csv --manifest motion/test.csv --root motion --output s --modality my_package.imu")
    run("python -m training.main --config configs/imu.yaml --train-data s --name own --batch-size 8 --patch-size 1 25")
    run("languagebind export --checkpoint logs/own --output own")
    files = ["motion/test/0.npy", "motion/test/3.npy"]
    encoders = load({"imu": "own"})
    assert torch.equal(encoders.encode(imu=files), load("logs/own").encode(imu=files))
    assert encoders.model("imu").vision_model.embeddings.grid == (6, 40)
    shutil.copy(place.parent / "my_package" / "imu.py", place.parent / "my_package" / "depth.py")
    for name, message in (
        ("my_package.depth", r"unknown modality 'my_package\.depth'; choose from .*my_package\.imu"),
        ("my_pakage.imu", r"cannot import my_pakage\.imu: No module named 'my_pakage'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_args([f"--modality={name}"])


FRAME = "@dataclass(frozen=True)"
NAMED = r"imu\.py should define class Imu\(Modality\), spelled so, with @dataclass\(frozen=True\)"
SHAPED = r"imu: input_shape should be a tuple \(C, T, H, W\), and transform .* that shape; they are "


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ("class Imu(", "class IMU(", NAMED),
        ("class Imu(", "class ImuModality(", NAMED),
        (IMU, "class Imu:\n    pass\n", NAMED),
        (IMU, "", NAMED),
        ("(Modality):", ":", NAMED),
        (FRAME, "", NAMED),
        (FRAME, "@dataclass", r"cannot import .*\.imu: cannot inherit non-frozen dataclass.*new_modality\.md"),
        ('    extensions = ("imu.npy", "npy")\n', "", r"imu\.py should define extensions = \('imu\.npy',\) in"),
        ('("imu.npy", "npy")', '("imu.npy")', "should define extensions"),
        ('("imu.npy", "npy")', '(".npy",)', "should define extensions"),
        ("def from_memory", "def in_memory", r"imu\.py should define from_memory in class Imu$"),
        ("(1, 1, 6, self.num_samples)\n", "[1, 1, 6, self.num_samples]\n", SHAPED + r"\[1, 1, 6, 1000\] and <Tensor"),
        (
            "(1, 1, 6, self.num_samples)\n",
            "(6, self.num_samples)\n",
            SHAPED + r"\(6, 1000\) and <Tensor \(1, 1, 6, 1000",
        ),
        ("    @property\n", "", SHAPED + "<bound method"),
        ("[None, None]  #", "#", SHAPED + r"\(1, 1, 6, 1000\) and <Tensor \(6, 1000\)>"),
        ("[None, None]  #", "[None, None].numpy()  #", SHAPED + r".* and <ndarray \(1, 1, 6, 1000\)>"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(there, here, message, place):
    assert there in IMU
    (place / "imu.py").write_text(IMU.replace(there, here))
    with pytest.raises(UserError, match=message) as error:
        modality_class("imu")().preprocess(np.ones((6, 10)))
    assert "\n" not in str(error.value)


def test_a_square_patch_on_a_time_series_names_the_flag():
    with pytest.raises(UserError, match="inputs of 6 x 1000 are smaller than a patch of 16 x 16: set --patch-size"):
        VisionTransformer((1, 1, 6, 1000), EncoderConfig(16, width=8, depth=1, num_heads=1, mlp_dim=8))


@pytest.mark.parametrize("embedding", ["2d", "3d"])
def test_patches_of_height_and_width_are_those_of_unfold(embedding):
    config = EncoderConfig((2, 5), width=8, depth=1, num_heads=1, mlp_dim=8, patch_embedding=embedding)
    model, x = VisionTransformer((3, 1, 4, 20), config), torch.randn(2, 3, 1, 4, 20)
    tokens = model.embeddings(x[:, :, 0])[:, 1:] - model.embeddings.position_embedding.weight[1:]
    patches = torch.nn.functional.unfold(x[:, :, 0], (2, 5), stride=(2, 5))  # (B, C * 2 * 5, N)
    torch.testing.assert_close(tokens, patches.mT @ model.embeddings.patch_embedding.weight.flatten(1).T)
    with pytest.raises(UserError, match="patch_size should be a number of at least 1, got 0"):
        replace(config, patch_size=(2, 0))


def test_the_published_layout_keeps_height_and_width_of_a_patch(tmp_path):
    to_config(Depth(), EncoderConfig(patch_size=(14, 28)), ClipTextConfig(), 512).save_pretrained(tmp_path)
    assert tuple(LanguageBindConfig.from_pretrained(tmp_path).vision.sizes.patch) == (14, 28)


def test_the_page_names_the_parts_of_a_modality():
    assert {*Modality.__abstractmethods__, "picture"} <= set(re.findall(r"`(\w+)`", PAGE))
