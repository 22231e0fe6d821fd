"""Models that are not of this library, several of them side by side, and CLIP_benchmark's folders, on real files."""

import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from colours import (
    COLOURS,
    IMAGE,
    Colours,
    Green,  # noqa: F401 - a model by its name here
    classification,
    colours_of,
    flags,
)
from eval_files import write_shard
from PIL import Image as Picture
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from languagebind.config import UserError
from languagebind.eval import load_dataset_config
from languagebind.eval.__main__ import main
from languagebind.eval.data.readers import EvalProtocol, Reader
from languagebind.eval.data.samples import read_samples
from languagebind.eval.evaluate import evaluate
from languagebind.eval.features import EncodeOptions, FeatureEncoder
from languagebind.eval.models import LOGIT_SCALE, load_eval_model, model_name
from languagebind.eval.results import comparison
from languagebind.modalities._images import MEAN, STD
from languagebind.modalities.video import Video

HERE = __name__
CPU = torch.device("cpu")
SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


# ---------------------------------------------------------------------------------------------- callables


class FileColours:
    """The same, of files, with arrays; a plain object."""

    modality = "image"

    def encode_text(self, texts):
        return colours_of(texts).numpy()

    def encode_files(self, files):
        pictures = [Picture.open(io.BytesIO(f) if isinstance(f, bytes) else f).convert("RGB") for f in files]
        return np.stack([np.asarray(picture).mean(axis=(0, 1)) / 255 - 0.3 for picture in pictures])


class Plain:
    """Neither a module nor with a fingerprint; its features need gradients."""

    modality = IMAGE

    def encode_text(self, texts):
        return nn.Parameter(colours_of(texts))

    def encode(self, batch):
        return nn.Parameter(Colours().eval().encode(batch))


class Distant(Colours):
    """For a modality that no dataset here is of."""

    modality = "depth"


class Loudness:
    """Of sounds as files: loud or quiet."""

    modality = "audio"

    def encode_text(self, texts):
        return [[1.0, 0.0] if "loud" in text else [0.0, 1.0] for text in texts]

    def encode_files(self, files):
        import soundfile

        peaks = [np.abs(soundfile.read(io.BytesIO(file))[0]).max() for file in files]
        return torch.tensor([[1.0, 0.0] if peak > 0.5 else [0.0, 1.0] for peak in peaks])


def broken(**changes):
    """A class whose instances are `Colours` but for some attributes."""
    return type("Broken", (Colours,), changes)


class Mistakes:
    rows = broken(encode=lambda self, batch: torch.zeros(len(batch) + 1, 3))
    flat = broken(encode=lambda self, batch: torch.zeros(len(batch)))
    wide = broken(encode_text=lambda self, texts: torch.ones(len(texts), 5))
    nan = broken(encode=lambda self, batch: torch.full((len(batch), 3), torch.nan))
    scale = broken(logit_scale=[1.0, 2.0])
    large_scale = broken(logit_scale=100.0)
    huge = broken(encode=lambda self, batch: torch.full((len(batch), 3), 1e25))
    kind = broken(modality="imu")
    nothing = object
    number = 3


# ---------------------------------------------------------------------------------------------- data


def result(spec, dataset, modality=None, **options):
    model, reader = load_eval_model(spec, CPU, modality)
    return evaluate(model, reader, dataset, workers=0, **options)


# ---------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("data", ["folders", "wds/colours/test/{0..1}.tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_callable_is_a_model(world, data, workers):
    found = {}
    for kind in ("Colours", "FileColours", "Green"):
        model, reader = load_eval_model(f"{HERE}:{kind}", CPU)
        found[kind] = evaluate(model, reader, classification(world / data), workers=workers, batch_size=7)
    assert 0.5 < found["Colours"]["metrics"]["top1"] < 1
    # The one is given tensors, the other paths or the bytes in the shard.
    assert found["FileColours"]["metrics"] == pytest.approx(found["Colours"]["metrics"])
    assert found["Green"]["metrics"]["top1"] == pytest.approx(1 / 3)
    assert found["Colours"]["protocol"]["text_fingerprint"] == "three colours"
    assert found["FileColours"]["protocol"]["text_fingerprint"] == f"{HERE}:FileColours"


def test_features_may_need_gradients(world):
    data = classification(world / "folders")
    assert result(f"{HERE}:Plain", data)["metrics"] == result(f"{HERE}:Colours", data)["metrics"]


def test_what_a_callable_may_leave_out(world):
    model, reader = load_eval_model(f"{HERE}:FileColours", CPU)
    assert model.logit_scale == pytest.approx(LOGIT_SCALE)
    assert load_eval_model(f"{HERE}:Colours", CPU)[0].logit_scale == 2
    manifest = world / "missing.jsonl"
    manifest.write_text('{"path": "nowhere.png", "label": "red"}\n')
    with pytest.raises(UserError, match=r"nowhere.png: No such file"):
        evaluate(model, reader, classification(manifest), workers=0)


def test_cached_features_are_those_of_the_same_callable(world, tmp_path):
    data = classification(world / "folders")
    specs = [f"{HERE}:{kind}" for kind in ("Colours", "Green", "Colours")]
    found = [result(spec, data, feature_cache=tmp_path) for spec in specs]
    assert found == [result(spec, data) for spec in specs]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="give the model a `fingerprint` that changes with its weights"):
        result(f"{HERE}:Plain", data, feature_cache=tmp_path)
    with pytest.raises(UserError, match="does not work with models that read files themselves"):
        result(f"{HERE}:FileColours", data, feature_cache=tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:f", "no_such_module cannot be imported: No module named 'no_such_module' .*PYTHONPATH"),
        ("languagebind.nothing:f", r"languagebind\.nothing cannot be imported: No module named"),
        (f"{HERE}:nothing", "should return an object with encode_text"),
        (f"{HERE}:Mistakes.number", r"Mistakes\.number should return an object"),
        (f"{HERE}:Mistakes.nothing", "an object with encode_text, and with encode or encode_files"),
        (f"{HERE}:Mistakes.kind", "the modality should be one of audio, depth.*, not 'imu'"),
        (f"{HERE}:Mistakes.scale", "logit_scale should be one number"),
        (f"{HERE}:Mistakes.large_scale", r"the logarithm of the scale \(CLIP's is ln 100, 4.61\), not 100"),
        (f"{HERE}:Mistakes.huge", "returns NaN or infinity for 30 of 30 inputs"),
        (f"{HERE}:Mistakes.rows", r"encode returns \(31, 3\), expected \(30, D\)"),
        (f"{HERE}:Mistakes.flat", r"encode returns \(30,\), expected \(30, D\)"),
        (f"{HERE}:Mistakes.nan", "returns NaN or infinity for 30 of 30 inputs"),
        ("open_clip:ViT-B-32", "name an open_clip model and its weights"),
        ("open_clip:ViT-B-32/laion3b", "open_clip cannot load ViT-B-32 .*known tags: openai"),
        ("open_clip:ViT-B-32/laion400m_e32", "the tag is right, but its weights are not in the cache"),
        ("open_clip:ViT-B-33/openai", "cannot load ViT-B-33 .*there is no such model .did you mean ViT-B-32"),
        ("none.pt", "no checkpoint at none.pt"),
    ],
)
def test_mistakes_in_a_model(world, spec, message):
    modality = "image" if spec.startswith("open_clip") else None
    with pytest.raises(UserError, match=message):
        result(spec, classification(world / "folders"), modality)


def test_features_of_another_size_than_those_of_texts_are_never_compared(world):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        result(f"{HERE}:Mistakes.wide", classification(world / "folders"))


def test_a_module_that_lacks_another(tmp_path, monkeypatch):
    (tmp_path / "needy_model.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needy_model cannot be imported: No module named 'not_installed_anywhere'"):
        load_eval_model("needy_model:f", CPU)


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """An open_clip model of random weights: its folder, and the name and file of another with its own pixel values."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SIZES, "preprocess_cfg": {}}))
    torch.save(open_clip.CLIP(**SIZES).state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "ViT-8.json").write_text(json.dumps(SIZES))
    open_clip.add_model_config(folder / "ViT-8.json")
    return folder


def test_open_clip_gives_its_own_features(world, tower):
    spec = f"open_clip:local-dir:{tower}"
    model, reader = load_eval_model(spec, CPU, "image")
    assert reader == IMAGE
    own, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tower}")
    samples = read_samples(classification(world / "folders"), reader)
    protocol, options = EvalProtocol("ours", Reader(reader)), EncodeOptions(workers=0)
    features, _ = FeatureEncoder(model, protocol, options).encode_samples(samples)
    pixels = torch.stack([reader.preprocess(sample.source)[:, 0] for sample in samples])
    texts = ["a red thing", "blue"]
    text_features, _ = FeatureEncoder(model, protocol, options).encode_texts(texts)
    with torch.no_grad():
        expected = own.eval().encode_image(pixels, normalize=True)
        expected_texts = own.encode_text(open_clip.get_tokenizer(f"local-dir:{tower}")(texts), normalize=True)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(text_features, expected_texts, atol=1e-5, rtol=1e-4)
    file = load_eval_model(f"open_clip:ViT-8/{tower / 'open_clip_pytorch_model.bin'}", CPU, "image")[0]
    assert file.text_fingerprint() == model.text_fingerprint()
    torch.testing.assert_close(FeatureEncoder(file, protocol, options).encode_samples(samples)[0], features)


def test_open_clip_sees_a_clip_as_the_mean_of_its_frames(tower):
    model, reader = load_eval_model(f"open_clip:local-dir:{tower}", CPU, "video")
    assert reader == Video(image_size=8)
    clips = torch.randn(2, 3, 8, 8, 8)
    with torch.no_grad():
        frames = [F.normalize(model.model.encode_image(clips[:, :, t]), dim=-1) for t in range(8)]
        torch.testing.assert_close(model.encode(clips), torch.stack(frames).mean(dim=0))
        still = clips[:, :, :1].expand(-1, -1, 8, -1, -1)
        torch.testing.assert_close(model.encode(still), frames[0])


def test_pixels_are_as_the_open_clip_model_wants_them(tower, tmp_path, caplog):
    wanted = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SIZES, "preprocess_cfg": wanted}))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes((tower / "open_clip_pytorch_model.bin").read_bytes())
    model, _ = load_eval_model(f"open_clip:local-dir:{tmp_path}", CPU, "image")
    assert "resize_mode 'squash'" in caplog.text
    bytes_ = torch.rand(2, 3, 1, 8, 8)
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (MEAN, STD))
    with torch.no_grad():
        expected = F.normalize(model.model.encode_image((bytes_[:, :, 0] - 0.5) / 0.25), dim=-1)
        torch.testing.assert_close(model.encode((bytes_ - mean) / std), expected, atol=1e-5, rtol=1e-4)


def test_open_clip_reads_what_it_is_told_to(tower):
    spec = f"open_clip:local-dir:{tower}"
    with pytest.raises(UserError, match=r"needs --modality: .* one of audio, depth"):
        load_eval_model(spec, CPU)
    with pytest.raises(UserError, match="reads pictures of 8 x 8 pixels, which audio does not provide"):
        load_eval_model(spec, CPU, "audio")
    assert load_eval_model(spec, CPU, "depth")[1].input_shape == (3, 1, 8, 8)


def test_names_of_models(tower):
    assert model_name("open_clip:ViT-B-32/laion2b") == "open_clip-ViT-B-32-laion2b"
    assert model_name("open_clip:ViT-B-32//w/clip.pt") == "open_clip-ViT-B-32-clip"
    assert model_name("open_clip:local-dir:/w/tower") == "open_clip-tower"
    assert model_name("my.models:best") == "my.models-best"
    assert model_name("org/Model_V1.5_FT") == "Model_V1.5_FT"


def test_models_side_by_side(world, tower, tmp_path, capsys):
    specs = [f"{HERE}:Colours", f"open_clip:local-dir:{tower}", f"{HERE}:Green"]
    configs = ["--config", str(world / "configs" / "here.yaml"), str(world / "configs" / "texts.yaml")]
    argv = flags(world, tmp_path, *configs, "--compare", "--model")
    main([*argv, *specs])
    out = capsys.readouterr().out.splitlines()
    names = [model_name(spec) for spec in specs]
    assert out[0].split() == ["dataset", "metric", *names, "chance"]
    results = {name: json.loads((tmp_path / f"here_{name}.json").read_text()) for name in names}
    low, high = results[names[0]]["intervals"]["top1"]
    top1 = next(line for line in out if line.split()[:2] == ["here", "top1"])
    assert f"{results[names[0]]['metrics']['top1']:.4f} ({low:.4f} to {high:.4f})" in top1
    warned = [line for line in out if line.startswith("warning: here: ")]
    assert len(warned) == 1
    assert f"the intervals of {names[1]} and {names[2]} overlap in top1" in warned[0]
    assert low > results[names[2]]["intervals"]["top1"][1], "the good one does not overlap"
    # What is there already is in the table all the same.
    (tmp_path / f"here_{names[2]}.json").unlink()
    main([*argv, *specs, "--skip-existing"])
    assert capsys.readouterr().out.splitlines() == out
    assert comparison([results[names[0]]]).count("warning") == 0
    # Results of other samples stand side by side, but are not said to overlap
    fewer = results[names[2]] | {"protocol": results[names[2]]["protocol"] | {"samples": 1}}
    _, *warnings = comparison([results[names[1]], fewer]).split("warning: ")
    assert warnings == ["here: the models differ in samples, so their values cannot be compared"]
    # In a file an infinite end is null
    endless = results[names[0]] | {"intervals": {"top1": [0.5, None]}}
    assert " (0.5000 to inf)" in comparison([endless])


def test_several_models_without_compare_have_a_table_each(world, tmp_path, capsys):
    config = str(world / "configs" / "here.yaml")
    main(flags(world, tmp_path, "--config", config, "--model", f"{HERE}:Colours", f"{HERE}:Green"))
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.endswith(":")] == [f"{HERE}-Colours:", f"{HERE}-Green:"]
    assert out.count("mean_per_class") == 2


def test_all_that_is_there(world, tmp_path, capsys):
    argv = flags(world, tmp_path, "--all", "--configs", str(world / "configs"), "--model")
    main([*argv, f"{HERE}:Colours"])
    out = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"here_{HERE}-Colours.json",
        f"texts_{HERE}-Colours.json",
    ]
    assert f"absent: gone ({world / 'gone'}); get it from: https://example.org/gone" in out
    assert "silent" not in out, "of another modality"
    main([*argv, f"{HERE}:Colours", "--skip-existing"])  # what is left is of another modality, which is no mistake
    with pytest.raises(UserError, match=r"here is image, .*, but the models read depth"):
        main(flags(world, tmp_path / "c", "--all", f"--configs={world / 'configs'}", f"--model={HERE}:Distant"))
    with pytest.raises(UserError, match=r"(?s)no datasets: .*absent: silent .*: https://example.org/silent"):
        main(flags(tmp_path, tmp_path / "b", "--all", "--configs", str(world / "configs"), "--model", f"{HERE}:Green"))
    with pytest.raises(UserError, match="leave out --config and --data"):
        main([*argv, f"{HERE}:Green", "--config", str(world / "configs" / "here.yaml")])


def test_data_that_is_there_is_not_called_absent_for_its_class_names(world, tmp_path):
    configs = tmp_path / "configs"
    configs.mkdir()
    text = "task: classification\nmodality: image\ndata: {}\nclass_names: {}\n"
    (configs / "here.yaml").write_text(text.format(world / "folders", "names.txt"))
    (configs / "names.txt").write_text("red\ngreen\nred\n")
    with pytest.raises(UserError, match="'red' is listed twice"):
        main(flags(world, tmp_path / "out", "--all", f"--configs={configs}", f"--model={HERE}:Colours"))


def test_every_config_of_the_repository_has_a_modality():
    from languagebind.modalities import modality_names

    files = sorted((Path(__file__).parents[1] / "configs" / "eval").glob("*.yaml"))
    assert len(files) >= 20
    for file in files:
        config = load_dataset_config(file, prepared=False)
        assert config.modality in modality_names(), file
        assert config.source, file


@pytest.mark.parametrize("name", ["here", "texts"])
def test_features_are_exported(world, tmp_path, name):
    config = str(world / "configs" / f"{name}.yaml")
    argv = flags(world, tmp_path, "--config", config, "--model", f"{HERE}:Colours")
    main([*argv, "--export-features", str(tmp_path / "features")])
    path = tmp_path / "features" / f"{name}_{HERE}-Colours.jsonl"
    tensors = load_file(path.with_suffix(".safetensors"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(tensors) == {"features", "text_features"}
    for kind, tensor in tensors.items():
        rows = [line for line in lines if line["tensor"] == kind]
        assert [row["row"] for row in rows] == list(range(len(tensor)))
        assert torch.allclose(tensor.norm(dim=1), torch.ones(len(tensor)))
    texts = [line["text"] for line in lines if line["tensor"] == "text_features"]
    samples = [line for line in lines if line["tensor"] == "features"]
    found = json.loads((tmp_path / f"{name}_{HERE}-Colours.json").read_text())
    scores = tensors["features"] @ tensors["text_features"].T
    if name == "here":
        right = [texts[k] == line["labels"][0] for k, line in zip(scores.argmax(dim=1), samples, strict=True)]
        assert np.mean(right) == pytest.approx(found["metrics"]["top1"])
    else:
        assert len(set(texts)) == len(texts)
        assert {caption for line in samples for caption in line["captions"]} == set(texts)
        expected = F.normalize(colours_of(texts).float(), dim=-1)
        torch.testing.assert_close(tensors["text_features"], expected)


def test_a_folder_of_clip_benchmark(world, tmp_path, capsys):
    folder = world / "wds" / "colours"
    main(flags(world, tmp_path, "--data", str(folder), "--clip-benchmark-keys", "--model", f"{HERE}:Colours"))
    found = json.loads((tmp_path / f"colours_{HERE}-Colours.json").read_text())
    plain = result(f"{HERE}:Colours", classification(folder / "test/{0..1}.tar", templates=("a {c} thing", "such {c}")))
    assert {key: found["metrics"][key] for key in plain["metrics"]} == plain["metrics"]
    assert found["protocol"]["templates"] == ["a {c} thing", "such {c}"]
    # What CLIP_benchmark's own result files hold.
    assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= found.keys()
    assert found["metrics"]["acc1"] == found["metrics"]["top1"]
    assert found["metrics"]["mean_per_class_recall"] == found["metrics"]["mean_per_class"]
    assert "acc1" not in capsys.readouterr().out
    # A config may name it, and give prompts of its own.
    (tmp_path / "mine.yaml").write_text("task: classification\ndata: wds/colours\ntemplates: only {c}\n")
    config = load_dataset_config(tmp_path / "mine.yaml", world)
    assert (config.templates, list(config.class_names.values())) == (("only {c}",), list(COLOURS))
    assert result(f"{HERE}:Colours", config)["protocol"]["samples"] == 30


def test_clip_benchmarks_retrieval_and_sounds(world, tmp_path):
    import soundfile

    sounds, texts = [], []
    for i, level in enumerate((0.9, 0.1, 0.8)):
        buffer = io.BytesIO()
        soundfile.write(buffer, np.full(800, level), 8000, format="FLAC")
        sounds.append((f"s{i}", {"flac": buffer.getvalue(), "cls": str(int(level < 0.5)).encode()}))
        texts.append(
            (f"s{i}", {"flac": buffer.getvalue(), "txt": f"{'loud' if level > 0.5 else 'low'} {i}\n".encode()})
        )
    for name, members in (("sounds", sounds), ("texts", texts)):
        write_shard(tmp_path / name / "test" / "0.tar", members)
        (tmp_path / name / "test" / "nshards.txt").write_text("1")
    (tmp_path / "sounds" / "classnames.txt").write_text("loud\nquiet\n")
    (tmp_path / "texts" / "dataset_type.txt").write_text("retrieval\n")
    folders = [str(tmp_path / name) for name in ("sounds", "texts")]
    main(flags(world, tmp_path / "out", "--data", *folders, "--clip-benchmark-keys", "--model", f"{HERE}:Loudness"))
    first, second = (
        json.loads((tmp_path / f"out/{name}_{HERE}-Loudness.json").read_text()) for name in ("sounds", "texts")
    )
    assert first["metrics"]["acc1"] == 1
    assert second["metrics"]["image_retrieval_recall@5"] == second["metrics"]["text_to_modality/R@5"] == 1
    assert second["metrics"]["text_retrieval_recall@5"] == second["metrics"]["modality_to_text/R@5"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("test/nshards.txt", "two", "should hold the number of shards, not 'two'"),
        ("test/nshards.txt", "2", "no such shard"),
        ("dataset_type.txt", "sorting", "task should be 'classification', .* or 'segmentation', not 'sorting'"),
        ("classnames.txt", None, "cannot read .*classnames.txt"),
        ("test/nshards.txt", None, "is not a webdataset folder of CLIP_benchmark"),
    ],
)
def test_damaged_folders_of_clip_benchmark(tmp_path, file, text, message):
    write_shard(tmp_path / "wds/test/0.tar", [("a", {"png": b"x", "cls": b"0"})])
    (tmp_path / "wds/test/nshards.txt").write_text("1")
    (tmp_path / "wds/classnames.txt").write_text("red\n")
    (tmp_path / "wds" / file).unlink(missing_ok=True)
    if text is not None:
        (tmp_path / "wds" / file).write_text(text)
    with pytest.raises(UserError, match=message):
        main(flags(tmp_path, tmp_path / "out", "--data", str(tmp_path / "wds"), "--model", f"{HERE}:Colours"))


def test_mistakes_on_the_command_line(world, tmp_path):
    config = ["--config", str(world / "configs" / "here.yaml")]
    colours = f"{HERE}:Colours"
    cases = [
        (config, "pass either --checkpoint or --model"),
        ([*config, "--checkpoint", "a.pt", "--model", colours], "pass either --checkpoint or --model"),
        ([*config, "--model", colours, colours], f"two results would be .*here_{HERE}-Colours.json"),
        ([*config, "--model", colours, "--modality", "depth"], "is for image, not depth"),
        (["--model", colours], "no datasets: name some with --config"),
        (["--model", colours, "--all", "--configs", str(tmp_path)], "no datasets: .* holds the data of none"),
        ([*config, "--model", colours, "--export-features", __file__], "test_eval_models.py cannot be written"),
    ]
    for argv, message in cases:
        with pytest.raises(UserError, match=message):
            main(flags(world, tmp_path / "out", *argv))
    assert not list((tmp_path / "out").glob("*"))
