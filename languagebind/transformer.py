"""The pre-norm transformer of both towers, with the parameter names of the published checkpoints.

Shapes: B batch, T frames, L tokens, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LAYER_NORM_EPS = 1e-5  # the value in every CLIP checkpoint


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's CLIP weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.eager = False  # plain matrix products instead of PyTorch's fused kernel
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, is_causal: bool = False, attentions: list[Tensor] | None = None, num_queries: int | None = None
    ) -> tuple[Tensor, None]:
        """Return the outputs of all tokens or of the first `num_queries`; append the weights (B, heads, L, L)."""
        q = self._split(self.q_proj(x[:, :num_queries]))
        k, v = self._split(self.k_proj(x)), self._split(self.v_proj(x))
        # In bfloat16, PyTorch's fused kernel for the CPU is 3 to 9 times slower than plain products
        if self.eager or attentions is not None or (q.device.type == "cpu" and q.dtype == torch.bfloat16):
            weights = _attention_weights(q, k, is_causal)
            if attentions is not None:
                attentions.append(weights)
            x = weights @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=bool(is_causal))
        return self.out_proj(x.transpose(1, 2).flatten(2)), None  # (B, L, D); a tuple, as hooks for CLIP expect

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, L, D / heads)


def _attention_weights(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, heads, L, L)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(dim=-1)


class Mlp(nn.Module):
    """Two linear layers with an activation between, (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Attention over frames (if there are several), attention over tokens, and an MLP, each with a residual."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, activation: str, num_frames: int = 1):
        super().__init__()
        self.self_attn = Attention(width, num_heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, mlp_dim, activation)
        self.layer_norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.num_frames = num_frames
        if num_frames > 1:
            self.temporal_embedding = nn.Parameter(torch.randn(1, num_frames, width) * width**-0.5)
            self.temporal_attn = Attention(width, num_heads)
            self.temporal_layer_norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(
        self, x: Tensor, is_causal: bool = False, attentions: list[Tensor] | None = None, num_outputs: int | None = None
    ) -> tuple[Tensor]:
        """Return all tokens (B*T, L, D) or the first `num_outputs`. The T frames of a clip are consecutive rows."""
        if self.num_frames > 1:
            x = self._attend_over_frames(x)
        y, _ = self.self_attn(self.layer_norm1(x), is_causal, attentions, num_outputs)
        x = x[:, :num_outputs] + y
        return (x + self.mlp(self.layer_norm2(x)),)

    def init_weights(self, depth: int) -> None:
        """Initialise as CLIP does: smaller in wide layers and in layers that write to the residual stream."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                std = self.layer_norm1.weight.numel() ** -0.5
                if name.endswith("fc1"):
                    std *= 2**-0.5
                elif name.endswith(("out_proj", "fc2")):
                    std *= (2 * depth) ** -0.5
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def _attend_over_frames(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, self.num_frames)).transpose(1, 2)  # (B, L, T, D)
        # The published weights expect that every block adds the embedding to the residual stream
        x = x + self.temporal_embedding
        y, _ = self.temporal_attn(self.temporal_layer_norm1(x).flatten(0, 1))  # (B*L, T, D)
        return (x + y.view_as(x)).transpose(1, 2).flatten(0, 1)


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, depth: int, width: int, num_heads: int, mlp_dim: int, activation: str, num_frames: int = 1):
        super().__init__()
        blocks = [Block(width, num_heads, mlp_dim, activation, num_frames) for _ in range(depth)]
        self.layers = nn.ModuleList(blocks)
        self.checkpointed = 0  # blocks, from the first, whose activations are recomputed in the backward pass
        self.gradient_checkpointing = False  # the same for all blocks, under the name that transformers sets
        for block in blocks:
            block.init_weights(depth)

    def forward(
        self,
        x: Tensor,
        is_causal: bool = False,
        hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor] | None = None,
        num_outputs: int | None = None,
    ) -> tuple[Tensor]:
        """Return all tokens (B, L, D), or the first `num_outputs`, so that the last block computes no others.

        Append each block's input and the last block's output to `hidden_states`, and all weights to `attentions`.
        """
        for number, block in enumerate(self.layers):
            if hidden_states is not None:
                hidden_states.append(x)
            wanted = num_outputs if number == len(self.layers) - 1 else None
            recompute = self.gradient_checkpointing or number < self.checkpointed
            if recompute and self.training and attentions is None:
                (x,) = checkpoint(block, x, is_causal, None, wanted, use_reentrant=False)
            else:
                x = block(x, is_causal, attentions, wanted)[0]  # a block in its place may return more
        if hidden_states is not None:
            hidden_states.append(x)
        return (x,)
