"""The `config.json` of the published checkpoints, and its translation to and from our options."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..config import UserError, at_least
from ..modalities import Modality, modality_class, modality_name
from ..model import DualEncoder
from ..text import ClipText, ClipTextConfig, clip_text_sizes
from ..transformer import ACTIVATIONS, LAYER_NORM_EPS
from ..vit import Activation, EncoderConfig
from ..weights import State, interpolate_frames
from .checkpoint import is_training_checkpoint, options_of, read_checkpoint
from .files import HUB_OPTIONS, not_there, repository

# Options of a modality that do not change its inputs in evaluation: augmentation, limits, the choice of a decoder.
TRAINING_ONLY = ("hflip", "random_crop", "fast_resize", "max_pixels", "max_seconds", "video_backend")
# Our name of an option -> its name in config.json. The others have the same name.
PUBLISHED_NAMES = {"sample_rate": "audio_sample_rate", "channels": "audio_channels"}


@strict
class LanguageBindTextConfig(PreTrainedConfig):
    """Sizes of the text tower. Its special-token ids are not used: those in the published files are wrong."""

    model_type = "clip_text_model"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
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
        """The same, as our text tower takes them."""
        return ClipTextConfig(
            vocab_size=self.vocab_size,
            context_length=self.max_position_embeddings,
            width=self.hidden_size,
            depth=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            mlp_dim=self.intermediate_size,
            activation=self.hidden_act,
        )


@strict
class LanguageBindVisionConfig(PreTrainedConfig):
    """Sizes of the encoder, and the options of its preprocessing."""

    model_type = "clip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
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
    num_mel_bins: int | float = 0
    target_length: int | float = 0
    video_decode_backend: str = "decord"
    max_depth: int | float = 10
    audio_sample_rate: int = 16000
    audio_mean: int | float = 0.5
    audio_std: int | float = 0.5
    audio_channels: str = "first"  # not in the published files: the original took the first
    clip_type: str | None = "vl"
    tube_size: int = 1

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one sample."""
        if self.num_mel_bins and self.target_length:
            height, width = int(self.num_mel_bins), int(self.target_length)
        else:
            height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return (self.num_channels, self.num_frames, height, width)

    @property
    def sizes(self) -> EncoderConfig:
        """Sizes and options, as our encoder takes them."""
        return EncoderConfig(
            patch_size=self.patch_size,
            width=self.hidden_size,
            depth=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            mlp_dim=self.intermediate_size,
            activation=cast(Activation, self.hidden_act),
            temporal_attention=self.add_time_attn,
            patch_embedding="3d" if self.clip_type == "vl_new" else "2d",
            patch_dropout=self.force_patch_dropout,
        )


@strict
class LanguageBindConfig(PreTrainedConfig):
    """What the five model types share."""

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

    def __post_init__(self, **kwargs):
        # Old files say everything twice. What `…_config_dict` leaves out counts as given, with the class's default.
        for name, kind in (("text_config", LanguageBindTextConfig), ("vision_config", LanguageBindVisionConfig)):
            given = kwargs.pop(f"{name}_dict", None)
            if given is not None:
                before = getattr(self, name) or {}
                before = before if isinstance(before, dict) else before.to_dict()
                setattr(self, name, before | kind(**given).to_dict())
        super().__post_init__(**kwargs)

    @property
    def text(self) -> LanguageBindTextConfig:
        return cast(LanguageBindTextConfig, self.text_config)  # a dict is turned into one when the config is made

    @property
    def vision(self) -> LanguageBindVisionConfig:
        return cast(LanguageBindVisionConfig, self.vision_config)

    @property
    def modality(self) -> Modality:
        """The preprocessing that the checkpoint was trained with, as one of our modalities."""
        vision, make = self.vision, cast(Callable[..., Modality], modality_class(self.modality_name))
        _, num_frames, height, width = vision.input_shape
        if self.modality_name == "audio":
            return make(
                num_mel_bins=height,
                target_length=width,
                sample_rate=vision.audio_sample_rate,
                audio_mean=vision.audio_mean,
                audio_std=vision.audio_std,
                channels=vision.audio_channels,
            )
        own: dict[str, Any] = {"video": {"num_frames": num_frames}, "depth": {"max_depth": vision.max_depth}}
        return make(image_size=height, **own.get(self.modality_name, {}))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # options by name only
        cls, pretrained_model_name_or_path: str | Path, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the config of a folder, a hub id or a training checkpoint, and on request the unused options.

        Raises:
            UserError: there is no such config, it cannot be used, or it is of another modality.
        """
        config, unused = read_config(pretrained_model_name_or_path, cls, **kwargs)
        return (config, unused) if return_unused_kwargs else config

    def check(self, kind: "type[LanguageBindConfig]") -> None:
        """Raise `UserError` if this is not of a kind, or its values do not make a model with its preprocessing."""
        if not isinstance(self, kind):
            raise UserError(f"this is a {self.model_type}, not a {kind.model_type}")
        shape = self.vision.input_shape
        if min(shape) < 1 or self.modality.input_shape != shape:
            raise UserError(f"(channels, frames, height, width) cannot be {shape} for {self.modality_name}")
        at_least(1, projection_dim=self.projection_dim)
        for side in (self.vision, self.text):
            if side.hidden_act not in ACTIVATIONS:
                raise UserError(f"hidden_act {side.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)}")
            if side.layer_norm_eps != LAYER_NORM_EPS:
                raise UserError(f"layer_norm_eps {side.layer_norm_eps}: only CLIP's {LAYER_NORM_EPS} is supported")

    def resize_frames(self, state: State, num_frames: int | None) -> State:
        """Take another number of frames, if one is given, and return the weights for it."""
        if num_frames is None or num_frames == self.vision.num_frames:
            return state
        state = interpolate_frames(state, num_frames)
        self.vision.num_frames = num_frames
        return state


class LanguageBindVideoConfig(LanguageBindConfig):
    model_type = "LanguageBindVideo"
    modality_name = "video"


class LanguageBindAudioConfig(LanguageBindConfig):
    model_type = "LanguageBindAudio"
    modality_name = "audio"


class LanguageBindDepthConfig(LanguageBindConfig):
    model_type = "LanguageBindDepth"
    modality_name = "depth"


class LanguageBindThermalConfig(LanguageBindConfig):
    model_type = "LanguageBindThermal"
    modality_name = "infrared"


class LanguageBindImageConfig(LanguageBindConfig):
    model_type = "LanguageBindImage"
    modality_name = "image"


CONFIGS = {
    "video": LanguageBindVideoConfig,
    "audio": LanguageBindAudioConfig,
    "depth": LanguageBindDepthConfig,
    "thermal": LanguageBindThermalConfig,
    "image": LanguageBindImageConfig,
}
KIND_OF = {config.modality_name: name for name, config in CONFIGS.items()}  # our name of a modality -> the original's


def read_config(
    source: str | Path, kind: type[LanguageBindConfig] = LanguageBindConfig, **options: Any
) -> tuple[LanguageBindConfig, dict[str, Any]]:
    """Read a config, and return it with the options that it has no place for.

    Args:
        source: a folder in the published layout, a hub id, or a checkpoint of our training or its run's folder.
        kind: the class that it must be of; by default any of the five.
        options: those of `PreTrainedConfig.from_pretrained`; values of the config replace those in the file.

    Raises:
        UserError: there is no such config, or it cannot be used.
    """
    name = repository(source)
    try:
        if is_training_checkpoint(Path(name) / (options.get("subfolder") or "")):
            model, modality = options_of(read_checkpoint(name), name)
            config = to_config(modality, model.encoder, *clip_text_sizes(model.text))
            unused = {key: value for key, value in options.items() if key not in HUB_OPTIONS}
        else:
            values, unused = PreTrainedConfig.get_config_dict(name, **options)
            found = {config.model_type: config for config in CONFIGS.values()}.get(values.get("model_type", ""), kind)
            config, unused = found.from_dict(values, return_unused_kwargs=True, **unused)
        config.check(kind)
    except (StrictDataclassError, OSError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OSError) and not Path(name).exists():
            raise not_there(name, error) from error
        raise UserError(f"cannot use the config of {name}: {' '.join(str(error).split())}") from error
    return config, unused


def to_config(
    modality: Modality, encoder: EncoderConfig, text: ClipTextConfig | None, embed_dim: int
) -> LanguageBindConfig:
    """Return the config in the published layout of a model without adapters.

    Raises:
        UserError: the layout has no place for the modality, an option, or a text tower other than CLIP's (None).
    """
    name = modality_name(modality)
    if name not in KIND_OF:
        raise UserError(f"the published layout knows {', '.join(sorted(KIND_OF))}, not {name}")
    if text is None:
        raise UserError(
            "the published layout holds CLIP's text tower, and this model has another one: share its checkpoint file,"
            " which languagebind.load takes"
        )
    options = {PUBLISHED_NAMES.get(key, key): value for key, value in asdict(modality).items()}
    config = CONFIGS[KIND_OF[name]](
        projection_dim=embed_dim,
        text_config={
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "hidden_size": text.width,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.num_heads,
            "intermediate_size": text.mlp_dim,
            "hidden_act": text.activation,
        },
        vision_config={
            "hidden_size": encoder.width,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "intermediate_size": encoder.mlp_dim,
            "hidden_act": encoder.activation,
            "patch_size": encoder.patch_size,
            "add_time_attn": encoder.temporal_attention,
            "clip_type": "vl_new" if encoder.patch_embedding == "3d" else "vl",
            "lora_r": 0,
            **{key: value for key, value in options.items() if hasattr(LanguageBindVisionConfig, key)},
        },
    )
    for key, value in asdict(modality).items():
        if key not in TRAINING_ONLY and value != getattr(config.modality, key):
            raise UserError(f"the published layout has no place for {key} {value!r} of {name}")
    return config


def to_published(model: DualEncoder, modality: Modality) -> tuple[LanguageBindConfig, State]:
    """Return config and weights in the published layout, of a model with merged adapters; errors as in `to_config`."""
    text = model.text_model.sizes if isinstance(model.text_model, ClipText) else None
    return to_config(modality, model.vision_model.sizes, text, model.embed_dim), model.state_dict()
