"""Encoder and text tower of the published models, with the call signatures and outputs of Hugging Face's models."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from ..text import ClipText
from ..vit import VisionTransformer
from .config import LanguageBindTextConfig, LanguageBindVisionConfig
from .state import OriginalState


class HFVisionTransformer(OriginalState, VisionTransformer):
    """The encoder, with the interface of Hugging Face's vision models."""

    def __init__(self, config: LanguageBindVisionConfig):
        super().__init__(config.input_shape, config.sizes)
        self.config = config

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_attentions: bool | None = None, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPooling:
        """Return `last_hidden_state` (B*T, 1 + N, D), before the final norm, and `pooler_output` (B, D).

        `pixel_values` are (B, C, T, H, W), (B, pairs, T, S, C, H, W) for several clips, or the frames of B clips,
        (B*T, C, H, W), each of which has its own `pooler_output`, (B*T, D).
        """
        as_frames, num_frames = pixel_values.ndim == 4, self.input_shape[1]
        if pixel_values.ndim == 7:
            pixel_values = pixel_values.permute(0, 1, 3, 4, 2, 5, 6).flatten(0, 2)
        elif as_frames:
            if len(pixel_values) % num_frames:
                raise ValueError(f"{len(pixel_values)} frames are not whole clips of {num_frames} frames")
            pixel_values = pixel_values.unflatten(0, (-1, num_frames)).transpose(1, 2)
        x = self.embed(pixel_values.to(self.embeddings.patch_embedding.weight.dtype))
        x, others = _encode(self, x, False, output_attentions, output_hidden_states)
        pooled = self.post_layernorm(x[:, 0]) if as_frames else self.pool(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled, **others)


class HFClipText(OriginalState, ClipText):
    """CLIP's text tower, with the interface of Hugging Face's text models."""

    def __init__(self, config: LanguageBindTextConfig):
        super().__init__(config.sizes)
        self.config = config
        for weight in self.embeddings.parameters():
            nn.init.normal_(weight, std=0.02)  # for a model without pretrained weights

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Return `last_hidden_state` (B, L, D) and `pooler_output` (B, D), the state of the first end-of-text token.

        `attention_mask` is ignored because attention is causal and padding follows that token.
        """
        x, others = _encode(self, self.embed(input_ids), True, output_attentions, output_hidden_states)
        x = self.final_layer_norm(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=self.pool(x, input_ids), **others)


def _encode(
    tower: Any, x: Tensor, is_causal: bool, output_attentions: bool | None, output_hidden_states: bool | None
) -> tuple[Tensor, dict[str, Any]]:
    """Return the output of the blocks, and their hidden states and attentions if the caller or the config asks."""
    if output_attentions is None:
        output_attentions = tower.config.output_attentions
    if output_hidden_states is None:
        output_hidden_states = tower.config.output_hidden_states
    attentions: list[Tensor] | None = [] if output_attentions else None
    states: list[Tensor] | None = [] if output_hidden_states else None
    (x,) = tower.encoder(x, is_causal, states, attentions)
    return x, {"hidden_states": states and tuple(states), "attentions": attentions and tuple(attentions)}
