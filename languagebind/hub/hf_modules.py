"""The two sides of the published models, with the call signatures and outputs of Hugging Face's."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..text import ClipText
from ..vit import VisionTransformer
from .config import LanguageBindTextConfig, LanguageBindVisionConfig

INITIAL_STD = 0.02  # of the embeddings in a text tower without pretrained weights


class HFVisionTransformer(VisionTransformer):
    """The encoder, with the interface of Hugging Face's vision models."""

    def __init__(self, config: LanguageBindVisionConfig):
        super().__init__(config.input_shape, config.sizes)
        self.config = config

    def forward(  # type: ignore[override]  # Hugging Face's signature
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Return `last_hidden_state` (B*T, 1 + N, D), before the last norm, and `pooler_output` (B, D).

        Args:
            pixel_values: (B, C, T, H, W); (B, C, H, W) if T is 1; or (B, pairs, T, S, C, H, W), as for retrieval.

        Raises:
            ValueError: the shape is not that of the config.
        """
        if pixel_values.ndim == 7:
            pixel_values = pixel_values.permute(0, 1, 3, 4, 2, 5, 6).flatten(0, 2)
        elif pixel_values.ndim == 4:
            pixel_values = pixel_values.unsqueeze(2)
        x, states, attentions = _encode(
            self, self.embed(pixel_values.to(self.embeddings.patch_embedding.weight.dtype)), False,
            output_hidden_states, output_attentions,
        )  # fmt: skip
        return _output(self.config, x, self.pool(x), states, attentions, return_dict)


class HFClipText(ClipText):
    """CLIP's text tower, with the interface of Hugging Face's text models."""

    def __init__(self, config: LanguageBindTextConfig):
        super().__init__(config.sizes)
        self.config = config
        for weight in self.embeddings.parameters():
            nn.init.normal_(weight, std=INITIAL_STD)

    def forward(  # type: ignore[override]  # Hugging Face's signature
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Return `last_hidden_state` (B, L, D) and `pooler_output` (B, D), the first end-of-text token.

        `attention_mask` has no effect on it: attention is causal, and the padding follows that token.
        """
        x, states, attentions = _encode(
            self, self.embed(input_ids), True, output_hidden_states, output_attentions
        )  # fmt: skip
        x = self.final_layer_norm(x)
        return _output(self.config, x, self.pool(x, input_ids), states, attentions, return_dict)


def _encode(
    tower: Any, x: Tensor, is_causal: bool, output_hidden_states: bool | None, output_attentions: bool | None
) -> tuple[Tensor, list[Tensor] | None, list[Tensor] | None]:
    """Return the output of the blocks, and on request their hidden states and attentions."""
    config = tower.config
    states: list[Tensor] | None = [] if _default(output_hidden_states, config.output_hidden_states) else None
    attentions: list[Tensor] | None = [] if _default(output_attentions, config.output_attentions) else None
    return tower.encoder(x, is_causal, states, attentions), states, attentions


def _output(
    config: PreTrainedConfig,
    x: Tensor,
    pooled: Tensor,
    states: list[Tensor] | None,
    attentions: list[Tensor] | None,
    return_dict: bool | None,
) -> BaseModelOutputWithPooling | tuple:
    output = BaseModelOutputWithPooling(
        last_hidden_state=x,
        pooler_output=pooled,
        hidden_states=None if states is None else tuple(states),
        attentions=None if attentions is None else tuple(attentions),
    )
    return output if wants_dict(config, return_dict) else output.to_tuple()


def wants_dict(config: PreTrainedConfig, return_dict: bool | None) -> bool:
    """Tell whether to return a dictionary rather than a tuple."""
    return _default(return_dict, config.return_dict)


def _default(value: bool | None, otherwise: bool | None) -> bool:
    return bool(otherwise if value is None else value)
