"""Text towers, starting weights and tuning, on real open_clip models with random weights in files."""

import json
from dataclasses import replace

import open_clip
import pytest
import torch
from helpers import MINILM

from languagebind.config import UserError
from languagebind.lora import inject_lora, merge_lora
from languagebind.model import InitConfig, ModelConfig, build_model
from languagebind.text import TextConfig, build_text, fingerprint
from languagebind.transformer import Transformer
from languagebind.tuning import TuningConfig, apply_tuning
from languagebind.vit import EncoderConfig
from languagebind.weights import WeightsError, load_strict, read_state

VIT = "tiny-clip-of-the-tests"
VIT_SIZES = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a dog", "The big cat is on a very large table, for a while!", ""]
CLIP_INPUT = (3, 1, 32, 32)


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """A whole CLIP as open_clip saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{VIT}.json").write_text(json.dumps(VIT_SIZES))
    open_clip.add_model_config(folder)
    path = folder / "clip.pt"
    torch.save(open_clip.create_model(VIT).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def clip(clip_file):
    return open_clip.create_model(VIT, clip_file).eval()


@pytest.fixture(scope="module")
def minilm():
    return build_text(TextConfig(MINILM))


@pytest.fixture
def config(clip_file):
    """Sizes of that CLIP's encoder, and its weights for both towers."""
    return ModelConfig(
        encoder=EncoderConfig(patch_size=8, width=64, depth=4, num_heads=4, mlp_dim=256),
        text=TextConfig(VIT, clip_file),
        init=InitConfig(encoder_pretrained=clip_file),
    )


def test_clip_text_gives_open_clips_features(clip, clip_file):
    text_model, projection, size = build_text(TextConfig(VIT, clip_file))
    tokens = text_model.tokenizer(TEXTS)
    assert tokens["input_ids"].shape[1] < 77  # cut after the longest
    with torch.no_grad():
        ours, theirs = projection(text_model(**tokens)), clip.encode_text(open_clip.get_tokenizer(VIT)(TEXTS))
    assert size == theirs.shape[1]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_encoder_from_clip_gives_open_clips_image_features(clip, config):
    model, images = build_model(config, CLIP_INPUT).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = model.encode(images.unsqueeze(2))
        theirs = clip.encode_image(images, normalize=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_sentence_encoder_does_not_depend_on_what_else_is_in_the_batch(minilm):
    text_model, projection, size = minilm
    with torch.no_grad():
        together = projection(text_model(**text_model.tokenizer(TEXTS)))
        alone = torch.cat([projection(text_model(**text_model.tokenizer([text]))) for text in TEXTS])
    assert together.shape == (3, size) == (3, 384)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TextConfig(VIT), "needs --text-pretrained"),
        (TextConfig(VIT, "no_such_tag"), "no_such_tag"),
        (TextConfig("ViT-X-99", "openai"), "ViT-X-99"),
        (TextConfig("package:no_such_package/model"), "no_such_package is not installed"),
        (TextConfig("hf:/no/such/folder"), "/no/such/folder"),
    ],
)
def test_a_text_tower_that_cannot_be_had_is_named(text, message):
    with pytest.raises(UserError, match=message):
        build_text(text)


def test_fingerprint_is_of_weights_and_tokenizer(minilm):
    text_model, projection, _ = minilm
    before = fingerprint(text_model, projection)
    assert before == fingerprint(text_model, projection)
    weight = next(text_model.parameters())
    with torch.no_grad():
        weight[0, 0] += 1e-3
        changed = fingerprint(text_model, projection)
        weight[0, 0] -= 1e-3
    assert changed != before


def test_frozen_is_complete(config):
    model = build_model(config, CLIP_INPUT)
    apply_tuning(model, TuningConfig("full"))
    model.train()
    assert model.vision_model.training
    assert not any(module.training for module in model.text_model.modules())
    assert not any(parameter.requires_grad for parameter in model.text_model.parameters())
    assert not any(key.startswith("text_") for key in model.encoder_state())
    assert not model.encode_text(model.tokenize(["a"])).requires_grad


def test_positions_are_resized_and_time_attention_starts_as_a_copy(config):
    config = replace(config, encoder=replace(config.encoder, temporal_attention=True, patch_embedding="3d"))
    model, source = build_model(config, (3, 4, 16, 40)), read_state(config.init.encoder_pretrained)
    positions = model.vision_model.embeddings.position_embedding.weight
    assert positions.shape == (1 + 2 * 5, 64)
    assert torch.equal(positions[0], source["vision_model.embeddings.position_embedding.weight"][0])
    block = model.vision_model.encoder.layers[3]
    assert torch.equal(block.temporal_attn.q_proj.weight, block.self_attn.q_proj.weight)
    assert torch.equal(block.temporal_layer_norm1.bias, block.layer_norm1.bias)
    assert model.vision_model.embeddings.class_embedding.shape == (4, 64)
    expected = source["vision_model.embeddings.patch_embedding.weight"]
    assert torch.equal(model.vision_model.embeddings.patch_embedding.weight[:, :, 0], expected)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("visual.ln_pre.bias"), r"1 missing:\n.*pre_layrnorm.bias"),
        (
            lambda state: state.update({"visual.transformer.resblocks.99.ln_1.bias": torch.zeros(64)}),
            "1 unexpected:\n.*99",
        ),
        (
            lambda state: state.update({"visual.class_embedding": torch.zeros(7)}),
            r"1 of another shape:\n.*\(7,\), expected \(64,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_keys(config, clip, tmp_path, spoil, message, caplog):
    state = dict(clip.state_dict())
    spoil(state)
    torch.save(state, tmp_path / "spoilt.pt")
    init = InitConfig(encoder_pretrained=str(tmp_path / "spoilt.pt"))
    with pytest.raises(WeightsError, match=message):
        build_model(replace(config, init=init), CLIP_INPUT)
    build_model(replace(config, init=replace(init, allow_partial=True)), CLIP_INPUT)
    assert "only in part" in caplog.text


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (InitConfig(), "--encoder-pretrained FILE"),
        (InitConfig(encoder_pretrained="laion400m_e32"), "add --encoder-tower"),
        (InitConfig(encoder_pretrained="no_such_tag", encoder_tower=VIT), "no_such_tag"),
        (InitConfig(encoder_pretrained="none", init_temperature=0), "keeps the pretrained logit scale"),
    ],
)
def test_a_start_that_cannot_be_made_is_refused(config, init, message):
    with pytest.raises(UserError, match=message):
        build_model(replace(config, init=init), CLIP_INPUT)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_weights_file_is_named(tmp_path, content):
    path = tmp_path / "weights.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pt"):
        read_state(path)


def test_a_weights_file_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt"):
        read_state(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


BESIDE = {
    "vision_model.embeddings.class_embedding",
    "vision_model.post_layernorm.weight",
    "vision_model.post_layernorm.bias",
    "visual_projection.weight",
    "logit_scale",
}
OF_TIME = ("temporal_embedding", "temporal_layer_norm1.weight", "temporal_layer_norm1.bias")


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("tuning", ["lora", "partial", "full", "head"])
def test_what_trains(minilm, tuning, temporal):
    encoder = EncoderConfig(patch_size=8, width=32, depth=1, num_heads=4, mlp_dim=64, temporal_attention=temporal)
    config = ModelConfig(encoder, TextConfig(MINILM), TuningConfig(tuning, lora_rank=2), InitConfig("none"))
    model = build_model(config, (3, 2, 16, 16))
    apply_tuning(model, config.tuning)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    attention = "temporal_attn" if temporal else "self_attn"
    projections = [f"vision_model.encoder.layers.0.{attention}.{p}_proj" for p in ("q", "k", "v", "out")]
    of_time = {f"vision_model.encoder.layers.0.{name}" for name in OF_TIME if temporal}
    expected = {
        "lora": BESIDE | of_time | {f"{name}.lora_{half}.default.weight" for name in projections for half in "AB"},
        "partial": BESIDE | of_time | {f"{name}.{kind}" for name in projections for kind in ("weight", "bias")},
        "full": {name for name, _ in model.named_parameters() if not name.startswith("text_")},
        "head": BESIDE - {"vision_model.embeddings.class_embedding"},
    }[tuning]
    assert trains == expected


def test_learn_temperature_can_be_switched_off(minilm):
    encoder = EncoderConfig(patch_size=8, width=32, depth=1, num_heads=4, mlp_dim=64)
    config = ModelConfig(encoder, TextConfig(MINILM), TuningConfig("full", learn_temperature=False), InitConfig("none"))
    model = build_model(config, (3, 1, 16, 16))
    apply_tuning(model, config.tuning)
    assert not model.logit_scale.requires_grad


@pytest.mark.parametrize("old_names", [False, True])
def test_merged_adapters_give_the_same_outputs(old_names):
    plain, adapted = (Transformer(2, 32, 4, 64, "gelu") for _ in range(2))
    inject_lora(adapted, rank=4, alpha=8, dropout=0.5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # they start at zero, where merging would show nothing
    state = adapted.state_dict()
    if old_names:
        state = {key.replace(".base_layer.", "."): value for key, value in state.items()}
    load_strict(plain, merge_lora(state, alpha=8), "the encoder")
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(plain.eval()(x), adapted.eval()(x), atol=1e-5, rtol=1e-5)


def test_half_an_adapter_is_refused():
    state = {"q_proj.weight": torch.zeros(4, 4), "q_proj.lora_A.default.weight": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match="q_proj is incomplete"):
        merge_lora(state, 16)
    state["q_proj.lora_B.default.weight"] = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="does not fit"):
        merge_lora(state, 16)
