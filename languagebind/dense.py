"""Dense features: a feature for each patch that is comparable with texts, and maps of scores from them.

Training compares one pooled token with a text, so the last block's patch tokens lie far from the texts. Without any
training, they come close if the last block attends from queries to queries, and its residual and MLP are left out
(ClearCLIP, arXiv 2407.12442; NACLIP, arXiv 2404.08181).

Shapes: B batch, T frames, h and w rows and columns of patches, D size of the shared space, K classes.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UserError

Mode = Literal["qq", "plain"]
BATCH = 16  # windows


def dense_tower(tower: Any, size: Sequence[int], mode: Mode) -> Any:
    """Return a copy of an encoder in evaluation mode that shares its weights, for inputs of another height and width.

    Args:
        tower: our own ViT, or a `TimmTower`.
        size: height and width of the inputs.
        mode: qq: the last block attends from queries to queries, without residual and MLP; plain: as in training.

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
    if mode == "qq":
        _attend_to_queries(tower.blocks[-1])
    return tower


def _attend_to_queries(block: nn.Module) -> None:
    """Make a block use its queries in the place of keys, and return the output of its attention alone."""
    attention: Any = getattr(block, "self_attn", None) or getattr(block, "attn", None)
    if getattr(attention, "q_proj", None) is not None:
        attention.k_proj = attention.q_proj
    elif getattr(attention, "qkv", None) is not None:
        attention.qkv.register_forward_hook(_repeat_queries)
    else:
        raise UserError("this encoder's last block has no queries of its own; use mode='plain'")
    for own, other in (("q_norm", "k_norm"), ("q_bias", "k_bias")):
        if getattr(attention, other, None) is not None:
            setattr(attention, other, getattr(attention, own))
    outputs: list[Any] = []
    # timm's blocks pass the output of attention, scaled if they scale it, through `drop_path1` to the residual
    source = getattr(block, "drop_path1", attention)
    source.register_forward_hook(lambda module, args, output: outputs.append(output))
    block.register_forward_hook(lambda module, args, output: outputs.pop())


def _repeat_queries(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    q, _, v = output.chunk(3, dim=-1)
    return torch.cat([q, q, v], dim=-1)


@torch.no_grad()
def score_maps(
    score: Callable[[Tensor], Tensor], modality: Any, raw: Tensor, size: int | None = None,
    shape: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Return the scores (T, K, H, W) of every pixel of a picture or clip, float32.

    The short side is scaled to `size`, and windows of the encoder's input size cover the picture. Neighbouring windows
    share at least half of their pixels. Patches' scores are interpolated to pixels and averaged over windows.

    Args:
        score: returns the scores (B, T, h, w, K) of the patches of windows (B, C, T, side, side).
        modality: a modality of pictures, which prepares `raw`.
        raw: the raw signal, whose last dimensions are the height and width.
        size: the short side in pixels, at least that of a window; by default that of a window.
        shape: another height and width of the maps.

    Raises `UserError` if the modality has no pictures, or `size` is smaller than a window.
    """
    if not hasattr(modality, "uncropped"):
        raise UserError("only pictures and videos have maps of classes; use encode_dense")
    side = modality.image_size
    if size is not None and size < side:
        raise UserError(f"size should be at least {side}, the side of the encoder's input, not {size}")
    x = modality.uncropped(raw, size or side)  # (C, T, height, width)
    tops, lefts = (_starts(length, side) for length in x.shape[2:])
    places = [(..., slice(top, top + side), slice(left, left + side)) for top in tops for left in lefts]
    windows = torch.stack([x[place] for place in places]).split(BATCH)
    scores = torch.cat([score(part) for part in windows]).movedim(-1, 2).float()  # (B, T, K, h, w)
    total = scores.new_zeros(scores.shape[1:3] + x.shape[2:])
    count = torch.zeros_like(total)
    for place, each in zip(places, scores, strict=True):
        total[place] += F.interpolate(each, (side, side), mode="bilinear")
        count[place] += 1
    return F.interpolate(total / count, shape or raw.shape[-2:], mode="bilinear")


def _starts(length: int, side: int) -> list[int]:
    """Return the starts of evenly spaced windows that cover a length and overlap by half or more."""
    steps = max(1, math.ceil(2 * (length - side) / side))
    return [(length - side) * i // steps for i in range(steps + 1 if length > side else 1)]
