"""Towers of timm as encoders, against open_clip's own outputs."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from helpers import MINILM, ROOT, losses, train_flags
from open_clip import create_model, get_tokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tiny_towers import SIGLIP_TEXT, VISION, write_tower
from torch.nn import functional as F

from languagebind import load
from languagebind.config import UserError
from languagebind.data.embed_text import main as embed_text
from languagebind.eval.data.readers import choose_protocol
from languagebind.eval.models import load_eval_model
from languagebind.lora import inject_lora
from languagebind.modalities._images import MEAN, PREPROCESSING
from languagebind.model import build_model
from languagebind.timm_tower import build_encoder, tower_options
from languagebind.tuning import apply_tuning
from languagebind.vit import EncoderConfig
from training.main import main as train
from training.params import parse_args

NARROW = ("depth=1", "embed_dim=32", "num_heads=2")


def run_of(tower, *more, modality="image", text=None):
    """The options of a run with an open_clip folder as both towers."""
    text = text or f"local-dir:{tower}"
    return parse_args([f"--modality={modality}", f"--text-tower={text}", "--text-pretrained=own", "--tuning=full",
                       f"--encoder-tower=local-dir:{tower}", "--encoder-pretrained=own", *more])  # fmt: skip


def model_of(config):
    return build_model(config.model, config.inputs.input_shape).eval()


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """An open_clip model of each kind: its folder and itself."""
    root = tmp_path_factory.mktemp("towers")
    return {kind: (root / kind, write_tower(root / kind, kind)) for kind in VISION}


@pytest.mark.parametrize("kind", VISION)
def test_features_are_open_clips(towers, kind):
    folder, own = towers[kind]
    config = run_of(folder)
    model, x = model_of(config), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.project(x[:, :, None]), own.encode_image(x), atol=1e-6, rtol=1e-6)
        clips = torch.randn(2, 3, 4, 32, 32)
        video = model_of(run_of(folder, "--num-frames=4", modality="video"))
        frames = F.normalize(own.encode_image(clips.transpose(1, 2).flatten(0, 1)), dim=-1).view(2, 4, -1)
        expected = F.normalize(frames.mean(dim=1), dim=-1)
        torch.testing.assert_close(video.encode(clips), expected, atol=1e-6, rtol=1e-6)


def test_evaluation_reads_pictures_as_the_tower_does(towers):
    folder, own = towers["pe"]
    model, modality = load_eval_model(f"open_clip:local-dir:{folder}", torch.device("cpu"), "depth")
    ours = run_of(folder, "--no-fast-resize", modality="depth").inputs
    assert modality == ours
    assert (ours.image_std, ours.interpolation, ours.antialias) == ((0.5,) * 3, "bilinear", True)
    x = torch.randn(2, 3, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x), F.normalize(own.encode_image(x[:, :, 0]), dim=-1))
    with pytest.raises(UserError, match="the paper's protocol reads pictures as CLIP does, but this model sets"):
        choose_protocol("paper", {"inputs": "picture"}, None, modality)


def test_a_text_tower_as_siglip2s(depth_shards, tmp_path):
    own = write_tower(tmp_path / "siglip", "siglip", SIGLIP_TEXT, init_logit_bias=-10)
    siglip = ["--loss=siglip", "--init-logit-bias=-10", "--init-temperature=0"]
    model = model_of(run_of(tmp_path / "siglip", *siglip))
    assert (model.logit_scale, model.logit_bias) == (own.logit_scale, own.logit_bias)
    texts = ["a box", "A pole, right of the middle! " * 20]
    with torch.no_grad():
        expected = own.encode_text(get_tokenizer(f"local-dir:{tmp_path / 'siglip'}")(texts), normalize=True)
    assert model.tokenize(texts)["input_ids"].shape == (2, 64)
    torch.testing.assert_close(model.encode_text(model.tokenize(texts)), expected, atol=1e-6, rtol=1e-6)
    shards = shutil.copytree(depth_shards, tmp_path / "shards")
    embed_text([f"--train-data={shards}", f"--text-tower=local-dir:{tmp_path / 'siglip'}", "--caption-source=raw"])
    tower = f"local-dir:{tmp_path / 'siglip'}"
    flags = [f"--text-tower={tower}", f"--encoder-tower={tower}", "--encoder-pretrained=own", *siglip, "--warmup=1"]
    more = ["--batch-size=8", "--train-num-samples=16", "--workers=0", "--precision=fp32", "--caption-source=raw"]
    for mode in ("live", "cached"):
        run = [f"--train-data={shards}", f"--logs={tmp_path}", f"--name={mode}", f"--text-features={mode}"]
        train(["--modality=depth", *flags, *more, *run, "--log-every-n-steps=1"])
    assert losses(tmp_path, "cached") == pytest.approx(losses(tmp_path, "live"), abs=2e-3)
    assert load(tmp_path / "live").encode(text=texts).shape == (2, 32)


def test_the_head_in_timms_file_is_the_projection_and_must_not_be_missing(towers, tmp_path):
    (folder, own), file = towers["pe"], tmp_path / "file.pt"
    config, x = run_of(folder, f"--encoder-pretrained={file}"), torch.randn(2, 3, 1, 32, 32)
    timms, open_clips = own.visual.trunk.state_dict(), own.state_dict()
    torch.save(timms, file)
    torch.testing.assert_close(model_of(config).project(x), own.encode_image(x[:, :, 0]), atol=1e-6, rtol=1e-6)
    for state in (timms, open_clips):
        torch.save({key: x for key, x in state.items() if "head" not in key}, file)
        with pytest.raises(UserError, match=r"1 missing:\n  visual_projection.weight"):
            model_of(config)


def test_positions_of_a_grid_that_is_not_square_are_not_resized(towers, tmp_path):
    flags = ["--num-mel-bins=16", "--target-length=40", f"--encoder-pretrained={tmp_path / 'own.pt'}"]
    model = model_of(run_of(towers["vit"][0], *flags[:2], modality="audio"))
    torch.save(model.encoder_state(), tmp_path / "own.pt")
    assert torch.equal(model_of(run_of(towers["vit"][0], *flags, modality="audio")).vision_model.trunk.pos_embed,
                       model.vision_model.trunk.pos_embed)  # fmt: skip
    with pytest.raises(UserError, match=r"pos_embed: \(1, 11, 32\), expected \(1, 17, 32\)"):
        model_of(run_of(towers["vit"][0], *flags, "--target-length=64", modality="audio"))


def test_an_encoder_starts_from_another_runs_checkpoint(towers, tmp_path):
    config = run_of(towers["pe"][0])
    model = model_of(config)
    torch.save(model.encoder_state(), tmp_path / "own.pt")
    again = run_of(towers["pe"][0], f"--encoder-pretrained={tmp_path / 'own.pt'}", "--image-size=64")
    assert torch.equal(model_of(again).vision_model.trunk.attn_pool.latent, model.vision_model.trunk.attn_pool.latent)
    assert model_of(again).vision_model.trunk.pos_embed.shape == (1, 65, 32)


def test_a_checkpoint_from_before_these_options_resumes(depth_shards, tmp_path):
    flags = train_flags(depth_shards, tmp_path, "--workers=0", "--train-num-samples=16", "--save-every-n-steps=1")
    train([*flags, "--name=whole"])
    path = tmp_path / "whole" / "checkpoints" / "step_00000001.pt"
    saved = torch.load(path, weights_only=True)
    config = saved["config"]
    for options, names in (
        (config["inputs"], PREPROCESSING),
        (config["model"]["encoder"], ("timm_model", "timm_options", "temporal_head", "temporal_head_depth")),
        (config["model"]["text"], ("context_length",)),
        (config["model"]["tuning"], ("tune_text",)),
        (config["data"], ("negatives",)),
        (config["optim"], ("matryoshka",)),
    ):
        for name in names:
            del options[name]
    torch.save(saved, tmp_path / "old.pt")
    tower = ["--encoder-tower=RN50", "--encoder-tower=none"]  # a tower that was ignored, and how to go on without it
    train([*flags, *tower, "--name=rest", f"--resume={tmp_path / 'old.pt'}"])
    assert losses(tmp_path, "rest")[2] == losses(tmp_path, "whole")[2]


@pytest.mark.parametrize("temporal", [False, True])
def test_the_batch_is_dynamic_in_an_exported_encoder(towers, temporal):
    shape = (3, 2, 32, 32)
    ours = EncoderConfig(patch_size=8, width=32, depth=1, num_heads=2, mlp_dim=64, temporal_attention=temporal)
    for config in (ours, run_of(towers["pe"][0]).model.encoder):
        encoder = build_encoder(shape, config).eval()
        batch = {0: torch.export.Dim("batch")}
        exported = torch.export.export(encoder, (torch.randn(2, *shape),), dynamic_shapes=(batch,)).module()
        for count in (1, 5):
            x = torch.randn(count, *shape)
            assert torch.equal(exported(x), encoder(x))


@pytest.mark.parametrize("kind", VISION)
def test_every_tower_learns_from_spectrograms(towers, kind):
    folder, _ = towers[kind]
    config = run_of(folder, "--num-mel-bins=16", "--target-length=40", modality="audio")
    model, own = model_of(config), create_model(f"local-dir:{folder}").eval()
    own.visual.set_input_size((16, 40))  # timm resizes the positions
    x = torch.randn(2, 3, 1, 16, 40)
    torch.testing.assert_close(model.project(x), own.encode_image(x[:, :, 0]), atol=1e-6, rtol=1e-6)
    apply_tuning(model, config.model.tuning)
    model.encode(x)[:, :5].sum().backward()
    assert all(x.grad is not None for name, x in model.named_parameters() if x.requires_grad and "logit" not in name)


def test_patches_are_dropped_in_training(towers):
    model = model_of(run_of(towers["pe"][0], "--patch-dropout=0.5"))
    x = torch.randn(2, 3, 1, 32, 32)
    assert model.vision_model.trunk.forward_features(x[:, :, 0]).shape == (2, 1 + 16, 32)
    assert model.train().vision_model.trunk.forward_features(x[:, :, 0]).shape == (2, 1 + 8, 32)


@pytest.mark.parametrize(("name", "count"), [("eva_giant_patch14_224", 2), ("vit_small_patch16_18x2_224", 4)])
def test_adapters_reach_attention_that_adds_its_bias_apart_or_is_parallel(name, count):
    tower = build_encoder((3, 1, 28, 28), EncoderConfig(timm_model=name, timm_options=NARROW))
    inject_lora(tower, rank=2, alpha=2, dropout=0.0)
    tower(torch.randn(2, 3, 1, 28, 28))[..., :5].sum().backward()
    adapters = {name: x.grad for name, x in tower.named_parameters() if "lora_B" in name}
    assert len(adapters) == count
    assert all(grad is not None and grad.any() for grad in adapters.values())


@pytest.mark.parametrize("tuning", ["lora", "partial"])
def test_blocks_without_attention_weights_are_refused(tuning):
    flags = ["--modality=image", f"--text-tower={MINILM}", "--encoder-tower=timm/vit_pwee_patch16_reg1_gap_256"]
    config = parse_args([*flags, "--encoder-pretrained=none", f"--tuning={tuning}", "--timm-options", *NARROW])
    with pytest.raises(UserError, match=f"--tuning {tuning} finds no attention weights in this tower"):
        apply_tuning(model_of(config), config.model.tuning)


def test_timms_own_weights_with_a_new_projection(tmp_path, monkeypatch):
    model = timm.create_model("tiny_vit")
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    known = replace(timm.get_pretrained_cfg("tiny_vit.untrained"), file=str(tmp_path / "vit.pth"))
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, "tiny_vit.untrained", known)
    flags = ["--modality=image", f"--text-tower={MINILM}", "--encoder-tower=timm/tiny_vit"]
    x = torch.randn(2, 3, 1, 32, 32)
    for source in ("untrained", str(tmp_path / "vit.pth")):
        ours = model_of(parse_args([*flags, f"--encoder-pretrained={source}"]))
        expected = model.eval().forward_head(model.forward_features(x[:, :, 0]), pre_logits=True)
        torch.testing.assert_close(ours.vision_model(x), expected)
        assert ours.project(x).shape == (2, 384)


def test_a_tower_brings_its_preprocessing_and_flags_win(towers):
    folder = towers["pe"][0]
    inputs = run_of(folder).inputs
    assert (inputs.image_size, inputs.image_mean, inputs.resize_mode) == (32, (0.5,) * 3, "squash")
    again = run_of(folder, "--image-size=64", "--resize-mode=shortest").inputs
    assert (again.image_size, again.image_mean, again.resize_mode) == (64, (0.5,) * 3, "shortest")
    clips, larger = (tower_options(*x)[1] for x in (("ViT-L-14", "laion2b_s32b_b82k"), ("ViT-L-14-336", "openai")))
    assert clips == {"image_size": 224, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    assert (larger["image_size"], larger["image_mean"]) == (336, MEAN)
    assert tower_options("timm/eva02_base_patch14_448", "mim_in22k_ft_in22k_in1k")[1]["resize_mode"] == "squash"
    # A picture with edges and without a square shape, as open_clip resizes it with PIL
    rows, columns = np.mgrid[:90, :140]
    pixels = np.stack([rows * 2, columns, 255 * (rows // 10 % 2)], axis=-1).astype(np.uint8)
    theirs = image_transform_v2(PreprocessCfg(**own_pixels(folder)), is_train=False)
    difference = inputs.preprocess(pixels)[:, 0] - theirs(Image.fromarray(pixels))
    assert difference.abs().max() * 0.5 * 255 < 1.5  # PIL rounds twice


def own_pixels(folder):
    return {"size": 32, **json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]}


def test_random_weights_are_of_the_named_tower(towers):
    config = run_of(towers["siglip"][0], "--encoder-pretrained=none")
    assert config.inputs.image_mean == (0.5,) * 3
    assert model_of(config).vision_model.trunk.attn_pool is not None
    clip = run_of(towers["siglip"][0], "--model=vit-tiny-demo", "--encoder-tower=ViT-B-32", "--encoder-pretrained=none")
    clip = clip.model.encoder
    assert (clip.timm_model, clip.patch_size, clip.width, clip.depth, clip.mlp_dim) == (None, 32, 768, 12, 3072)
    own = EncoderConfig(width=32, depth=1, num_heads=2, mlp_dim=32)
    unset = replace(config, model=replace(config.model, encoder=own))
    with pytest.raises(UserError, match="set timm_model to tiny_siglip for --encoder-tower local-dir:"):
        model_of(unset)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--encoder-tower=RN50"], "--encoder-tower RN50 is not a plain vision transformer"),
        (["--encoder-tower=convnext_base"], "--encoder-tower convnext_base is not a plain vision transformer"),
        (["--encoder-tower=ViT-L-14-CLIPA"], "--encoder-tower ViT-L-14-CLIPA is not a plain vision transformer"),
        (["--encoder-tower=coca_ViT-B-32"], "--encoder-tower coca_ViT-B-32 is not a plain vision transformer"),
        (["--encoder-tower=timm/resnet50"], "timm's resnet50 is not a plain vision transformer"),
        (["--encoder-tower=timm/vit_pe_core_tiny_patch16"], "timm cannot build .*known: vit_pe_core_tiny_patch16_384"),
        (["--encoder-tower=PE-Core-L-14"], "did you mean PE-Core-L-14-336"),
        (["--encoder-tower=timm/tiny_vit", "--encoder-pretrained=best"], "timm cannot build tiny_vit.best: Invalid"),
        (["--timm-options", "depth"], "--timm-options takes NAME=VALUE"),
        (["--timm-options", "deep=2"], "timm cannot build tiny_pe: .*deep"),
    ],
)
def test_what_cannot_be_is_refused(towers, flags, message):
    with pytest.raises(UserError, match=message):
        model_of(run_of(towers["pe"][0], "--encoder-pretrained=none", *flags))


@pytest.mark.parametrize("more", [[], ["--timm-options", "dynamic_img_size=true"]])
def test_a_width_that_is_not_whole_patches_is_cut_with_a_word(more, towers, caplog):
    flags = ["--num-mel-bins=16", "--target-length=44"]
    model = model_of(run_of(towers["pe"][0], *flags, *more, modality="audio"))
    assert "input size 16 x 44 is not a multiple of patch size 8 x 8; the extra pixels are ignored" in caplog.text
    x = torch.randn(1, 3, 1, 16, 44)
    whole = model_of(run_of(towers["pe"][0], flags[0], "--target-length=40", modality="audio"))
    torch.testing.assert_close(model.encode(x), whole.encode(x[..., :40]))


def test_sizes_of_our_own_vit_are_refused(towers, capsys):
    with pytest.raises(SystemExit):
        run_of(towers["pe"][0], "--width=512")
    assert "width is an option of our own ViT" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_tower_needs_weights():
    with pytest.raises(UserError, match="--encoder-tower ViT-B-32 needs --encoder-pretrained: a tag, a file or none"):
        parse_args(["--modality=depth", "--encoder-tower=ViT-B-32"])


def test_what_trains_is_as_the_page_says(towers):
    rows = []
    for tuning in ("lora", "partial", "full", "head"):
        cells = [trained_parts(run_of(towers[kind][0], f"--tuning={tuning}", "--lora-rank=2")) for kind in VISION]
        rows.append(f"| `{tuning}` | {' | '.join(cells)} |")
    page = (ROOT / "docs" / "towers.md").read_text()
    assert not [row for row in rows if row not in page], "\n".join(rows)


def trained_parts(config):
    """The parts of a tower that train, by timm's names; every block has the same ones."""
    model = model_of(config)
    apply_tuning(model, config.model.tuning)
    assert model.visual_projection.weight.requires_grad
    assert model.logit_scale.requires_grad
    if all(x.requires_grad for x in model.vision_model.parameters()):
        return "everything"
    trained = [name for name, x in model.vision_model.trunk.named_parameters() if x.requires_grad]
    trained = [re.sub(r"\.\d+|(?<=attn_pool)\..*|\.(weight|bias)$", "", name) for name in trained]
    parts = {re.sub(r"(.*)\.lora_[AB].*", r"adapters of \1", name) for name in trained}
    return ", ".join(re.sub(r"([\w.]+)$", r"`\1`", name) for name in sorted(parts))


@pytest.mark.parametrize("kind", VISION)
def test_every_block_compiles_to_one_graph(towers, kind):
    model = model_of(run_of(towers[kind][0])).train()
    x = torch.randn(2, 3, 1, 32, 32)
    expected = model.project(x)
    for block in model.vision_model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model.project(x), expected)
