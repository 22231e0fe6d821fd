"""Checkpoints in the published layout give the original's features."""

import json

import numpy as np
import pytest
import torch

from languagebind.lora import merge_lora
from languagebind.text import ClipText, ClipTextConfig, Tokenizer
from languagebind.vit import EncoderConfig, VisionTransformer
from languagebind.weights import load_strict, read_state

CASES = ["audio_ft", "audio_lora", "depth_lora", "image", "thermal_lora", "video_ft", "video_lora", "video_v15_ft"]


@pytest.mark.parametrize("case", CASES)
def test_features_match_the_original(golden, case):
    folder = golden / "golden" / case
    expected = np.load(folder / "golden.npz")
    config = json.loads((folder / "config.json").read_text())
    weights = next(path for path in folder.iterdir() if path.name.startswith(("model.", "pytorch_model.")))
    state = merge_lora(read_state(weights), config["vision_config"].get("lora_alpha", 16))

    inputs = torch.from_numpy(expected["pixel_values"])
    inputs = inputs if inputs.ndim == 5 else inputs.unsqueeze(2)  # (B, C, T, H, W)
    with torch.inference_mode():
        pooled = vision_model(state, config["vision_config"], inputs.shape[1:])(inputs)
        text = text_model(state, config["text_config"])(torch.from_numpy(expected["input_ids"]))
    features = torch.nn.functional.normalize(pooled @ state["visual_projection.weight"].T, dim=-1)
    text_features = torch.nn.functional.normalize(text @ state["text_projection.weight"].T, dim=-1)
    logits = state["logit_scale"].exp() * text_features @ features.T

    for name, tensor in {
        "pooled": pooled,
        "image_embeds": features,
        "text_embeds": text_features,
        "logits_per_text": logits,
    }.items():
        torch.testing.assert_close(
            tensor, torch.from_numpy(expected[name]), atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def vision_model(state, config, input_shape) -> VisionTransformer:
    model = VisionTransformer(
        tuple(input_shape),
        EncoderConfig(
            patch_size=config["patch_size"],
            width=config["hidden_size"],
            depth=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            mlp_dim=config["intermediate_size"],
            activation=config["hidden_act"],
            temporal_attention=config["add_time_attn"],
            patch_embedding="3d" if config.get("clip_type") == "vl_new" else "2d",
        ),
    )
    load_strict(model, part(state, "vision_model."), "the encoder")
    return model.eval()


def text_model(state, config) -> ClipText:
    sizes = ClipTextConfig(
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        activation=config["hidden_act"],
    )
    model = ClipText(sizes, Tokenizer(lambda texts: None))
    load_strict(model, part(state, "text_model."), "the text tower")
    return model.eval()


def part(state, prefix):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
