"""The published model classes, with the original's names and call signatures."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from ..hub import is_training_checkpoint
from ..loss import contrastive_loss
from ..text import ClipText
from ..transformer import Attention
from ..vit import VisionTransformer
from ..weights import State, interpolate_frames, load_strict
from .config import CONFIGS, LanguageBindConfig, LanguageBindTextConfig, LanguageBindVisionConfig
from .files import HUB_OPTIONS, read_weights

INITIAL_STD = 0.02  # of token and position embeddings of a text tower without weights


@dataclass
class LanguageBindOutput(ModelOutput):
    """What a model gives for inputs and texts; the fields and their order are CLIP's."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        values = (getattr(self, key) for key in self.keys())
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in values)


class VisionTower(VisionTransformer):
    """The encoder, called as Hugging Face models are."""

    def __init__(self, config: LanguageBindVisionConfig):
        super().__init__(config.input_shape, config.sizes)
        self.config = config

    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """`last_hidden_state` (B*T, 1 + N, D) before the last norm, and `pooler_output` (B, D).

        Args:
            pixel_values: (B, C, T, H, W); (B, C, H, W) where T is 1; or (B, pairs, T, S, C, H, W), as for retrieval.

        Raises:
            ValueError: another shape than the config says.
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


class TextTower(ClipText):
    """CLIP's text tower, called as Hugging Face models are."""

    def __init__(self, config: LanguageBindTextConfig):
        super().__init__(config.sizes)
        self.config = config
        for embedding in self.embeddings.values():
            nn.init.normal_(embedding.weight, std=INITIAL_STD)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """`last_hidden_state` (B, L, D) and `pooler_output` (B, D), the first end-of-text token.

        Padding stands behind that token and attention looks backward, so that `attention_mask` changes nothing there.
        """
        x, states, attentions = _encode(
            self, self.embed(input_ids), True, output_hidden_states, output_attentions
        )  # fmt: skip
        x = self.final_layer_norm(x)
        return _output(self.config, x, self.pool(x, input_ids), states, attentions, return_dict)


class LanguageBindModel(PreTrainedModel):
    """An encoder of one modality and a text tower."""

    config_class = LanguageBindConfig
    main_input_name = "pixel_values"
    base_model_prefix = "languagebind"
    _supports_sdpa = True
    _no_split_modules = ("Block",)

    def __init__(self, config: LanguageBindConfig):
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        self.text_model = TextTower(text)
        self.vision_model = VisionTower(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Each module gave itself its first weights."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> LanguageBindOutput | tuple:
        """Unit-norm `text_embeds` (B, D) and `image_embeds` (B, D) of any modality, and their scaled similarities."""
        if position_ids is not None:
            raise ValueError("position_ids: this text tower has positions 0, 1, 2, ... only")
        options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        vision = self.vision_model(pixel_values, **options, return_dict=True)
        text = self.text_model(input_ids, attention_mask, **options, return_dict=True)
        image_embeds = F.normalize(self.visual_projection(vision.pooler_output), dim=-1)
        text_embeds = F.normalize(self.text_projection(text.pooler_output), dim=-1)
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.T
        output = LanguageBindOutput(
            loss=contrastive_loss(image_embeds, text_embeds, self.logit_scale.exp()) if return_loss else None,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> Tensor:
        """(B, D), projected but not normalised, of whatever the modality is."""
        return self.visual_projection(self.vision_model(pixel_values, **options)[1])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """(B, D), projected but not normalised."""
        return self.text_projection(self.text_model(input_ids, attention_mask, **options)[1])

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, config: LanguageBindConfig | None = None, **kwargs: Any):
        """Load a published checkpoint, one that `save_pretrained` wrote, or one of our training.

        Args:
            name: a hub id, a folder, a checkpoint of our training or its run's folder, or with `config` any file of
                weights.
            num_frames: of the clips, in place of the checkpoint's; temporal embeddings are interpolated.
            kwargs: as Hugging Face's `from_pretrained`: dtype, device_map, attn_implementation, revision, ...

        Raises:
            UserError: it is not there or cannot be read.
            WeightsError: weights are missing, left over, or do not fit.
        """
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        config, state, kwargs = read_pretrained(cls, name, config, hub, kwargs)
        with torch.device("meta"):
            check_state(cls(config), state, name)
        model = super().from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
        for module in model.modules():
            if isinstance(module, Attention):
                module.eager = model.config._attn_implementation == "eager"
        return model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write config and weights. Weights that lie there already may be the ones in use: those go last."""
        old = [path for path in Path(save_directory).glob("model*.safetensors") if path.is_file()]
        kept = [path.rename(path.with_name(f".{path.name}.old")) for path in old]
        try:
            super().save_pretrained(save_directory, **kwargs)
        except BaseException:
            for path, original in zip(kept, old, strict=True):
                path.replace(original)
            raise
        for path in kept:
            path.unlink()


class LanguageBindVideo(LanguageBindModel):
    config_class = CONFIGS["video"]


class LanguageBindAudio(LanguageBindModel):
    config_class = CONFIGS["audio"]


class LanguageBindDepth(LanguageBindModel):
    config_class = CONFIGS["depth"]


class LanguageBindThermal(LanguageBindModel):
    config_class = CONFIGS["thermal"]


class LanguageBindImage(LanguageBindModel):
    config_class = CONFIGS["image"]


MODELS = {
    "video": LanguageBindVideo,
    "audio": LanguageBindAudio,
    "depth": LanguageBindDepth,
    "thermal": LanguageBindThermal,
    "image": LanguageBindImage,
}


def read_pretrained(
    cls: type[LanguageBindModel], name: str | Path, config: LanguageBindConfig | None, hub: dict, kwargs: dict
) -> tuple[LanguageBindConfig, State, dict]:
    """Config, weights by our names with adapters merged, and the options that are not for the config."""
    num_frames = kwargs.pop("num_frames", None)
    if config is not None:
        config = copy.deepcopy(config)  # it is changed below
    elif not is_training_checkpoint(Path(name) / (hub.get("subfolder") or "")):
        config, kwargs = cls.config_class.from_pretrained(name, return_unused_kwargs=True, **hub, **kwargs)
    if config is None:
        from .native import training_checkpoint

        config, state = training_checkpoint(name, cls.config_class)
    else:
        state = read_weights(name, config.vision_config.lora_r, config.vision_config.lora_alpha, **hub)
    vision = config.vision_config
    vision.lora_r = 0  # from here on there are no adapters
    if num_frames is not None and num_frames != vision.num_frames:
        state = interpolate_frames(state, num_frames)
        vision.num_frames = num_frames
    return config, state, kwargs


def check_state(model: nn.Module, state: State, name: str | Path) -> None:
    """Raise `WeightsError` with the keys unless `state` fits a model on the meta device exactly."""
    load_strict(model, {key: value.to("meta") for key, value in state.items()}, str(name))


def _encode(tower: Any, x: Tensor, is_causal: bool, output_hidden_states: bool | None, output_attentions: bool | None):
    """What the blocks give, and on request what they took and where they looked."""
    config = tower.config
    states = [] if _default(output_hidden_states, config.output_hidden_states) else None
    attentions = [] if _default(output_attentions, config.output_attentions) else None
    return tower.encoder(x, is_causal, states, attentions), states, attentions


def _output(config, x: Tensor, pooled: Tensor, states: list | None, attentions: list | None, return_dict: bool | None):
    output = BaseModelOutputWithPooling(
        last_hidden_state=x,
        pooler_output=pooled,
        hidden_states=None if states is None else tuple(states),
        attentions=None if attentions is None else tuple(attentions),
    )
    return output if _wants_dict(config, return_dict) else output.to_tuple()


def _wants_dict(config, return_dict: bool | None) -> bool:
    return _default(return_dict, config.return_dict)


def _default(value: bool | None, otherwise: bool | None) -> bool:
    return bool(otherwise if value is None else value)
