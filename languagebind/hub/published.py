"""The published model classes, with the original's names and call signatures."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from ..config import UserError
from ..loss import contrastive_loss
from ..modalities import Modality
from ..model import DualEncoder, same_text
from ..text import ClipText, Tokenizer, clip_tokens
from ..transformer import Attention
from ..weights import State, WeightsError, dtype_of, interpolate_frames, load_strict
from .checkpoint import is_training_checkpoint
from .config import CONFIGS, KIND_OF, LanguageBindConfig, model_type, training_checkpoint
from .files import HUB_OPTIONS, read_weights, replace_weights, repository
from .modules import TextTower, VisionTower, wants_dict


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
        self._use_attention()

    def set_attn_implementation(self, attn_implementation: str | dict, **options: Any) -> None:
        """`sdpa`, PyTorch's fused kernel, or `eager`."""
        super().set_attn_implementation(attn_implementation, **options)
        self._use_attention()

    def _use_attention(self) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.eager = self.config._attn_implementation == "eager"

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
        if input_ids is None or pixel_values is None:
            raise UserError("give input_ids and pixel_values; get_text_features and get_image_features take one alone")
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
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> Tensor:
        """(B, D), projected but not normalised, of whatever the modality is."""
        return self.visual_projection(self.vision_model(pixel_values, **options)[1])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """(B, D), projected but not normalised."""
        return self.text_projection(self.text_model(input_ids, attention_mask, **options)[1])

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: LanguageBindConfig | str | Path | None = None,
        **kwargs: Any,
    ):
        """Load a published checkpoint, one that `save_pretrained` wrote, or one of our training.

        Args:
            pretrained_model_name_or_path: a hub id, a folder, a checkpoint of our training or its run's folder, or with
                `config` any file of weights.
            config: in place of the checkpoint's: one, or where one is.
            num_frames: of the clips, in place of the checkpoint's; temporal embeddings are interpolated.
            kwargs: as Hugging Face's `from_pretrained`: dtype, device_map, attn_implementation, revision, variant, ...

        Raises:
            UserError: it is not there or cannot be read.
            WeightsError: weights are missing, left over, or do not fit.
        """
        name, hub = pretrained_model_name_or_path, {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        if "state_dict" in kwargs:
            raise UserError(f"state_dict: call {cls.__name__}(config).load_state_dict, which checks its keys")
        dtype = kwargs.pop("torch_dtype", None)  # the older name; neither is a matter of the config
        dtype = dtype_of(kwargs.pop("dtype", dtype))
        if isinstance(config, (str, os.PathLike)):
            config = cls.config_class.from_pretrained(config)
        config, state, kwargs = read_pretrained(cls, name, config, hub, kwargs)
        with torch.device("meta"):
            check_state(cls(config), state, name)
        return super().from_pretrained(None, *args, config=config, state_dict=state, dtype=dtype, **kwargs)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write config and weights, whole, and then put them in the place of what is there: it may be in use.

        Raises:
            UserError: there is a file where the folder should be.
        """
        folder = Path(save_directory).absolute()
        if folder.is_file():
            raise UserError(f"{save_directory} is a file: name a folder")
        if not is_main_process:
            super().save_pretrained(folder, is_main_process=False, **kwargs)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            new = Path(temporary) / folder.name  # a push to the hub takes the last part for the model's name
            super().save_pretrained(new, **kwargs)
            replace_weights(folder, new)


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
    num_frames, variant = kwargs.pop("num_frames", None), kwargs.pop("variant", None)
    if config is not None:
        config = copy.deepcopy(config)  # it is changed below
    elif not is_training_checkpoint(Path(name) / (hub.get("subfolder") or "")):
        config, kwargs = cls.config_class.from_pretrained(name, return_unused_kwargs=True, **hub, **kwargs)
    if config is None:
        pass

        config, state = training_checkpoint(name, cls.config_class)
    else:
        state = read_weights(name, config.vision_config.lora_r, config.vision_config.lora_alpha, variant, **hub)
    vision = config.vision_config
    vision.lora_r = 0  # from here on there are no adapters
    if num_frames is not None and num_frames != vision.num_frames:
        state = interpolate_frames(state, num_frames)
        vision.num_frames = num_frames
    return config, state, kwargs


def check_state(model: nn.Module, state: State, name: str | Path) -> None:
    """Raise `WeightsError` with the keys unless `state` fits a model on the meta device exactly."""
    load_strict(model, {key: value.to("meta") for key, value in state.items()}, str(name))


def load_published(
    source: str | Path,
    device: str | torch.device = "cpu",
    like: DualEncoder | None = None,
    num_frames: int | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[DualEncoder, Modality]:
    """The model and the modality of a folder in the published layout, or of a hub id.

    Raises:
        UserError: it is not there, of another kind, or its text tower is of another size than that of `like`.
        WeightsError: its weights do not fit.
    """
    name, hub = repository(source), {"cache_dir": cache_dir}
    config = read_config(source, cache_dir)
    config, state, _ = read_pretrained(
        MODELS[KIND_OF[config.modality_name]], name, config, hub, {"num_frames": num_frames}
    )
    with torch.device("meta"):
        tower = ClipText(config.text_config.sizes, Tokenizer(clip_tokens(config.text_config.max_position_embeddings)))
        projection = torch.nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        model = DualEncoder(
            config.vision_config.input_shape, config.vision_config.sizes, (tower, projection, config.projection_dim)
        )
    load_strict(model, state, name, assign=True)
    if like is not None:
        if not same_text(model, like):
            raise WeightsError(f"{name} has another text tower than those before it: load it apart")
        model.text_model, model.text_projection = like.text_model, like.text_projection
    return model.eval().requires_grad_(False).to(device), config.modality


def read_config(source: str | Path, cache_dir: str | Path | None = None) -> LanguageBindConfig:
    """The config of a folder in the published layout, or of a hub id, whichever of the five it is.

    Raises:
        UserError: it is not there, or none of them.
    """
    name, kinds = repository(source), {kind.model_type: kind for kind in CONFIGS.values()}
    said = model_type(name, cache_dir=cache_dir)
    if said not in kinds:
        raise UserError(f"{name} is a {said}, not one of {', '.join(kinds)}")
    return kinds[said].from_pretrained(name, cache_dir=cache_dir)
