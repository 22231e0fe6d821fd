"""Read the `config.json` of published checkpoints, and convert it to and from our options."""

import copy
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..config import UserError, at_least
from ..modalities import UNUSED, Modality, modality_class, modality_name
from ..model import DualEncoder
from ..text import ClipText, ClipTextConfig, clip_text_sizes
from ..transformer import LAYER_NORM_EPS
from ..vit import Activation, EncoderConfig
from ..weights import State, interpolate_frames
from .checkpoint import build_checkpoint, is_training_checkpoint, options_of, read_checkpoint
from .files import HUB_OPTIONS, pin, read_weights

T = TypeVar("T")

# Modality names of the original LanguageBind code -> ours
NAMES = {"video": "video", "audio": "audio", "depth": "depth", "thermal": "infrared", "image": "image"}
# Our option names -> names in config.json
SIZES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "activation": "hidden_act",
}
TEXT_SIZES = SIZES | {"vocab_size": "vocab_size", "context_length": "max_position_embeddings"}
ENCODER_SIZES = SIZES | {"patch_size": "patch_size", "temporal_attention": "add_time_attn"}
MODALITY_OPTIONS = {"sample_rate": "audio_sample_rate", "channels": "audio_channels"}  # other names are the same


def subclasses(base: type[T], suffix: str, **attributes: Mapping[str, Any]) -> dict[str, type[T]]:
    """Add LanguageBindVideo<suffix>, ..., one subclass per modality, to the module of `base`; return them by modality.

    Each of `attributes` maps modalities to values of a class attribute.
    """
    made = {}
    for modality in NAMES:
        name = f"LanguageBind{modality.title()}{suffix}"
        values = {key: value[modality] for key, value in attributes.items()} | {"__module__": base.__module__}
        made[modality] = cast(type[T], type(name, (base,), values))
        setattr(sys.modules[base.__module__], name, made[modality])
    return made


@strict
class LanguageBindTextConfig(PreTrainedConfig):  # CLIPTextConfig would import this module again
    """Sizes of the text tower. The special-token ids are ignored because the published files have wrong ones."""

    model_type = "clip_text_model"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    context_length: int | None = None  # not in the published files: tokens of a text, if fewer than the positions
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: int | float = 0.0
    initializer_range: float = 0.02
    initializer_factor: int | float = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    add_time_attn: bool = False

    @property
    def sizes(self) -> ClipTextConfig:
        """Return the sizes in the form that our text tower takes."""
        return ClipTextConfig(**{ours: getattr(self, theirs) for ours, theirs in TEXT_SIZES.items()})


@strict
class LanguageBindVisionConfig(PreTrainedConfig):
    """Sizes of the encoder and options of its preprocessing."""

    model_type = "clip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int | list[int] | tuple[int, ...] = 32  # in the published files, one number
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: int | float = 0.0
    initializer_range: float = 0.02
    initializer_factor: int | float = 1.0
    add_time_attn: bool = False
    num_frames: int = 1
    force_patch_dropout: int | float = 0.0
    lora_r: int = 2
    lora_alpha: int | float = 16
    lora_dropout: int | float = 0.0
    merged_lora_r: int = 0  # not in the published files: the rank of adapters that are merged into the weights
    num_mel_bins: int | float = 0
    target_length: int | float = 0
    video_decode_backend: str = "decord"
    max_depth: int | float = 10
    audio_sample_rate: int = 16000
    audio_mean: int | float = 0.5
    audio_std: int | float = 0.5
    infrared_range: str | list[float] | tuple[float, ...] = "minmax"  # not in the published files
    audio_channels: str = "first"  # not in the published files: the original code uses the first channel
    clip_type: str | None = "vl"
    tube_size: Literal[1] = 1

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Return the shape (C, T, H, W) of one sample."""
        if self.num_mel_bins and self.target_length:
            height, width = int(self.num_mel_bins), int(self.target_length)
        else:
            height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return (self.num_channels, self.num_frames, height, width)

    @property
    def sizes(self) -> EncoderConfig:
        """Return the sizes and options in the form that our encoder takes."""
        return EncoderConfig(
            patch_embedding="3d" if self.clip_type == "vl_new" else "2d",
            patch_dropout=self.force_patch_dropout,
            **{ours: getattr(self, theirs) for ours, theirs in ENCODER_SIZES.items()},
        )


@strict
class LanguageBindConfig(PreTrainedConfig):
    """Config of a model. Each of the five modalities has a subclass."""

    sub_configs_defaults: ClassVar[dict] = {
        "text_config": LanguageBindTextConfig,
        "vision_config": LanguageBindVisionConfig,
    }
    modality_name: ClassVar[str] = ""

    text_config: dict | LanguageBindTextConfig | None = None
    vision_config: dict | LanguageBindVisionConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: int | float = 2.6592
    initializer_factor: int | float = 1.0
    trained_with: list[str] | tuple[str, ...] = ("text",)  # not in the published files: also a partner's modality

    def __post_init__(self, **kwargs):
        # Old files have each sub-config twice. `…_config_dict` overrides the other, even with default values.
        for name, kind in (("text_config", LanguageBindTextConfig), ("vision_config", LanguageBindVisionConfig)):
            given = kwargs.pop(f"{name}_dict", None)
            if given is not None:
                setattr(self, name, (getattr(self, name) or {}) | kind(**given).to_dict())
        super().__post_init__(**kwargs)

    @property
    def text(self) -> LanguageBindTextConfig:
        return cast(LanguageBindTextConfig, self.text_config)  # __post_init__ converts a dict

    @property
    def vision(self) -> LanguageBindVisionConfig:
        return cast(LanguageBindVisionConfig, self.vision_config)

    @property
    def modality(self) -> Modality:
        """Return the preprocessing used in training."""
        return modality_of(self.modality_name, self.vision)

    @classmethod
    def from_text_vision_configs(cls, text_config: Any, vision_config: Any, **kwargs: Any) -> "LanguageBindConfig":
        """Return a config made of the configs of its two sides."""
        return cls(text_config=text_config.to_dict(), vision_config=vision_config.to_dict(), **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # options by name only
        cls, pretrained_model_name_or_path: str | Path, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the config of a folder, hub id or training checkpoint; optionally also return the unused options."""
        config, unused = read_config(pretrained_model_name_or_path, cls, **kwargs)
        return (config, unused) if return_unused_kwargs else config

    def check(self, kind: "type[LanguageBindConfig]") -> None:
        """Raise `UserError` if the config is not a `kind`, or is invalid for the model or its preprocessing."""
        if not isinstance(self, kind):
            raise UserError(f"this is a {self.model_type}, not a {kind.model_type}")
        shape = self.vision.input_shape
        if min(shape) < 1 or self.modality.input_shape != shape:
            raise UserError(f"{self.modality_name} does not support inputs (channels, frames, height, width) {shape}")
        at_least(1, projection_dim=self.projection_dim)
        for side in (self.vision, self.text):
            if side.layer_norm_eps != LAYER_NORM_EPS:
                raise UserError(f"layer_norm_eps {side.layer_norm_eps}: only CLIP's {LAYER_NORM_EPS} is supported")


MODEL_TYPES = {name: f"LanguageBind{name.title()}" for name in NAMES}
CONFIGS = subclasses(LanguageBindConfig, "Config", model_type=MODEL_TYPES, modality_name=NAMES)
KIND_OF = {ours: theirs for theirs, ours in NAMES.items()}


def read_config(
    source: str | Path, kind: type[LanguageBindConfig] = LanguageBindConfig, **options: Any
) -> tuple[LanguageBindConfig, dict[str, Any]]:
    """Return the config of a folder in the published layout, a hub id, a training checkpoint or a run's folder.

    By default, it is of any modality. The options are those of `PreTrainedConfig.from_pretrained`, and config values
    that override the file; those that are neither are returned, too.
    """
    training = is_training_checkpoint(source, options.get("subfolder"))
    name, hub = (source, {}) if training else pin(source, ("config.json",), **options)
    try:
        if training:
            model, modality = options_of(read_checkpoint(name, kind.modality_name), name)
            config = to_config(modality, model.encoder, *clip_text_sizes(model.text))
            config.text.context_length = model.text.context_length or config.text.max_position_embeddings
            unused = {key: value for key, value in options.items() if key not in HUB_OPTIONS}
        else:
            values, unused = PreTrainedConfig.get_config_dict(name, **options | hub)
            if "int8" in values:
                raise ValueError("it is an export for ONNX or torch.export; pass the checkpoint instead")
            found = {config.model_type: config for config in CONFIGS.values()}.get(values.get("model_type", ""), kind)
            found = kind if issubclass(kind, found) else found  # a subclass of a user's
            config, unused = found.from_dict(values, return_unused_kwargs=True, **unused)
        config.check(kind)
    except (StrictDataclassError, OSError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"cannot use the config of {name}: {' '.join(str(error).split())}") from error
    return config, unused


def read_pretrained(
    name: str | Path,
    kind: type[LanguageBindConfig] = LanguageBindConfig,
    config: LanguageBindConfig | str | Path | None = None,
    num_frames: int | None = None,
    variant: str | None = None,
    **options: Any,
) -> tuple[LanguageBindConfig, State, dict[str, Any]]:
    """Return a config, the weights under their published names with adapters merged, and the unused options.

    For arguments and errors see `LanguageBindModel.from_pretrained`; `kind` is the expected class of the config.
    """
    hub = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
    if config is None and is_training_checkpoint(name, hub.get("subfolder")):
        checkpoint = read_checkpoint(name, kind.modality_name)
        found, state = to_published(*build_checkpoint(checkpoint, name, None, num_frames))
        found.check(kind)
        return found, state, options
    name, hub = pin(name, **hub)
    if config is None:
        found, options = read_config(name, kind, **hub, **options)
    elif isinstance(config, LanguageBindConfig):
        found = copy.deepcopy(config)  # changed below
    else:
        found, _ = read_config(config, kind)
    rank = found.vision.lora_r or found.vision.merged_lora_r
    state = read_weights(name, rank, found.vision.lora_alpha, variant, **hub)
    found.vision.lora_r, found.vision.merged_lora_r = 0, rank
    if num_frames is not None and num_frames != found.vision.num_frames:
        state = interpolate_frames(state, num_frames)
        found.vision.num_frames = num_frames
    return found, state, options


def modality_of(name: str, vision: Any) -> Modality:
    """Return the preprocessing that a vision config describes, or any object with some of its values."""
    if not isinstance(vision, LanguageBindVisionConfig):
        names = [name for name in LanguageBindVisionConfig.__annotations__ if hasattr(vision, name)]
        vision = LanguageBindVisionConfig(**{name: getattr(vision, name) for name in names})
    *_, height, width = vision.input_shape
    values = vars(vision) | {"image_size": height, "num_mel_bins": height, "target_length": width}
    kind = modality_class(name)
    return kind(**{ours: values[theirs] for ours, theirs in option_names(kind).items()})


def option_names(kind: type[Modality]) -> dict[str, str]:
    """Return a mapping from our names of modality options to the names in config.json, which lacks some."""
    names = {field.name: MODALITY_OPTIONS.get(field.name, field.name) for field in fields(kind)}
    return {ours: theirs for ours, theirs in names.items() if hasattr(LanguageBindVisionConfig, theirs)}


def to_config(modality: Modality, encoder: EncoderConfig, text: ClipTextConfig | None, dim: int) -> LanguageBindConfig:
    """Return a config in the published layout for a model without adapters.

    Raises `UserError` if the layout does not support the modality, an option, or a text tower other than CLIP's (None).
    """
    name = modality_name(modality)
    if name not in KIND_OF:
        raise UserError(f"the published layout does not support {name}, only {', '.join(sorted(KIND_OF))}")
    if text is None:
        remedy = "share its checkpoint file, which languagebind.load can read"
        raise UserError(f"the published layout supports only CLIP's text tower, but this model has another: {remedy}")
    if other := encoder.timm_model or (encoder.temporal_head and "a temporal head"):
        raise UserError(f"the published layout does not support {other}: use languagebind.load")
    sizes = {theirs: getattr(encoder, ours) for ours, theirs in ENCODER_SIZES.items()}
    options = {theirs: getattr(modality, ours) for ours, theirs in option_names(type(modality)).items()}
    clip_type = "vl_new" if encoder.patch_embedding == "3d" else "vl"
    config = CONFIGS[KIND_OF[name]](
        projection_dim=dim,
        text_config={theirs: getattr(text, ours) for ours, theirs in TEXT_SIZES.items()},
        vision_config=sizes | options | {"clip_type": clip_type, "lora_r": 0},
    )
    for key, value in asdict(modality).items():
        if key not in UNUSED and value != getattr(config.modality, key):
            raise UserError(f"the published layout cannot store {key}={value!r} of {name}")
    return config


def to_published(model: DualEncoder, modality: Modality) -> tuple[LanguageBindConfig, State]:
    """Return the published config and weights of a model with merged adapters; for errors see `to_config`."""
    text = model.text_model.sizes if isinstance(model.text_model, ClipText) else None
    sizes: Any = getattr(model.vision_model, "sizes", None)  # ImageBind's tower has none, nor CLIP's text tower
    config = to_config(modality, sizes, text, model.embed_dim)
    config.text.context_length = cast(Any, model.text_model.tokenizer).encode.context_length
    config.trained_with = model.trained_with
    return config, model.state_dict()
