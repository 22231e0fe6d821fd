"""The encoder of every modality: a CLIP vision transformer for inputs (B, C, T, H, W).

Parameter names are those of the published checkpoints (`pre_layrnorm` is CLIP's own spelling).
Shapes: B batch, C channels, T frames, H height, W width, N patches, D size of a token.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from .config import UserError, at_least
from .transformer import LAYER_NORM_EPS, Transformer
from .weights import resize_positions

log = logging.getLogger(__name__)

Activation = Literal["gelu", "quick_gelu"]
# Options that models of timm have, too
SHARED = ("patch_dropout", "grad_checkpointing", "grad_checkpointing_blocks", "timm_model", "timm_options",
          "temporal_head", "temporal_head_depth")  # fmt: skip


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and options of the encoder."""

    patch_size: int | tuple[int, int] = 14
    """side of a square patch, or height and width, such as 6 20 for six channels of a time series"""
    width: int = 1024
    """size of a token"""
    depth: int = 24
    """number of transformer blocks"""
    num_heads: int = 16
    """attention heads per block"""
    mlp_dim: int = 4096
    """hidden size of the MLP in each block"""
    activation: Activation = "gelu"
    """activation of the MLP; OpenAI's CLIP weights need quick_gelu"""
    temporal_attention: bool = False
    """attend over the frames of a clip in every block"""
    patch_embedding: Literal["2d", "3d"] = "2d"
    """patch convolution; 3d also gives each frame a class token, as in the V1.5 checkpoints"""
    patch_dropout: float = 0.0
    """fraction of the patches dropped in training"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    grad_checkpointing_blocks: int | None = None
    """number of blocks that grad_checkpointing applies to, counted from the input; None: all"""
    timm_model: str | None = None
    """timm's name of a vision transformer to use in place of our own; --encoder-tower sets it"""
    timm_options: tuple[str, ...] = ()
    """options of timm's create_model for it, such as depth=2 global_pool=avg"""
    temporal_head: Literal["mean", "lstm", "transformer", "pairs"] | None = None
    """CLIP4Clip's head over the projected frames of a clip, without padding frames. By default, our own ViT averages
    frames before the projection. pairs, which scores pairs, only comes with clip4clip:FILE."""
    temporal_head_depth: int = 4
    """number of blocks in a temporal head that is a transformer"""

    def __post_init__(self):
        own = [x.name for x in fields(self) if x.name not in SHARED and getattr(self, x.name) != x.default]
        if own and self.timm_model:
            raise UserError(f"{own[0]} is an option of our own ViT; remove it (or --model) to use {self.timm_model}")
        if self.timm_options and not self.timm_model:
            raise UserError("timm_options need a tower of timm; set --encoder-tower")
        at_least(1, patch_size=min(self.patch), width=self.width, depth=self.depth, mlp_dim=self.mlp_dim)
        at_least(1, num_heads=self.num_heads, temporal_head_depth=self.temporal_head_depth)
        at_least(0, grad_checkpointing_blocks=self.grad_checkpointing_blocks)
        if self.width % self.num_heads:
            raise UserError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"patch_dropout should be at least 0 and below 1, got {self.patch_dropout}")

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return (self.patch_size, self.patch_size) if isinstance(self.patch_size, int) else self.patch_size


class VisionTransformer(nn.Module):
    """Vision transformer from (B, C, T, H, W) to (B, D), the mean over frames of each frame's class token.

    For a temporal head, the class tokens (B, T, D) of all frames. No other `input_shape` (C, T, H, W) is accepted.
    """

    projection_bias = False  # as in CLIP

    def __init__(self, input_shape: tuple[int, int, int, int], config: EncoderConfig):
        super().__init__()
        num_frames = input_shape[1] if config.temporal_attention else 1
        sizes = (config.depth, config.width, config.num_heads, config.mlp_dim, config.activation)
        self.input_shape: tuple[int, ...] = tuple(input_shape)
        self.sizes, self.width, self.head = config, config.width, config.temporal_head
        self.embeddings = PatchEmbeddings(input_shape, config)
        self.patch_dropout = PatchDropout(config.patch_dropout)
        self.pre_layrnorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.encoder = Transformer(*sizes, num_frames=num_frames)
        if config.grad_checkpointing:
            blocks = config.grad_checkpointing_blocks
            self.encoder.checkpointed = config.depth if blocks is None else blocks
        self.post_layernorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=config.width**-0.5)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, from the input on."""
        return self.encoder.layers

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features of (B, *input_shape) before the projection: (B, D), or (B, T, D) for a temporal head."""
        return self.pool(*self.encoder(self.embed(inputs), num_outputs=1))

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the first block's input (B*T, 1 + N, D) for inputs (B, C, T, H, W)."""
        x = self.embeddings(frames_of(inputs, self.input_shape))
        return self.pre_layrnorm(self.patch_dropout(x, inputs.shape[2]))

    def pool(self, x: Tensor) -> Tensor:
        """Return the class tokens in the last block's output (B*T, 1 + N, D), averaged over frames without a head."""
        x = self.post_layernorm(x[:, 0]).unflatten(0, (-1, self.input_shape[1]))  # (B, T, D)
        return x.mean(dim=1) if self.head is None else x

    def feature_map(self, inputs: Tensor) -> Tensor:
        """Return features (B, T, h, w, D) of the patches, before the projection, of inputs (B, C, T, H, W)."""
        x = self.post_layernorm(self.encoder(self.embed(inputs))[0])[:, 1:]
        return x.unflatten(1, self.embeddings.grid).unflatten(0, (-1, self.input_shape[1]))

    def resize(self, height: int, width: int) -> None:
        """Change the height and width of the inputs. Positions are interpolated."""
        patches, self.input_shape = self.embeddings, (*self.input_shape[:2], height, width)
        old, patches.grid = patches.grid, (height // self.sizes.patch[0], width // self.sizes.patch[1])
        count = 1 + patches.grid[0] * patches.grid[1]
        positions = resize_positions(patches.position_embedding.weight, count, patches.grid, old)
        patches.position_embedding = nn.Embedding.from_pretrained(positions)


class PatchEmbeddings(nn.Module):
    """Embeddings of a class token and the patches of each frame, with positions: (B*T, C, H, W) -> (B*T, 1 + N, D)."""

    def __init__(self, input_shape: tuple[int, int, int, int], config: EncoderConfig):
        super().__init__()
        channels, num_frames, *size = input_shape
        (h, w), width = config.patch, config.width
        self.grid = (size[0] // h, size[1] // w)  # (rows, columns)
        if 0 in self.grid:
            raise UserError(f"inputs of {size[0]} x {size[1]} are smaller than a patch of {h} x {w}: set --patch-size")
        whole_patches(size, config.patch)
        self.num_frames, self.num_patches = num_frames, self.grid[0] * self.grid[1]
        self.image_size = size[0] if size[0] == size[1] else size
        self.patch_embedding: nn.Conv2d | nn.Conv3d
        if config.patch_embedding == "3d":
            self.class_embedding = nn.Parameter(torch.randn(num_frames, width) * width**-0.5)
            self.patch_embedding = nn.Conv3d(channels, width, (1, h, w), (1, h, w), bias=False)
        else:
            self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
            self.patch_embedding = nn.Conv2d(channels, width, (h, w), (h, w), bias=False)
        self.position_embedding = nn.Embedding(1 + self.num_patches, width)

    @property
    def position_ids(self) -> Tensor:
        """The positions (1, 1 + N) of the class token and the patches, under their name in CLIP."""
        return torch.arange(1 + self.num_patches, device=self.position_embedding.weight.device)[None]

    def forward(self, frames: Tensor) -> Tensor:
        if isinstance(self.patch_embedding, nn.Conv3d):
            clips = frames.unflatten(0, (-1, self.num_frames)).transpose(1, 2)  # (B, C, T, H, W)
            patches = self.patch_embedding(clips).transpose(1, 2).flatten(0, 1)  # (B*T, D, rows, columns)
        else:
            patches = self.patch_embedding(frames)
        patches = patches.flatten(2).transpose(1, 2)  # (B*T, N, D), row by row
        class_tokens = self.class_embedding.expand(self.num_frames, -1)  # (T, D): one for all, or one per frame
        class_tokens = class_tokens.repeat(frames.shape[0] // self.num_frames, 1).unsqueeze(1)  # (B*T, 1, D)
        return torch.cat([class_tokens.to(patches.dtype), patches], dim=1) + self.position_embedding.weight


class PatchDropout(nn.Module):
    """Drops a random fraction of the patches in training (FLIP), the same patches in every frame of a clip."""

    def __init__(self, fraction: float):
        super().__init__()
        self.fraction = fraction

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """Return the class tokens and the kept patches: (B*T, 1 + N, D) -> (B*T, 1 + kept, D)."""
        if not self.training or not self.fraction:
            return x
        patches = x.shape[1] - 1
        kept = max(1, int(patches * (1 - self.fraction)))
        order = torch.rand(len(x) // num_frames, patches, device=x.device).argsort(dim=1)[:, :kept]  # (B, kept)
        index = order.repeat_interleave(num_frames, dim=0).unsqueeze(-1).expand(-1, -1, x.shape[2])
        return torch.cat([x[:, :1], x[:, 1:].gather(1, index)], dim=1)


def frames_of(inputs: Tensor, input_shape: tuple[int, ...]) -> Tensor:
    """Return the frames (B*T, C, H, W) of inputs (B, C, T, H, W); raise `ValueError` unless they have `input_shape`."""
    if inputs.ndim != 5 or tuple(inputs.shape[1:]) != input_shape:
        expected = ", ".join(map(str, input_shape))
        raise ValueError(f"the encoder takes (B, C, T, H, W) = (B, {expected}), got {tuple(inputs.shape)}")
    return inputs.transpose(1, 2).flatten(0, 1)


def whole_patches(size: Sequence[int], patch: Sequence[int]) -> tuple[int, int]:
    """Return the height and width of the patches in inputs of `size`; warn if pixels are left over."""
    if size[0] % patch[0] or size[1] % patch[1]:
        message = "input size %d x %d is not a multiple of patch size %d x %d; the extra pixels are ignored"
        log.warning(message, *size, *patch)
    return size[0] // patch[0] * patch[0], size[1] // patch[1] * patch[1]
