"""ImageBind: a small checkpoint against outputs of its authors' implementation; preprocessing of real files."""

import hashlib
import json
import math
import re

import numpy as np
import pytest
import soundfile
import torch
from colours import flags, world  # noqa: F401 - a fixture
from helpers import ROOT
from imagebind_files import HUGE, INPUTS, SCALES, TEXTS, noise, shapes, small_state
from PIL import Image as Picture
from test_eval_protocols import every_frame, video
from torchaudio.compliance import kaldi
from torchvision import transforms

import languagebind
from languagebind.config import UserError
from languagebind.eval.__main__ import main
from languagebind.eval.data.readers import choose_protocol
from languagebind.eval.report.__main__ import main as report
from languagebind.hub import imagebind
from languagebind.hub.config import to_published
from languagebind.weights import WeightsError

OUTPUTS = json.loads((ROOT / "tests" / "imagebind_outputs.json").read_text())
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """imagebind:FILE of a small checkpoint."""
    path = tmp_path_factory.mktemp("imagebind") / "imagebind_small.pth"
    torch.save(small_state(), path)
    return f"imagebind:{path}"


@pytest.fixture(scope="module")
def model(spec):
    return languagebind.load(spec)


def modality(model, name):
    return model.encoders[name][1]


# ---------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("name", [*INPUTS, "text"])
def test_outputs_are_those_of_the_original(model, name):
    """Recorded from it for the same weights and inputs; `test_imagebind_peer.py` checks the record."""
    expected = torch.tensor(OUTPUTS[name])
    if name == "text":
        found = model.encode(text=TEXTS, normalize=False)
    else:
        found = model.model(name).project(noise(name, INPUTS[name]))
    scale = SCALES.get({"infrared": "thermal"}.get(name, name), 1.0)
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-6, rtol=0)
    if name != "text":
        unit = model.model(name).encode(noise(name, INPUTS[name]))
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))
        # Products of the outputs are the calibrated similarities
        calibrated = model.similarity(unit, model.encode(text=TEXTS), calibrated=name)
        products = expected @ torch.tensor(OUTPUTS["text"]).T
        if name not in ("video", "audio"):  # the mean of several views has a smaller norm
            torch.testing.assert_close(calibrated, products, atol=1e-3, rtol=1e-4)


def test_the_published_names_and_shapes_load(monkeypatch):
    """All 1311 of imagebind_huge, whose names and shapes have this hash."""
    facts = sorted((name, list(shape)) for name, shape in shapes(HUGE, 1024).items())
    known = "ac2545e60f71b2cadacebe926c9e123ca1c5c4844d02b8f0e8aeeccf5b665be1"
    assert (len(facts), hashlib.sha256(json.dumps(facts).encode()).hexdigest()) == (1311, known)
    state = {name: torch.empty(shape, device="meta") for name, shape in facts}
    monkeypatch.setattr(imagebind, "read_file", lambda path: state)
    sizes = dict.fromkeys(HUGE, 0)
    for name, shape in facts:
        sizes[name.split(".")[1]] += 0 if name.endswith((".mask", "log_logit_scale")) else math.prod(shape)
    assert sizes["vision"] == pytest.approx(632e6, rel=2e-3)
    for encoder, kind in imagebind.load_imagebind("imagebind:huge"):
        loaded = [sum(w.numel() for w in tower.parameters()) for tower in (encoder.vision_model, encoder.text_model)]
        assert loaded == [sizes[imagebind.TOWERS[kind.name]], sizes["text"]]
        assert encoder.embed_dim == 1024


def test_all_modalities_share_the_text_tower(model, spec):
    assert model.modalities == ["audio", "depth", "image", "infrared", "video"]
    assert len({id(encoder.text_model) for encoder, _ in model.encoders.values()}) == 1
    assert model.model("image").vision_model is model.model("video").vision_model
    some = languagebind.load({"audio": spec, "image": spec})
    assert some.model("audio").text_model is some.model("image").text_model
    half = languagebind.load({"depth": spec}, dtype="float16")
    expected = model.encode(text=TEXTS)
    torch.testing.assert_close(half.encode(text=TEXTS), expected, atol=5e-3, rtol=0)


def test_files_are_encoded(model, files):
    lists = {"infrared" if name == "thermal" else name: paths for name, paths in files.items()}
    found = model.encode(**lists, text=TEXTS)
    for name, features in found.items():
        assert features.shape == (2, 16)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
        assert not torch.equal(features[0], features[1]), name


def test_what_does_not_fit_is_refused(spec, tmp_path):
    state = small_state()
    blocks = "modality_trunks.audio.blocks.1."
    cases = [
        ({f"{blocks}attn.bias_k": None}, "(?s)do not fit ImageBind's audio tower.*1 missing:\n  blocks.1.attn.bias_k"),
        ({f"{blocks}attn.bias_q": torch.zeros(1)}, "1 unexpected:\n  blocks.1.attn.bias_q"),
        ({f"{blocks}norm_1.weight": torch.zeros(3)}, r"blocks.1.norm_1.weight: \(3,\), expected \(48,\)"),
        ({"modality_heads.audio.2.weight": None}, "audio tower:\n1 missing:\n  head.projection.weight"),
        ({"modality_trunks.smell.weight": torch.zeros(1)}, "is not a checkpoint of ImageBind: .*, smell"),
        ({"epoch": torch.zeros(1)}, "is not a checkpoint of ImageBind"),
        ({"modality_heads.text.proj.1.weight": None}, "its .* tower lacks 'head.projection"),
        *(
            ({f"modality_{name}": torch.zeros(*shape)}, re.escape(f": {shape}, expected "))
            for name, shape in {
                "preprocessors.text.pos_embed": (1, 32, 48),
                "preprocessors.text.token_embedding.weight": (100, 48),
                "preprocessors.vision.pos_embedding_helper.pos_embed": (1, 1, 48),
                "preprocessors.vision.rgbt_stem.proj.1.weight": (48, 3, 2, 16, 16),
                "preprocessors.thermal.pos_embedding_helper.pos_embed": (1, 257, 48),
                "heads.vision.2.weight": (17, 48),
            }.items()
        ),
    ]  # fmt: skip
    for number, (changes, message) in enumerate(cases):
        changed = {name: value for name, value in (state | changes).items() if value is not None}
        torch.save(changed, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match=message) as error:
            languagebind.load(f"imagebind:{tmp_path / f'{number}.pth'}")
        assert number > 3 or isinstance(error.value, WeightsError)
    torch.save({"model": state, "args": pytest.approx(1)}, tmp_path / "code.pth")
    mistakes = {
        "cannot read .*none.pth: No such file": {"audio": "imagebind:none.pth"},
        "something other than tensors": {"audio": f"imagebind:{tmp_path / 'code.pth'}"},
        "is for audio, depth, image, infrared, video, not thermal": {"thermal": spec},
    }
    for message, source in mistakes.items():
        with pytest.raises(UserError, match=message):
            languagebind.load(source)
    with pytest.raises(UserError, match="several modalities: name one"):
        languagebind.load_model(spec)
    with pytest.raises(UserError, match="leave out num_frames"):
        languagebind.load(spec, num_frames=8)
    with pytest.raises(UserError, match="supports only CLIP's text tower"):
        to_published(*languagebind.load_model(spec, modality="image"))


# ---------------------------------------------------------------------------------------------- preprocessing


def test_audio_is_three_clips_of_two_seconds(model, tmp_path):
    rng, kind = np.random.default_rng(0), modality(model, "audio")
    for seconds in (1.2, 7.5):
        sound = rng.normal(size=(int(16000 * seconds), 2)).astype(np.float32) / 10
        soundfile.write(tmp_path / "a.wav", sound, 16000, subtype="FLOAT")
        found = kind.preprocess(tmp_path / "a.wav")
        assert found.shape == (1, 3, 128, 204)
        for clip, start in enumerate((0, 44000, 88000) if seconds > 2 else (0, 0, 0)):
            part = torch.from_numpy(sound.T[:, start : start + 32000])
            mel = kaldi.fbank(
                part - part.mean(), htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning",
                num_mel_bins=128, dither=0.0, frame_length=25, frame_shift=10,
            )  # fmt: skip
            padded = torch.zeros(128, 204)
            padded[:, : len(mel)] = mel.T
            torch.testing.assert_close(found[0, clip], (padded + 4.268) / 9.138, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("size", "count"), [((240, 320), 30), ((320, 240), 7)])
def test_video_is_five_clips_of_two_frames_in_three_crops(model, tmp_path, size, count):
    path = video(tmp_path / "a.mp4", count, 5, size)
    found = modality(model, "video").preprocess(path)
    assert found.shape == (3, 30, 224, 224)
    starts = [0, 5, 10, 15, 20] if count == 30 else [0] * 5
    frames = [pixels for _, pixels in every_frame(path)]
    resize = transforms.Resize(224, antialias=False)
    normalize = transforms.Normalize(MEAN, STD)
    views = iter(found.split(2, dim=1))
    for start in starts:
        ends = np.stack([frames[start], frames[min(start + 9, count - 1)]])
        clip = resize(torch.from_numpy(ends).permute(0, 3, 1, 2).float() / 255)
        for place in (0, 37, 74):
            square = clip[:, :, :, place : place + 224] if size[1] > size[0] else clip[:, :, place : place + 224]
            torch.testing.assert_close(next(views), normalize(square).transpose(0, 1), atol=0.08, rtol=0)


def test_clips_lie_in_the_part_of_a_video(model, tmp_path):
    path = video(tmp_path / "a.mp4", 30, 5)
    kind = modality(model, "video")
    part = choose_protocol("ours", None, (2, 6), kind).reader.read(path)[0]
    frames = [pixels for _, pixels in every_frame(path)]
    first = torch.from_numpy(frames[10].copy()).permute(2, 0, 1)[None].expand(10, -1, -1, -1)
    torch.testing.assert_close(part[:, 0], kind.transform(first)[:, 0], atol=0.08, rtol=0)
    # Frames as files have no rate, so they are evenly spaced
    pictures = [Picture.fromarray(frame) for frame in frames]
    evenly = np.linspace(0, 29, 10, dtype=int)
    assert torch.equal(kind.preprocess(pictures), kind.preprocess(np.stack([frames[i] for i in evenly])))
    for options in ({"clips": 2}, {"crops": 3}):
        with pytest.raises(UserError, match="has clips and crops of its own"):
            choose_protocol("ours", None, None, kind, **options)
    for rule in ("seconds", "views"):
        with pytest.raises(UserError, match=r"leave out .*--protocol paper"):
            choose_protocol("paper", {"inputs": rule}, None, kind)


def test_pictures_are_resized_as_pil_does(model, tmp_path):
    rng = np.random.default_rng(0)
    pixels = np.asarray(Picture.fromarray(rng.integers(60, 200, (20, 28, 3), np.uint8)).resize((421, 300)))
    exif = Picture.Exif()
    exif[0x0112] = 6
    Picture.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    square = [transforms.Resize(224, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    for name, mode, last in (("image", "RGB", [transforms.Normalize(MEAN, STD)]), ("infrared", "L", [])):
        transform = transforms.Compose([*square, transforms.ToTensor(), *last])
        kind = modality(model, name)
        upright = Picture.fromarray(pixels).convert(mode)
        if name == "infrared":  # a thermal camera's file may be turned, too
            upright = upright.transpose(Picture.Transpose.ROTATE_270)
        three_levels = 3 / 255 / min(kind.image_std)  # PIL rounds three times
        found = kind.preprocess(tmp_path / "a.png")[:, 0]
        torch.testing.assert_close(found, transform(upright), atol=three_levels, rtol=0)
    counts = Picture.fromarray(np.linspace(20000, 24000, 90000).reshape(300, 300).astype(np.uint16))
    grey = modality(model, "infrared").preprocess(counts)
    assert grey.shape == (1, 1, 224, 224)
    assert grey.min() < 0.01
    assert grey.max() > 0.99


def test_depth_is_disparity(model, tmp_path):
    kind = modality(model, "depth")
    for metres, pixels in ((2.5, 0.075 * 518.857901 / 2.5), (0.2, 75.0), (60.0, 0.075 * 518.857901 / 50)):
        depth = np.full((300, 400), metres * 1000, np.uint16)
        Picture.fromarray(depth).save(tmp_path / "a.png")
        found = kind.preprocess(tmp_path / "a.png")
        assert found.shape == (1, 1, 224, 224)
        expected = (pixels / 75 - 0.0418) / 0.0295
        torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-4, rtol=1e-5)
    ramp = np.linspace(1, 4, 400, dtype=np.float32)[None].repeat(300, 0)
    found = kind.preprocess(ramp)[0, 0, 100]
    wide = torch.tensor(0.075 * 518.857901 / ramp)[None, None] / 75
    resized = transforms.Resize(224, antialias=False)(wide)[0, 0, 100]
    torch.testing.assert_close(found, (resized[37:261] - 0.0418) / 0.0295, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- evaluation


def test_evaluation(world, spec, toys, tmp_path, capsys):  # noqa: F811
    configs = [str(world / "configs" / name) for name in ("here.yaml", "texts.yaml")]
    main(flags(world, tmp_path, "--config", *configs, "--model", spec, "--feature-cache", str(tmp_path / "cache")))
    result = json.loads((tmp_path / "here_imagebind_small.json").read_text())
    assert (result["model"], result["pretrained"]) == ("image", "imagebind_small")
    protocol = result["protocol"]
    assert (protocol["samples"], protocol["input_shape"]) == (30, [3, 1, 224, 224])
    assert result["checkpoint"] == spec
    assert not protocol["inputs"]["exif"]
    again = tmp_path / ".again"
    main(flags(world, again, "--config", *configs, "--model", spec, "--feature-cache", str(tmp_path / "cache")))
    assert json.loads((again / "here_imagebind_small.json").read_text())["metrics"] == result["metrics"]
    with pytest.raises(UserError, match="leave out num_frames"):
        main(flags(world, tmp_path / "c", "--config", configs[0], "--model", spec, "--num-frames", "8"))
    # LanguageBind on the same data: one table, and one page
    capsys.readouterr()
    both = [str(toys / "image"), spec]
    main(flags(world, tmp_path, "--config", *configs, "--compare", "--skip-existing", "--model", *both))
    assert capsys.readouterr().out.splitlines()[0].split()[2:4] == ["image", "imagebind_small"]
    report([str(tmp_path)])
    rows = [row.split(",")[:2] for row in (tmp_path / "report.csv").read_text().splitlines()[1:]]
    names = ("image", "imagebind_small")
    assert {tuple(row) for row in rows} == {(name, data) for name in names for data in ("here", "texts")}


def test_results_say_what_is_known_of_the_preprocessing(spec, files, tmp_path):
    for name, known in (("depth", ("disparity", "45 %", "54 %")), ("infrared", ("not normalised", "62.4 %", "63.4 %"))):
        paths = files["thermal" if name == "infrared" else name]
        rows = [{"path": path, "label": label} for path, label in zip(paths, ("near", "far"), strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = tmp_path / f"{name}.yaml"
        config.write_text(
            f"task: classification\nmodality: {name}\ndata: {name}.jsonl\nclass_names: {{near: near, far: far}}\n"
        )
        main(flags(tmp_path, tmp_path, "--config", str(config), "--model", f"ib={spec}"))
        protocol = json.loads((tmp_path / f"{name}_ib.json").read_text())["protocol"]
        assert all(word in protocol["preprocessing"] for word in known)
        if name == "depth":
            assert math.isclose(protocol["inputs"]["focal_length"], 518.857901)


def test_its_pairs_with_pictures_were_trained_and_texts_only_with_them(spec):
    models = languagebind.load(spec).encoders
    assert models["audio"][0].trained_with == ("image", "video")
    assert models["image"][0].trained_with == ("text",)
