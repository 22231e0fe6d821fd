"""ImageBind against its authors' implementation in the package imagebind-unofficial: bash scripts/test_peers.sh.

Both get the same random weights and files. The package's model and preprocessing run as they are, except that clips
are placed as in the version of pytorchvideo that ImageBind asks for, and files are read with soundfile.
"""

import hashlib
import importlib.util
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
import torchvision.transforms.functional
from helpers import ROOT
from imagebind_files import HUGE, INPUTS, SMALL, TEXTS, noise, shapes, small_state
from PIL import Image as Picture
from test_eval_protocols import video

import languagebind

found = importlib.util.find_spec("imagebind")
if found is None:
    pytest.skip("ImageBind has an environment of its own: bash scripts/test_peers.sh", allow_module_level=True)
FOLDER = Path(found.submodule_search_locations[0])
TOWERS = {"image": "vision", "video": "vision", "audio": "audio", "depth": "depth", "infrared": "thermal"}


@pytest.fixture(scope="module")
def theirs():
    """The package's modules of the model and of preprocessing, without its __init__, which imports more."""
    package = ModuleType("imagebind")
    package.__path__ = [str(FOLDER)]
    sys.modules["imagebind"] = package
    sys.modules["torchvision.transforms.functional_tensor"] = torchvision.transforms.functional  # its former name
    data = importlib.import_module("imagebind.data")
    opened = data.EncodedVideo.from_path
    data.EncodedVideo.from_path = lambda path, sample_rate=None, **options: opened(path, **options)
    data.torchaudio.load = lambda path: (torch.from_numpy(soundfile.read(path, dtype="float32")[0].T.copy()), 16000)
    data.get_clip_timepoints = clip_times
    return importlib.import_module("imagebind.models.imagebind_model"), data


def clip_times(sampler, duration):
    last = Fraction(max(duration - sampler._clip_duration, 0))
    starts = [last * k / (sampler._clips_per_video - 1) for k in range(sampler._clips_per_video)]
    return [(start, start + sampler._clip_duration) for start in starts]


@pytest.fixture(scope="module")
def pair(theirs, tmp_path_factory):
    """A small model of theirs and the checkpoint as ours."""
    sizes = {f"{tower}_embed_dim": width for tower, (width, _) in SMALL.items()}
    sizes |= {f"{tower}_num_blocks": depth for tower, (_, depth) in SMALL.items()}
    model = theirs[0].ImageBindModel(out_embed_dim=16, vision_num_heads=16, text_num_heads=16, **sizes).eval()
    model.load_state_dict(small_state())
    path = tmp_path_factory.mktemp("imagebind") / "small.pth"
    torch.save(model.state_dict(), path)
    return model, languagebind.load(f"imagebind:{path}")


def their_outputs(model, data, inputs):
    """Outputs of each modality; clips are an axis of their own in theirs, and frames of a clip another."""
    x = {TOWERS[name]: inputs[name][:, :, 0] for name in ("image", "depth", "infrared")}
    x |= {"audio": inputs["audio"].transpose(1, 2), "text": data.load_and_transform_text(TEXTS, "cpu")}
    found = model(x)
    clips = inputs["video"].unflatten(2, (-1, 2)).transpose(1, 2)
    return {name: found[tower] for name, tower in TOWERS.items()} | {
        "video": model({"vision": clips})["vision"], "text": found["text"],
    }  # fmt: skip


@torch.no_grad()
def test_outputs_agree(theirs, pair, monkeypatch):
    monkeypatch.chdir(FOLDER)  # its tokenizer opens a file there
    model, ours = pair
    recorded = json.loads((ROOT / "tests" / "imagebind_outputs.json").read_text())
    for draw in ("", "other "):
        inputs = {name: noise(draw + name, size) for name, size in INPUTS.items()}
        for name, expected in their_outputs(model, theirs[1], inputs).items():
            scale = expected.norm(dim=1).max()
            output = (
                ours.model(name).project(inputs[name]) if name != "text" else ours.encode(text=TEXTS, normalize=False)
            )
            torch.testing.assert_close(output / scale, expected / scale, atol=1e-6, rtol=0)
            if not draw:
                torch.testing.assert_close(torch.tensor(recorded[name]) / scale, expected / scale, atol=1e-6, rtol=0)


def test_names_and_shapes_are_those_of_the_published_model(theirs, monkeypatch):
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args: linspace(*args, device="cpu"))
    with torch.device("meta"):
        state = theirs[0].imagebind_huge(pretrained=False).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes(HUGE, 1024)
    facts = sorted((name, list(value.shape)) for name, value in state.items())
    found = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    assert found in (ROOT / "tests" / "test_imagebind.py").read_text()


def test_files_become_the_same_inputs(theirs, pair, tmp_path):
    data, encoders = theirs[1], pair[1].encoders
    rng = np.random.default_rng(0)
    Picture.fromarray(rng.integers(60, 200, (20, 28, 3), np.uint8)).resize((421, 300)).save(tmp_path / "a.jpg")
    image = data.load_and_transform_vision_data([tmp_path / "a.jpg"], "cpu")[0]
    found = encoders["image"][1].preprocess(tmp_path / "a.jpg")[:, 0]
    torch.testing.assert_close(found, image, atol=2 / 255 / 0.26, rtol=0)  # PIL rounds
    for seconds in (1.25, 7.5):
        soundfile.write(tmp_path / "a.wav", rng.normal(size=(int(16000 * seconds), 2)) / 10, 16000, subtype="FLOAT")
        sound = data.load_and_transform_audio_data([str(tmp_path / "a.wav")], "cpu")[0]
        found = encoders["audio"][1].preprocess(tmp_path / "a.wav").transpose(0, 1)
        torch.testing.assert_close(found, sound, atol=1e-3, rtol=0)
    for count, size in ((150, (240, 320)), (31, (320, 240))):
        path = video(tmp_path / f"{count}.mp4", count, 25, size)
        clips = data.load_and_transform_video_data([str(path)], "cpu")[0]
        found = encoders["video"][1].preprocess(path).unflatten(1, (-1, 2)).transpose(0, 1)
        torch.testing.assert_close(found, clips, atol=0.08, rtol=0)  # decoders round colours differently


def test_texts_become_the_same_tokens(theirs, pair, monkeypatch):
    monkeypatch.chdir(FOLDER)
    texts = [*TEXTS, "Café &amp; naïve — #hashtag  spaced\tout", "long " * 200]
    expected = theirs[1].load_and_transform_text(texts, "cpu")
    found = pair[1].model("text").tokenize(texts)["input_ids"]
    assert torch.equal(found, expected[:, : found.shape[1]])
    assert not expected[:, found.shape[1] :].any()
