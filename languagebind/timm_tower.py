"""Any vision transformer of timm as the encoder, beside our own ViT: PE-Core, SigLIP2, EVA, DINOv3, plain ViTs.

timm's parameter names stay, after `vision_model.trunk.`. A clip's frames are encoded one by one. Of either encoder, the
library uses the call, `blocks` (for engines and compiling), `pool`, `width`, `projection_bias` and, for `dense.py`,
`tokens`, `feature_map` and `resize`; the names of their parts are in `tuning.py`.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .clip4clip import CLIP4CLIP, clip_model, head_options
from .config import UserError, first_line
from .text import activation_of
from .vit import EncoderConfig, VisionTransformer, warn_of_lost_pixels
from .weights import State, open_clip_pixels, published_names

TIMM = "timm/"


class TimmTower(nn.Module):
    """A vision transformer of timm from (B, C, T, H, W) to (B, T, D), the features of each frame.

    Args:
        input_shape: (C, T, H, W) of one sample, the only accepted shape.
        config: timm's name and options of the model, patch dropout and gradient checkpointing.
    """

    projection_bias = True  # timm's heads have one

    def __init__(self, input_shape: tuple[int, int, int, int], config: EncoderConfig):
        super().__init__()
        self.input_shape, self.sizes = tuple(input_shape), config
        options: dict[str, Any] = {"in_chans": input_shape[0], "img_size": input_shape[2:]}
        if config.patch_dropout:  # some models do not have it
            options["patch_drop_rate"] = config.patch_dropout
        self.trunk = timm_model(str(config.timm_model), **options | read_options(config.timm_options))
        self.width = self.trunk.num_features
        warn_of_lost_pixels(input_shape[2:], self.trunk.patch_embed.patch_size)
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
        """Return the features (B, T, D) of each frame before the projection into the shared space.

        Raises `ValueError` if the inputs are not (B, *input_shape).
        """
        return self.pool(self.tokens(inputs))

    def tokens(self, inputs: Tensor) -> Tensor:
        """Return the last block's output (B*T, N, D), after timm's norm, for inputs (B, C, T, H, W).

        Raises `ValueError` if the inputs are not (B, *input_shape).
        """
        if inputs.ndim != 5 or tuple(inputs.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(f"the encoder takes (B, C, T, H, W) = (B, {expected}), got {tuple(inputs.shape)}")
        return self.trunk.forward_features(inputs.transpose(1, 2).flatten(0, 1))

    def pool(self, x: Tensor) -> Tensor:
        """Return the features of each frame for the output of `tokens`: (B*T, N, D) -> (B, T, D)."""
        return self.trunk.forward_head(x).unflatten(0, (-1, self.input_shape[1]))

    def feature_map(self, x: Tensor) -> Tensor:
        """Return features (B, T, h, w, D) of the patches, before the projection, for the output of `tokens`.

        Attention pooling sees each patch alone, which then has all its attention.
        """
        x = x[:, self.trunk.num_prefix_tokens :]
        if (pool := getattr(self.trunk, "attn_pool", None)) is not None:
            x = pool(x.flatten(0, 1).unsqueeze(1)).unflatten(0, x.shape[:2])
        x = self.trunk.fc_norm(x).unflatten(1, self.trunk.patch_embed.grid_size)
        return x.unflatten(0, (-1, self.input_shape[1]))

    def resize(self, height: int, width: int) -> None:
        """Change the height and width of the inputs. Positions are interpolated."""
        self.input_shape = (*self.input_shape[:2], height, width)
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
    lacking = [part for part in ("patch_embed", "blocks", "forward_head") if not hasattr(model, part)]
    if lacking or not hasattr(model.patch_embed, "patch_size"):
        raise UserError(f"timm's {name} is not a plain vision transformer; choose another --encoder-tower")
    return model


def timm_state(name: str, config: EncoderConfig, pretrained: str) -> State:
    """Return timm's pretrained weights under our names, for --encoder-tower timm/NAME and a tag of timm."""
    model = timm_model(f"{name}.{pretrained}", pretrained=True, **read_options(config.timm_options))
    return published_names(model.state_dict())


def read_options(words: tuple[str, ...]) -> dict[str, Any]:
    """Return options such as `depth=2` or `global_pool=avg` as arguments for timm's `create_model`."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--timm-options takes NAME=VALUE, such as depth=2, not {word!r}")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def tower_options(name: str, pretrained: str | None, cache_dir: str | None = None) -> dict[str, Any]:
    """Return the options of the encoder and of its inputs that belong to an --encoder-tower.

    They are the sizes of our own ViT for CLIP's towers, and timm's model and its preprocessing for others; `none` has
    none.

    Raises `UserError` if there is no such tower, or it is not a vision transformer.
    """
    if name == "none":
        return {}
    if name.startswith(TIMM):
        name = name.removeprefix(TIMM)
        tag = "" if pretrained in (None, "none") or Path(pretrained).exists() else f".{pretrained}"
        with torch.device("meta"):
            known = timm_model(name + tag).pretrained_cfg
        pixels = {key: known[key] for key in ("mean", "std", "interpolation")}
        return {"timm_model": name} | image_options(known["input_size"][-1], pixels)
    visual: Any = clip_model(name, None, cache_dir, sizes_only=True).visual
    if name.startswith(CLIP4CLIP):
        return _clip_sizes(name, visual) | {"image_size": visual.image_size[0]} | head_options(name)
    if not hasattr(visual, "trunk"):
        return _clip_sizes(name, visual)
    if not hasattr(visual.trunk, "blocks") or hasattr(visual.head, "mlp"):
        raise UserError(f"--encoder-tower {name} is not a plain vision transformer; choose another")
    pixels = visual.preprocess_cfg | open_clip_pixels(name, pretrained)
    found = {"timm_model": visual.trunk.pretrained_cfg["architecture"]}
    found["timm_options"] = (f"global_pool={visual.trunk.global_pool}",)
    return found | image_options(visual.image_size[0], pixels)


def image_options(size: int, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of picture modalities for a size and the preprocessing that open_clip or timm records."""
    resize = {"interpolation": pixels["interpolation"], "resize_mode": pixels.get("resize_mode", "shortest")}
    mean, std = (tuple(map(float, pixels[key])) for key in ("mean", "std"))
    return {"image_size": size, "image_mean": mean, "image_std": std, "antialias": True, **resize}


def _clip_sizes(name: str, visual: Any) -> dict[str, Any]:
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if not blocks:
        raise UserError(f"--encoder-tower {name} is not a plain vision transformer; choose another")
    mlp_dim, activation = blocks[0].mlp.c_fc.out_features, activation_of(blocks[0])
    sizes = {"patch_size": visual.patch_size[0], "width": visual.conv1.out_channels}
    return dict(sizes, depth=len(blocks), num_heads=blocks[0].attn.num_heads, mlp_dim=mlp_dim, activation=activation)
