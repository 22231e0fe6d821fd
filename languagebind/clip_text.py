"""CLIP's text transformer, with the published parameter names, and the tokenizer of any text tower.

Shapes: B batch, L tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import UserError
from .transformer import LAYER_NORM_EPS, Transformer

CONTEXT_LENGTH = 77  # of CLIP
Encode = Callable[[list[str]], Tensor]  # texts -> (B, context length) ids, as open_clip's tokenizers give them


class Tokenizer:
    """Turns texts into token ids, trimmed to the longest text of the batch. Has no weights, so workers can copy it.

    Args:
        encode: `list[str] -> (B, context length)` ids.
        pad_id: the padding id; None for CLIP's tokenizer, where the largest id marks the end of the text.
        cut: False keeps the full context length, for towers whose features depend on the padding.
    """

    def __init__(self, encode: Encode, pad_id: int | None = None, cut: bool = True):
        self.encode, self.pad_id, self.cut = encode, pad_id, cut

    def __call__(self, texts: list[str], context_length: int | None = None) -> dict[str, Tensor]:
        """Return the token ids of texts as `{"input_ids": (B, L)}`, with L at most `context_length` if it is given."""
        encode: Any = self.encode
        ids = encode(list(texts), context_length) if context_length else encode(list(texts))
        if len(ids) and self.cut:
            lengths = ids.argmax(dim=1) + 1 if self.pad_id is None else (ids != self.pad_id).sum(dim=1)
            ids = ids[:, : int(lengths.max())].contiguous()
        return {"input_ids": ids}

    def count_cut(self, texts: list[str], context_length: int | None = None) -> int:
        """Return how many texts have more tokens than `context_length`, or else than the tower reads."""
        encode: Any = self.encode
        longer = encode(["", *texts], (context_length or encode.context_length) + 1)  # the empty one ends with padding
        return int((longer[1:, -1] != longer[0, -1]).sum())


@dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of CLIP's text tower."""

    vocab_size: int = 49408
    context_length: int = CONTEXT_LENGTH
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu"


class ClipText(nn.Module):
    """CLIP's text transformer: causal, pooled at the end of the text, (B, L) -> (B, D)."""

    def __init__(self, config: ClipTextConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        tokens = getattr(tokenizer and tokenizer.encode, "vocab_size", 0)  # of CLIP's tokenizer
        if tokens > config.vocab_size:
            size = f"the text tower has a vocabulary of {config.vocab_size} tokens"
            raise UserError(f"{size}, but its tokenizer has {tokens}: set vocab_size to the size in training")
        self.tokenizer = tokenizer
        self.sizes = config
        token_embedding = nn.Embedding(config.vocab_size, config.width)
        position_embedding = nn.Embedding(config.context_length, config.width)
        self.embeddings = nn.ModuleDict({"token_embedding": token_embedding, "position_embedding": position_embedding})
        self.encoder = Transformer(config.depth, config.width, config.num_heads, config.mlp_dim, config.activation)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, input_ids: Tensor) -> Tensor:
        (x,) = self.encoder(self.embed(input_ids), is_causal=True)
        return self.pool(self.final_layer_norm(x), input_ids)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the first block's input (B, L, D) for token ids (B, L)."""
        length = input_ids.shape[1]
        if length > self.sizes.context_length:
            raise UserError(f"the text has {length} tokens, more than the tower's limit of {self.sizes.context_length}")
        positions = self.embeddings["position_embedding"](torch.arange(length, device=input_ids.device))  # (L, D)
        return self.embeddings["token_embedding"](input_ids) + positions

    def pool(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """Return the token at the end of each text: (B, L, D) -> (B, D)."""
        # The end-of-text token has the largest id. Padding ids are equal or smaller, and argmax takes the first.
        return x[torch.arange(x.shape[0], device=x.device), input_ids.int().argmax(dim=1)]
