"""Any vision transformer of timm as the encoder, beside our own ViT: PE-Core, SigLIP2, EVA, DINOv3, plain ViTs.

timm's parameter names stay, after `vision_model.trunk.`. A clip's frames are encoded one by one. Of either encoder, the
library uses the call, `blocks` (for engines and compiling), `width`, `head`, `projection_bias` and, for `dense.py`,
`feature_map` and `resize`; the names of their parts are in `tuning.py`.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .clip4clip import CLIP4CLIP, INPUTS, clip_model, read_head
from .config import UserError, first_line
from .text import activation_of
from .vit import EncoderConfig, VisionTransformer, frames_of, whole_patches
from .weights import open_clip_pixels

TIMM = "timm/"
Options = dict[str, Any]


class TimmTower(nn.Module):
    """A vision transformer of timm from (B, C, T, H, W) to (B, D), or to the features (B, T, D) of a clip's frames.

    `head` is the temporal head that takes the features of frames, by default the mean, as PE-Core encodes clips.
    """

    projection_bias = True  # timm's heads have one

    def __init__(self, input_shape: tuple[int, int, int, int], config: EncoderConfig):
        super().__init__()
        self.input_shape, self.sizes = tuple(input_shape), config
        self.head = config.temporal_head or ("mean" if input_shape[1] > 1 else None)
        options: dict[str, Any] = {"in_chans": input_shape[0], "img_size": input_shape[2:]}
        if config.patch_dropout:  # some models do not have it
            options["patch_drop_rate"] = config.patch_dropout
        self.trunk = timm_model(str(config.timm_model), **options | read_options(config.timm_options))
        self.width = self.trunk.num_features
        patches = self.trunk.patch_embed
        self.seen, patches.strict_img_size = whole_patches(input_shape[2:], patches.patch_size), False
        for module in self.trunk.modules():
            if hasattr(module, "qkv_bias_separate"):  # otherwise it skips the layer, and with it a LoRA adapter
                module.qkv_bias_separate = True
        if config.grad_checkpointing:
            for block in list(self.blocks)[: config.grad_checkpointing_blocks]:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    @property
    def blocks(self) -> nn.Sequential | nn.ModuleList:
        """The transformer blocks, from the input on."""
        return self.trunk.blocks

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features of (B, *input_shape) before the projection: (B, D), or (B, T, D) for a temporal head."""
        x = self.trunk(frames_of(inputs, self.input_shape)[..., : self.seen[0], : self.seen[1]])  # (B*T, D)
        return x if self.head is None else x.unflatten(0, (-1, self.input_shape[1]))

    def feature_map(self, inputs: Tensor) -> Tensor:
        """Return features (B, T, h, w, D) of the patches, before the projection, of inputs (B, C, T, H, W)."""
        x = self.trunk.forward_features(frames_of(inputs, self.input_shape)[..., : self.seen[0], : self.seen[1]])
        x = x[:, self.trunk.num_prefix_tokens :]
        if (pool := getattr(self.trunk, "attn_pool", None)) is not None:  # each patch alone has all its attention
            x = pool(x.flatten(0, 1).unsqueeze(1)).unflatten(0, x.shape[:2])
        x = self.trunk.fc_norm(x).unflatten(1, self.trunk.patch_embed.grid_size)
        return x.unflatten(0, (-1, self.input_shape[1]))

    def resize(self, height: int, width: int) -> None:
        """Change the height and width of the inputs. Positions are interpolated."""
        self.input_shape = (*self.input_shape[:2], height, width)
        self.seen = whole_patches((height, width), self.trunk.patch_embed.patch_size)
        self.trunk.set_input_size(img_size=(height, width))


def build_encoder(input_shape: tuple[int, int, int, int], config: EncoderConfig) -> VisionTransformer | TimmTower:
    """Return timm's model if the config names one, and our own ViT otherwise."""
    return VisionTransformer(input_shape, config) if config.timm_model is None else TimmTower(input_shape, config)


def timm_model(name: str, **options: Any) -> Any:
    """Return a vision transformer of timm without a classifier. Raises `UserError` if it cannot be built."""
    import timm

    try:
        model = timm.create_model(name, num_classes=0, **options)
    except Exception as error:  # timm and the hub raise many types
        near = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:3]) or "see timm.list_models()"
        raise UserError(f"timm cannot build {name}: {first_line(error)} (known: {near})") from error
    if not hasattr(model, "blocks") or not hasattr(getattr(model, "patch_embed", None), "patch_size"):
        raise UserError(f"timm's {name} is not a plain vision transformer; choose another --encoder-tower")
    return model


def read_options(words: tuple[str, ...]) -> dict[str, Any]:
    """Return options such as `depth=2` or `global_pool=avg` as arguments for timm's `create_model`."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--timm-options takes NAME=VALUE, such as depth=2, not {word!r}")
        found[key] = value
        with suppress(ValueError):  # it is text
            found[key] = json.loads(value)
    return found


@cache
def tower_options(name: str, pretrained: str | None, cache_dir: str | None = None) -> tuple[Options, Options]:
    """Return the options of the encoder, and those of its inputs, that an --encoder-tower sets.

    CLIP's towers set our ViT's sizes and pictures' size, mean and std; others timm's model and all; `none` nothing.
    Raises `UserError` if there is no such tower, or it is not a vision transformer.
    """
    if name == "none":
        return {}, {}
    if name.startswith(TIMM):
        name = name.removeprefix(TIMM)
        tag = "" if pretrained in (None, "none") or Path(pretrained).exists() else f".{pretrained}"
        with torch.device("meta"):
            known = timm_model(name + tag).pretrained_cfg
        return {"timm_model": name}, image_options(known["input_size"][-1], known)
    visual: Any = clip_model(name, None, cache_dir, sizes_only=True).visual
    trunk = getattr(visual, "trunk", None)  # a model of timm
    blocks = getattr(trunk, "blocks", None) or getattr(getattr(visual, "transformer", None), "resblocks", None)
    if not blocks or (hasattr(visual.head, "mlp") if trunk else (visual.pool_type, visual.attn_pool) != ("tok", None)):
        raise UserError(f"--encoder-tower {name} is not a plain vision transformer; choose another")
    size, pixels = visual.image_size[0], getattr(visual, "preprocess_cfg", {}) | open_clip_pixels(name, pretrained)
    if trunk:
        pool = (f"global_pool={trunk.global_pool}",)
        return {"timm_model": trunk.pretrained_cfg["architecture"], "timm_options": pool}, image_options(size, pixels)
    attention, mlp_dim = blocks[0].attn, blocks[0].mlp.c_fc.out_features
    sizes = {"num_heads": attention.num_heads, "mlp_dim": mlp_dim, "activation": activation_of(blocks[0])}
    sizes = dict(sizes, patch_size=visual.patch_size[0], width=visual.conv1.out_channels, depth=len(blocks))
    if name.startswith(CLIP4CLIP):
        return sizes | read_head(name)[0], {"image_size": size, **INPUTS}
    return sizes, {"image_size": size, "image_mean": tuple(pixels["mean"]), "image_std": tuple(pixels["std"])}


def image_options(size: int, pixels: Mapping[str, Any]) -> Options:
    """Return the options of picture modalities for a size and the preprocessing that open_clip or timm records."""
    mode = pixels.get("resize_mode", "squash" if pixels.get("crop_mode") == "squash" else "shortest")
    resize = {"interpolation": pixels["interpolation"], "resize_mode": mode}
    mean, std = (tuple(map(float, pixels[key])) for key in ("mean", "std"))
    return {"image_size": size, "image_mean": mean, "image_std": std, "antialias": True, **resize}
