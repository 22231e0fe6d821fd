"""Loading by any name, encoding of any form, OpenCLIP's verbs."""

import http.server
import json
import pickle
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_files import save
from helpers import ROOT, call, give_own_text_tower, train_flags
from PIL import Image
from torch.nn import functional as F

import languagebind
from languagebind import DecodeError, LanguageBindDepth, UserError, load
from languagebind.hub.config import to_config, to_published
from languagebind.hub.export import main as export
from languagebind.hub.processing import PROCESSORS
from languagebind.hub.published import build_published
from languagebind.modalities.infrared import Infrared
from languagebind.text import ClipTextConfig, TextConfig, build_text
from languagebind.vit import EncoderConfig
from training.main import main
from training.params import parse_args

NAMES = {"video": "video", "audio": "audio", "depth": "depth", "infrared": "thermal", "image": "image"}
TEXTS = ["a dog runs", "two cats sleep on a red sofa"]


@pytest.fixture(scope="module")
def encoders(toys):
    return load({name: toys / folder for name, folder in NAMES.items()})


@pytest.fixture(scope="module")
def trained(depth_shards, tmp_path_factory):
    """The folder of a run of our own training."""
    logs = tmp_path_factory.mktemp("logs")
    main([*train_flags(depth_shards, logs, "--name=run"), "--workers=0"])
    return logs / "run"


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_published_folders_load_by_modality(encoders, files):
    found = encoders.encode(**{name: files[folder] for name, folder in NAMES.items()}, text=TEXTS)
    assert found.keys() == {*NAMES, "text"}
    for features in found.values():
        assert features.shape == (2, 16)
        close(features.norm(dim=1), torch.ones(2))
    close(encoders.similarity(found["depth"], found["text"]), found["depth"] @ found["text"].T)
    scale = encoders.encoders["depth"][0].logit_scale.exp()
    close(encoders.similarity(found["depth"], found["text"], "depth"), scale * found["depth"] @ found["text"].T, 1e-4)


def test_features_are_those_of_the_published_class(encoders, toys, files):
    model, processor = (
        LanguageBindDepth.from_pretrained(toys / "depth"),
        PROCESSORS["depth"].from_pretrained(toys / "depth"),
    )
    data = processor(files["depth"], TEXTS, return_tensors="pt")
    with torch.no_grad():
        out, raw = model(**data), model.get_image_features(data["pixel_values"])
    close(encoders.encode(depth=files["depth"]), out.image_embeds)
    close(encoders.encode(text=TEXTS), out.text_embeds)
    close(encoders.encode(depth=files["depth"], normalize=False), raw)


def test_every_form_of_input_and_output(encoders, files):
    path = files["image"][0]
    expected = encoders.encode(image=[path])
    for form in (Path(path), Path(path).read_bytes(), Image.open(path), np.asarray(Image.open(path))):
        assert torch.equal(encoders.encode(image=[form]), expected)
    both = encoders.encode(image=files["image"] * 3, batch_size=2)
    assert torch.equal(both, encoders.encode(image=files["image"] * 3, batch_size=2, num_workers=2, progress=True))
    close(both, encoders.encode(image=files["image"] * 3, batch_size=5))
    array = encoders.encode(image=[path], to="numpy", truncate_dim=8)
    assert isinstance(array, np.ndarray)
    close(torch.from_numpy(array), F.normalize(expected[:, :8], dim=-1))
    assert encoders.encode(image=[]).shape == (0, 16)


def test_urls_are_fetched(encoders, files, tmp_path):
    folder = Path(files["depth"][0]).parent

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        found = encoders.encode(depth=[f"{address}/{Path(files['depth'][0]).name}"])
        assert torch.equal(found, encoders.encode(depth=files["depth"][:1]))
        with pytest.raises(DecodeError, match="cannot be downloaded: HTTP Error 404"):
            encoders.encode(depth=[f"{address}/none.png"])
        server.shutdown()


def test_mistakes_are_named(encoders, toys, files, tmp_path):
    for error, message, arguments in (
        (ValueError, "one list per modality: audio, depth, image, infrared, video or text", {}),
        (ValueError, "no encoder for 'smell' is loaded", {"smell": ["a"]}),
        (ValueError, "'torch' or 'numpy', not 'list'", {"text": ["a"], "to": "list"}),
        (ValueError, "truncate_dim should be a number of at least 1, got 0", {"text": ["a"], "truncate_dim": 0}),
        (ValueError, "truncate_dim should be at most 16 for text, got 17", {"text": ["a"], "truncate_dim": 17}),
        (TypeError, r"a list, depth=\[...\], not a single str", {"depth": files["depth"][0]}),
        (TypeError, "", {"text": [1]}),
        (ValueError, "batch_size should be a number of at least 1", {"text": ["a"], "batch_size": -1}),
        (TypeError, "", {"text": ["a"], "batch_size": 1.5}),
        (ValueError, "use 'infrared' for thermal images", {"thermal": files["thermal"]}),
        (DecodeError, "divide millimetres by 1000", {"depth": [np.full((60, 80), 900.0)]}),
        (DecodeError, "divide millimetres", {"depth": [np.pad(np.full((60, 80), 900.0), 1, constant_values=40)]}),
        (DecodeError, "complex numbers", {"depth": [np.full((60, 80), 1j)]}),
        (DecodeError, "No such file", {"depth": ["none.png"]}),
    ):
        with pytest.raises(error, match=message):
            encoders.encode(**arguments)
    with pytest.raises(UserError, match="is for depth, not audio"):
        load({"audio": toys / "depth"})
    with pytest.raises(UserError, match="is a second checkpoint for depth"):
        load(toys / "depth", toys / "depth")
    with pytest.raises(UserError, match="at least one checkpoint"):
        load()
    for source, message in (
        (tmp_path, "no checkpoint at"),
        (toys / "depth" / "model.safetensors", "contains only weights: pass its folder"),
        ([toys / "depth"], r"pass load\(\) paths or hub ids"),
        ({"thermal": toys / "thermal"}, "is for infrared, not thermal: write infrared for thermal images"),
        ({"thermal": toys / "depth"}, r"depth is for depth, not thermal$"),
        (tmp_path / "nothing" / "here", "there is no folder .*here$"),
        ("LanguageBind_Depth", "LanguageBind/LanguageBind_Depth"),
    ):
        with pytest.raises(UserError, match=message):
            load(source)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device cuda cannot be used here: "):
            load(tmp_path / "nothing", device="cuda")  # before anything is read
    with pytest.raises(UserError, match="dtype 'int8'"):
        load(toys / "depth", dtype="int8")
    with pytest.raises(UserError, match="there is no folder nobody/nothing, and it is not in the cache"):
        load("nobody/nothing")


def test_half_precision(toys, files):
    sources = {"depth": toys / "depth", "audio": toys / "audio"}
    inputs = {name: files[name] for name in sources}
    full, half = load(sources).encode(**inputs), load(sources, dtype="bfloat16").encode(**inputs)
    for name in sources:
        assert half[name].dtype == torch.float32
        close(half[name], full[name], 2e-2)


def test_encoders_in_half_and_in_full_precision_share_a_text_tower(toys, files, tmp_path):
    LanguageBindDepth.from_pretrained(toys / "depth", dtype="float16").save_pretrained(tmp_path)
    for sources in ((toys / "audio", tmp_path), (tmp_path, toys / "audio")):
        found = load(*sources).encode(depth=files["depth"], audio=files["audio"], text=TEXTS)
        close(found["text"], load(toys / "audio").encode(text=TEXTS), 1e-2)


def test_a_folder_may_be_named_as_a_file(toys, tmp_path):
    shutil.copytree(toys / "depth", tmp_path / "v1.pt")
    assert load(tmp_path / "v1.pt").modalities == ["depth"]


def test_what_workers_are_handed_pickles(toys, files):
    _, augment, preprocess = languagebind.create_model_and_transforms(toys / "depth")
    for transform in (augment, preprocess):
        copy = pickle.loads(pickle.dumps(transform))  # noqa: S301 - our own
        torch.manual_seed(0)
        expected = transform(files["depth"][0])
        torch.manual_seed(0)
        assert torch.equal(copy(files["depth"][0]), expected)
    error = pickle.loads(pickle.dumps(DecodeError(b"abc", "not a picture")))  # noqa: S301
    assert (str(error), error.reason) == ("<3 bytes>: not a picture", "not a picture")


@pytest.fixture(scope="module")
def own_text(toys, tmp_path_factory):
    """Published checkpoints of which the audio one has a text tower of its own."""
    audio = give_own_text_tower(toys / "audio", tmp_path_factory.mktemp("own") / "audio")
    return {"audio": audio, "image": toys / "image", "video": toys / "video"}


def test_texts_are_encoded_for_the_modality_they_are_compared_with(own_text, toys, files, caplog):
    encoders, shared = load(own_text), load(toys / "image").encode(text=TEXTS)
    model = languagebind.LanguageBindAudio.from_pretrained(own_text["audio"])
    data = PROCESSORS["audio"](model.config, languagebind.LanguageBindAudioTokenizer.from_pretrained(toys / "audio"))(
        files["audio"], TEXTS, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**data)
    own = out.text_embeds
    towers = {name: one.text_model for name, (one, _) in encoders.encoders.items()}
    assert towers["image"] is towers["video"]
    assert towers["image"] is not towers["audio"]
    assert (own - shared).abs().max() > 0.1
    assert not caplog.records, "only the choice of a tower by default is worth a warning"
    sounds, pictures, clips = ({name: files[name]} for name in ("audio", "image", "video"))
    for inputs, of, expected in (
        ({}, "audio", own), ({}, "video", shared), (sounds, None, own), (pictures, None, shared),
        (pictures | clips, None, shared), (pictures, "audio", own), (sounds | clips, "image", shared),
        ({}, None, shared), ({}, None, shared),
    ):  # fmt: skip
        found = encoders.encode(**inputs, text=TEXTS, of=of)
        close(found["text"] if inputs else found, expected)
    (record,) = caplog.records
    assert "encoded with that of image, video; to compare texts with audio, add of='audio'" in record.message
    probabilities = encoders.similarity(out.image_embeds, encoders.encode(text=TEXTS, of="audio"), "audio").softmax(-1)
    close(probabilities, out.logits_per_image.softmax(-1))
    with pytest.raises(ValueError, match="the text towers of audio, image differ: choose one, as in of='audio'"):
        encoders.encode(**sounds, **pictures, text=TEXTS)
    with pytest.raises(ValueError, match="no encoder for 'depth' is loaded"):
        encoders.encode(text=TEXTS, of="depth")


def test_in_a_tie_the_first_text_tower_encodes(own_text, toys):
    for name, first in (("image", load(toys / "image")), ("audio", load(own_text["audio"]))):
        order = sorted(("image", "audio"), key=lambda each: each != name)
        found = load({each: own_text[each] for each in order}).encode(text=TEXTS)
        assert torch.equal(found, first.encode(text=TEXTS))


def test_equal_weights_with_another_activation_are_another_text_tower(toys, tmp_path):
    shutil.copytree(toys / "depth", tmp_path / "depth")
    config = json.loads((tmp_path / "depth/config.json").read_text())
    config["text_config"]["hidden_act"] = "quick_gelu"
    (tmp_path / "depth/config.json").write_text(json.dumps(config))
    encoders = load(toys / "audio", tmp_path / "depth")
    tokenizer = languagebind.LanguageBindDepthTokenizer.from_pretrained(toys / "depth")
    ids = tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = F.normalize(LanguageBindDepth.from_pretrained(tmp_path / "depth").get_text_features(ids), dim=-1)
    found = [encoders.encode(text=TEXTS, of=name) for name in ("depth", "audio")]
    close(found[0], expected, 1e-6)
    assert (found[0] - found[1]).abs().max() > 1e-5


def test_runs_and_published_checkpoints_with_their_own_text_towers(own_text, trained, toys, clip_folder, tmp_path):
    run, other = trained, save(tmp_path, Infrared(image_size=32), clip_folder, 0)
    sources = {"depth": run, "infrared": other, **own_text}
    expected = {name: load(sources[name]).encode(text=TEXTS) for name in ("depth", "infrared", "audio", "image")}
    encoders = load(sources)
    for name, features in expected.items():
        assert torch.equal(encoders.encode(text=TEXTS, of=name), features)
    assert [x.shape[1] for x in expected.values()] == [384, 16, 16, 16]
    assert torch.equal(encoders.encode(text=TEXTS), expected["image"])  # of image and video
    assert encoders.encode(text=[], of="depth").shape == (0, 384)
    first, second = (load(a, b) for a, b in ((run, other), (other, run)))
    for name in ("depth", "infrared"):
        assert torch.equal(first.encode(text=TEXTS, of=name), second.encode(text=TEXTS, of=name))
    with pytest.raises(UserError, match="differs from the one loaded before"):
        languagebind.load_model(run, like=first.encoders["infrared"][0])
    with pytest.raises(UserError, match="differs from the one loaded before"):
        languagebind.load_model(toys / "image", like=encoders.encoders["audio"][0])
    shared, _ = languagebind.load_model(toys / "image", like=encoders.encoders["video"][0])
    assert shared.text_model is encoders.encoders["video"][0].text_model


def test_sentence_transformers_takes_the_text_tower_of_a_modality(own_text, toys, files, tmp_path):
    from sentence_transformers import SentenceTransformer

    from languagebind.sentence import LanguageBindModule

    sources = {name: own_text[name] for name in ("image", "audio")}  # a tie, and not in alphabetical order
    made = SentenceTransformer(modules=[LanguageBindModule(sources)], device="cpu")
    made.save(str(tmp_path / "saved"))
    saved = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    shared, own = load(toys / "image").encode(text=TEXTS), load(own_text["audio"]).encode(text=TEXTS)
    for model in (made, saved):
        for options, expected in (({}, shared), ({"of": "image"}, shared), ({"of": "audio"}, own)):
            close(torch.from_numpy(model.encode(TEXTS, **options)), expected)
        prompted = model.encode(TEXTS, of="audio", prompt="a sound: ")
        close(torch.from_numpy(prompted), load(own_text["audio"]).encode(text=[f"a sound: {text}" for text in TEXTS]))
        close(torch.from_numpy(model.encode(files["audio"])), load(toys / "audio").encode(audio=files["audio"]))
    with pytest.raises(ValueError, match="no encoder for 'video' is loaded"):
        made.encode(TEXTS, of="video")
    config = languagebind.LanguageBindAudioConfig.from_pretrained(toys / "audio", projection_dim=24)
    languagebind.LanguageBindAudio(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"features of one size, not \{'image': 16, 'audio': 24\}"):
        LanguageBindModule({"image": toys / "image", "audio": tmp_path / "wide"})


def test_a_name_that_no_run_has_is_answered_with_the_runs(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("second", "first"):
        (tmp_path / "logs" / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^no run logs/nope; logs holds first, second$"):
        load("logs/nope")
    monkeypatch.chdir(tmp_path / "logs")  # a name without a folder may be one of the hub's
    with pytest.raises(UserError, match="LanguageBind/LanguageBind_Depth"):
        load("LanguageBind_Depth")


def test_a_text_tower_that_is_too_small_for_its_tokenizer_is_refused(toys, tmp_path):
    config = languagebind.LanguageBindDepthConfig.from_pretrained(toys / "depth")
    config.text_config.vocab_size = 1000
    languagebind.LanguageBindDepth(config).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="a vocabulary of 1000 tokens, but its tokenizer has 49408"):
        load(tmp_path / "small")


def test_runs_of_our_training_load_by_their_folder(trained, files):
    newest = max((trained / "checkpoints").glob("*.pt"))
    one, other = load(trained), load({"depth": newest})
    assert torch.equal(one.encode(depth=files["depth"]), other.encode(depth=files["depth"]))


def test_the_verbs_of_open_clip(toys, trained, files):
    for source, modality in ((f"local-dir:{toys / 'thermal'}", "infrared"), (trained, "depth")):
        model, augment, preprocess = languagebind.create_model_and_transforms(source)
        tokenizer = languagebind.get_tokenizer(source)
        file = files["thermal" if modality == "infrared" else modality][0]
        with torch.no_grad():
            features = getattr(model, f"encode_{modality}")(preprocess(file)[None], normalize=True)
            text_features = model.encode_text(tokenizer(TEXTS), normalize=True)
            both = model(preprocess(file)[None], tokenizer(TEXTS))
        assert augment(file).shape == preprocess(file).shape
        assert torch.equal(both[0], features)
        encoders = load(str(source).removeprefix("local-dir:"))
        close(features, encoders.encode(**{modality: [file]}))
        close(text_features, encoders.encode(text=TEXTS))
        with pytest.raises(AttributeError, match="encode_audio"):
            model.encode_audio  # noqa: B018
    model, preprocess = languagebind.create_model_from_pretrained(toys / "depth", precision="bf16")
    assert model.logit_scale.dtype == torch.bfloat16
    assert model.encode_depth(preprocess(files["depth"][0])[None]).dtype == torch.bfloat16
    x = torch.randn(1, 3, 1, 56, 56, requires_grad=True)
    languagebind.create_model(toys / "depth").encode_depth(x).sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(UserError, match="omit pretrained='laion2b'"):
        languagebind.create_model(toys / "depth", "laion2b")
    assert "LanguageBind_Video_FT" in languagebind.list_models()
    assert ("LanguageBind_Depth", "LanguageBind/LanguageBind_Depth") in languagebind.list_pretrained()
    with pytest.raises(UserError, match="LanguageBind/LanguageBind_Depth"):
        languagebind.create_model_and_transforms("LanguageBind_Depth", "LanguageBind/LanguageBind_Depth")  # offline
    with pytest.raises(UserError, match="LanguageBind/LanguageBind_Depth"):
        languagebind.get_tokenizer("LanguageBind_Depth")


def test_limits_and_exif_are_options_of_load_and_encode(toys):
    long, longer = ((np.random.default_rng(0).normal(size=seconds * 1000), 1000) for seconds in (700, 900))
    encoders = load({"audio": toys / "audio", "image": toys / "image"}, max_seconds=800)
    assert len(encoders.encode(audio=[long])) == 1
    with pytest.raises(DecodeError, match="exceeds --max-seconds 800; in Python, pass max_seconds to load"):
        encoders.encode(audio=[longer])
    assert len(encoders.encode(audio=[longer], max_seconds=1000)) == 1
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    turned = stored.copy()
    turned.getexif()[0x0112] = 3
    upright = encoders.encode(image=[stored.rotate(180), stored])
    close(encoders.encode(image=[turned]), upright[:1], 1e-6)
    close(encoders.encode(image=[turned], exif=False), upright[1:], 1e-6)
    close(load(toys / "image", exif=False).encode(image=[turned]), upright[1:], 1e-6)


@pytest.mark.parametrize("bounds", ["full", (0, 80), (27315, 35315.5)])
def test_the_range_of_infrared_is_exported(bounds, tmp_path):
    modality = Infrared(infrared_range=bounds)
    to_config(modality, EncoderConfig(), ClipTextConfig(), 512).save_pretrained(tmp_path)
    assert languagebind.LanguageBindThermalConfig.from_pretrained(tmp_path).modality == modality


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_trained_checkpoint_is_exported(tuning, depth_shards, clip_folder, files, tmp_path):
    tower = f"--text-tower=local-dir:{clip_folder}"
    main([*train_flags(depth_shards, tmp_path, "--name=run", tower, f"--tuning={tuning}"), "--workers=0"])
    export([f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'mine'}"])
    own, exported = load(tmp_path / "run"), load(tmp_path / "mine")
    direct = LanguageBindDepth.from_pretrained(tmp_path / "run")
    processor = PROCESSORS["depth"].from_pretrained(tmp_path / "mine")
    straight = PROCESSORS["depth"].from_pretrained(tmp_path / "run")
    for key, value in processor(files["depth"], TEXTS, return_tensors="pt").items():
        assert torch.equal(straight(files["depth"], TEXTS, return_tensors="pt")[key], value), key
    with torch.no_grad():
        out = direct(**processor(files["depth"], TEXTS, return_tensors="pt"))
    for features, published in (
        ({"depth": files["depth"]}, out.image_embeds),
        ({"text": TEXTS}, out.text_embeds),
    ):
        close(own.encode(**features), exported.encode(**features), 1e-6)  # bits depend on where the weights lie
        close(own.encode(**features), published)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert 'languagebind.load("ORG/mine")' in card
    assert f"(local-dir:{clip_folder.name})" in card
    assert str(clip_folder) not in "".join(file.read_text() for file in (tmp_path / "mine").glob("*.*[dn]"))
    for taken in (tmp_path / "mine", tmp_path / "mine" / "config.json"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            export([f"--checkpoint={tmp_path / 'run'}", f"--output={taken}"])
    main([*train_flags(depth_shards, tmp_path, "--name=sun", tower, "--sun-rgbd"), "--workers=0"])
    with pytest.raises(UserError, match="cannot store sun_rgbd=True of depth"):
        LanguageBindDepth.from_pretrained(tmp_path / "sun")
    model, modality = languagebind.load_model(tmp_path / "run")
    known = to_published(model, modality)[0]  # with the tower that was built
    assert languagebind.LanguageBindDepthConfig.from_pretrained(tmp_path / "run").to_dict() == known.to_dict()
    model.trained_with = ("text", "infrared")
    build_published(*to_published(model, modality), "run").save_pretrained(tmp_path / "met")
    assert load(tmp_path / "met").model("depth").trained_with == ("text", "infrared")
    for part in ("", "Config", "Processor"):
        with pytest.raises(UserError, match="is a LanguageBindDepth, not a LanguageBindAudio"):
            getattr(languagebind, f"LanguageBindAudio{part}").from_pretrained(tmp_path / "run")
    tower = languagebind.LanguageBindDepthTower(tmp_path / "run", Namespace(mm_vision_select_layer=-1))
    assert tower(tower.image_processor(files["depth"])["pixel_values"]).shape[0] == len(files["depth"])


def test_adapters_are_exported_for_peft(depth_shards, clip_folder, files, tmp_path):
    from peft import PeftModel

    for tuning in ("lora", "full"):
        flags = [f"--text-tower=local-dir:{clip_folder}", f"--tuning={tuning}", f"--name={tuning}", "--workers=0"]
        main(train_flags(depth_shards, tmp_path, *flags))
    command = "-m", "languagebind", "export", "--adapter"
    call(*command, f"--checkpoint={tmp_path / 'lora'}", f"--output={tmp_path / 'mine'}")
    base = LanguageBindDepth.from_pretrained(tmp_path / "mine")
    x = PROCESSORS["depth"](base.config)(files["depth"])["pixel_values"]
    with torch.no_grad():
        bare = base.get_image_features(x)
        found = PeftModel.from_pretrained(base, tmp_path / "mine" / "adapter").eval().get_image_features(x)
        expected = LanguageBindDepth.from_pretrained(tmp_path / "lora").get_image_features(x)
    close(found, expected)
    assert (bare - expected).abs().max() > 1e-4
    message = call(*command, f"--checkpoint={tmp_path / 'full'}", f"--output={tmp_path / 'no'}", status=2)
    assert "needs a checkpoint with LoRA adapters" in message


def test_what_the_published_layout_cannot_hold_is_not_exported(trained):
    with pytest.raises(UserError, match=r"share its checkpoint file, which languagebind\.load can read"):
        LanguageBindDepth.from_pretrained(trained)
    with pytest.raises(UserError, match=r"is not CLIP's: use languagebind\.get_tokenizer"):
        languagebind.LanguageBindDepthTokenizer.from_pretrained(trained)


def test_a_run_names_its_text_tower_by_where_it_lies(clip_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(clip_folder.parent)
    flags = ["--modality=depth", f"--text-pretrained={clip_folder.name}/open_clip_pytorch_model.bin"]
    text = parse_args([*flags, f"--text-tower=local-dir:{clip_folder.name}"]).model.text
    assert text.text_tower == f"local-dir:{clip_folder}"
    assert text.text_pretrained == str(clip_folder / "open_clip_pytorch_model.bin")
    assert parse_args([*flags, "--text-tower=ViT-L-14"]).model.text.text_tower == "ViT-L-14"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"there is no folder {tmp_path / clip_folder.name}"):
        build_text(TextConfig(f"local-dir:{clip_folder.name}"))


def test_sentence_transformers_encodes_what_it_can_name(toys, files, tmp_path):
    from sentence_transformers import SentenceTransformer

    from languagebind.sentence import LanguageBindModule

    sources = {name: toys / name for name in ("image", "audio", "video")}
    made = SentenceTransformer(modules=[LanguageBindModule(sources)], device="cpu")
    made.save(str(tmp_path / "saved"))
    saved = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    own = load(sources)
    for inputs, name in ((TEXTS, "text"), *((files[name], name) for name in sources)):
        expected = own.encode(**{name: inputs})
        for model in (made, saved):
            close(torch.from_numpy(model.encode(inputs)), expected)
    close(torch.from_numpy(saved.encode([Image.open(files["image"][0])])), own.encode(image=files["image"][:1]))
    options = {"trust_remote_code": True, "device": "cpu"}
    half = SentenceTransformer(str(tmp_path / "saved"), model_kwargs={"dtype": "float16"}, **options)
    for model in (half, saved.half()):
        assert model.dtype == torch.float16
        close(torch.from_numpy(model.encode(files["image"])), own.encode(image=files["image"]), 1e-2)
    with pytest.raises(UserError, match="sentence-transformers does not support depth"):
        LanguageBindModule({"depth": toys / "depth"})


def test_encoding_depth_imports_and_reads_no_more_than_it_needs(toys, files):
    code = (
        "import sys\nfrom languagebind import load\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: event == 'open' and opened.append(str(args[0])))\n"
        f"model = load({str(toys / 'depth')!r})\n"
        f"model.encode(depth=[{files['depth'][0]!r}])\nmodel.encode(text=['a dog'])\n"
        "print(sorted({'decord', 'torchaudio', 'cv2', 'av', 'torchcodec', 'soundfile'} & sys.modules.keys()))\n"
        "print(sum(name.endswith('config.json') for name in opened))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "1"]  # the config is read once
