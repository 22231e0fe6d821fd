"""Dense features: a feature for each patch that is comparable with texts, and maps of scores from them.

Training compares one pooled token with a text, so the last block's patch tokens lie far from the texts. Without any
training, they come close if the last block attends from queries to queries, and its residual and MLP are left out
(ClearCLIP, arXiv 2407.12442; NACLIP, arXiv 2404.08181).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import UserError

Mode = Literal["qq", "plain"]


def dense_tower(tower: Any, size: Sequence[int], mode: Mode) -> Any:
    """Return a copy of an encoder in evaluation mode that shares its weights, for inputs of another height and width.

    With the mode qq, its last block attends from queries to queries, without residual and MLP; plain: as in training.
    Raises `UserError` if the encoder has no dense features.
    """
    if mode not in ("qq", "plain"):
        raise ValueError(f"mode should be 'qq' or 'plain', not {mode!r}")
    if not hasattr(tower, "feature_map"):
        raise UserError("this encoder has no dense features; use an encoder of this library, of open_clip or of timm")
    try:
        tower = copy.deepcopy(tower, {id(weight): weight for weight in tower.parameters()}).eval()
    except AssertionError as error:  # FSDP's
        raise UserError("an encoder has no dense features while FSDP shards it; use its checkpoint") from error
    if tuple(size) != tower.input_shape[2:]:
        tower.resize(*size)
    if mode == "plain":
        return tower
    block = tower.blocks[-1]
    attention: Any = getattr(block, "self_attn", None) or getattr(block, "attn", None)
    if getattr(attention, "qkv", None) is None:
        attention.k_proj = attention.q_proj
    else:  # one layer in timm: queries, keys and values (..., 3 * D)
        attention.qkv.register_forward_hook(lambda _, args, x: x.unflatten(-1, (3, -1))[..., [0, 0, 2], :].flatten(-2))
    for own, other in (("q_norm", "k_norm"), ("q_bias", "k_bias")):
        if getattr(attention, other, None) is not None:
            setattr(attention, other, getattr(attention, own))
    outputs: list[Any] = []
    # timm's blocks pass the output of attention, scaled if they scale it, through `drop_path1` to the residual
    source = getattr(block, "drop_path1", attention)
    source.register_forward_hook(lambda module, args, output: outputs.append(output))
    block.register_forward_hook(lambda module, args, output: outputs.pop())
    return tower


@torch.no_grad()
def score_maps(
    score: Callable[..., Tensor], modality: Any, raw: Tensor, window: int | None = None, shape: Sequence[int] = ()
) -> Tensor:
    """Return the scores (T, K, H, W) of every pixel of a picture or clip, the `raw` signal of a modality; float32.

    `score` returns the scores (B, T, h, w, K) of the patches of windows (B, C, T, side, side) that cover the picture.
    They are interpolated to pixels, averaged over windows, and resized to another `shape` if there is one. By default,
    windows have the size of the modality's input, to which the short side is scaled.
    """
    if not hasattr(modality, "resize_mode"):
        raise UserError("only pictures and videos have maps of classes; use encode_dense")
    side = min(window or modality.image_size, modality.image_size)
    x = replace(modality, resize_mode="whole").transform(raw)  # (C, T, height, width)
    # So many that neighbours overlap by half or more
    tops, lefts = (torch.linspace(0, n - side, math.ceil(2 * n / side) - 1).int().tolist() for n in x.shape[2:])
    places = [(..., slice(top, top + side), slice(left, left + side)) for top in tops for left in lefts]
    windows = torch.stack([x[place] for place in places]).split(16)
    scores = torch.cat([score(part) for part in windows]).movedim(-1, 2).float()  # (B, T, K, h, w)
    total = scores.new_zeros(scores.shape[1:3] + x.shape[2:])
    count = torch.zeros_like(total)
    for place, each in zip(places, scores, strict=True):
        total[place] += F.interpolate(each, (side, side), mode="bilinear")
        count[place] += 1
    return F.interpolate(total / count, shape or raw.shape[-2:], mode="bilinear")
