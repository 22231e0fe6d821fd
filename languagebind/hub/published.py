"""Classes of the published models, with the names and call signatures of the original LanguageBind code."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from ..config import UserError
from ..loss import contrastive_loss
from ..transformer import Attention
from ..weights import State, dtype_of, load_strict
from .config import CONFIGS, KIND_OF, LanguageBindConfig, read_pretrained, subclasses
from .files import replace_weights
from .hf_modules import HFClipText, HFVisionTransformer
from .state import OriginalState


@dataclass
class LanguageBindOutput(ModelOutput):
    """Output of a model for inputs and texts, with the fields of CLIP's output in the same order."""

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


class LanguageBindModel(OriginalState, PreTrainedModel):
    """An encoder of one modality and a text tower, with the interface of Hugging Face's models."""

    config_class = LanguageBindConfig
    main_input_name = "pixel_values"
    base_model_prefix = "languagebind"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - as in the base class

    def __init__(self, config: LanguageBindConfig):
        super().__init__(config)
        config.check(self.config_class)
        self.projection_dim = config.projection_dim
        self.text_embed_dim = config.text.hidden_size
        self.vision_embed_dim = config.vision.hidden_size
        self.text_model = HFClipText(config.text)
        self.vision_model = HFVisionTransformer(config.vision)
        self.visual_projection = nn.Linear(self.vision_embed_dim, self.projection_dim, bias=False)
        self.text_projection = nn.Linear(self.text_embed_dim, self.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self._published = {id(module) for module in self.modules()}
        self.post_init()
        self._use_attention()

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Select PyTorch's fused attention kernel (`sdpa`) or plain attention (`eager`)."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self._use_attention()

    def _use_attention(self) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.eager = self.config._attn_implementation == "eager"

    def get_input_embeddings(self) -> Any:
        return self.text_model.embeddings.token_embedding

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module that a subclass adds to a loaded model. The published ones initialise themselves."""
        if id(module) not in self._published and callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> LanguageBindOutput:
        """Return unit-norm `text_embeds` (B, D), `image_embeds` (B, D) of the modality, and scaled similarities."""
        if position_ids is not None:
            raise ValueError("omit position_ids: this text tower supports only positions 0, 1, 2, ...")
        if input_ids is None or pixel_values is None:
            raise UserError("pass both input_ids and pixel_values, or use get_text_features or get_image_features")
        options = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        vision = self.vision_model(pixel_values, **options, return_dict=True)
        text = self.text_model(input_ids, attention_mask, **options, return_dict=True)
        image_embeds = F.normalize(self.visual_projection(vision.pooler_output), dim=-1)
        text_embeds = F.normalize(self.text_projection(text.pooler_output), dim=-1)
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.T
        return LanguageBindOutput(
            loss=contrastive_loss(image_embeds, text_embeds, self.logit_scale.exp()) if return_loss else None,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> Tensor:
        """Return the unnormalised projected features (B, D) of inputs of the modality."""
        return self.visual_projection(self.vision_model(pixel_values, **options)[1])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Return the unnormalised projected features (B, D) of texts."""
        return self.text_projection(self.text_model(input_ids, attention_mask, **options)[1])

    @classmethod
    def from_pretrained(  # type: ignore[override]  # options by name only
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: LanguageBindConfig | str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a published checkpoint, a folder that `save_pretrained` wrote, or a training checkpoint.

        Args:
            pretrained_model_name_or_path: a hub id, a folder, a training checkpoint, or a run's folder; with
                `config` also a weights file.
            config: a config or its path, which replaces the checkpoint's config.
            num_frames: frames per clip; temporal embeddings are interpolated if the checkpoint has another number.
            kwargs: options of Hugging Face's `from_pretrained`: dtype, device_map, attn_implementation, revision, ...

        Raises `UserError` if the checkpoint cannot be read, `WeightsError` if weights are missing or do not fit.
        """
        name = pretrained_model_name_or_path
        dtype = kwargs.pop("torch_dtype", None)  # the older name; neither may reach the config
        dtype = dtype_of(kwargs.pop("dtype", dtype))
        found, state, kwargs = read_pretrained(name, cls.config_class, config, **kwargs)
        with torch.device("meta"):
            published = MODELS[KIND_OF[found.modality_name]](found)  # a subclass may have weights of its own
            load_strict(published, {key: value.to("meta") for key, value in state.items()}, str(name))
        loaded = super().from_pretrained(None, *args, config=found, state_dict=state, dtype=dtype, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with the loading info
        model.name_or_path = model.config.name_or_path = str(name)
        return loaded

    def save_pretrained(  # type: ignore[override]  # options by name only
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write config and weights. Replace files in the folder, which may be in use, only after all are written."""
        folder = Path(save_directory).absolute()
        if not is_main_process:
            super().save_pretrained(folder, is_main_process=False, **kwargs)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            new = Path(temporary) / folder.name  # a push to the hub uses the folder's name
            super().save_pretrained(new, **kwargs)
            replace_weights(folder, new)


MODELS = subclasses(LanguageBindModel, "", config_class=CONFIGS)


def build_published(config: LanguageBindConfig, state: State, source: str) -> LanguageBindModel:
    """Build the model of a config with the tensors of `state`, without copying them; errors name `source`."""
    with torch.device("meta"):
        model = MODELS[KIND_OF[config.modality_name]](config)
    load_strict(model, state, source, assign=True)
    return model
