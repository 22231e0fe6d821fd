"""The `config.json` of the published checkpoints, and what it says in our terms."""

from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..config import UserError, at_least
from ..modalities import Modality, modality_class, modality_name
from ..model import DualEncoder
from ..text import ClipText, ClipTextConfig
from ..transformer import ACTIVATIONS, LAYER_NORM_EPS
from ..vit import EncoderConfig
from ..weights import State
from .checkpoint import is_training_checkpoint, load_checkpoint
from .files import HUB_OPTIONS, not_there, repository

# Options of a modality that change no input in evaluation: augmentation, limits, the choice of a decoder.
AS_EVER = ("hflip", "random_crop", "fast_resize", "max_pixels", "max_seconds", "video_backend")


@strict
class LanguageBindTextConfig(PreTrainedConfig):
    """Sizes of the text tower. Its special-token ids are not used: the published files hold wrong ones."""

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
        _check_eps(self.layer_norm_eps)
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
            size = (int(self.num_mel_bins), int(self.target_length))
        else:
            size = (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)
        return (self.num_channels, self.num_frames, *size)

    @property
    def sizes(self) -> EncoderConfig:
        if self.tube_size != 1:
            raise UserError(f"tube_size {self.tube_size}: only 1 was ever published")
        _check_eps(self.layer_norm_eps)
        return EncoderConfig(
            patch_size=self.patch_size,
            width=self.hidden_size,
            depth=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            mlp_dim=self.intermediate_size,
            activation=self.hidden_act,
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs):
        """The config of a folder, a hub id, or a checkpoint of our training; options as in transformers.

        Raises:
            UserError: it is not there, is damaged, or is of another modality.
        """
        name = repository(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        if is_training_checkpoint(Path(name) / (hub.get("subfolder") or "")):
            config = training_checkpoint(name, cls)[0]
            unused = {key: value for key, value in kwargs.items() if key not in hub}
            return (config, unused) if unused.pop("return_unused_kwargs", False) else config
        said = model_type(name, **hub)
        if said != cls.model_type and said in {config.model_type for config in CONFIGS.values()}:
            raise UserError(f"{name} is a {said}, not a {cls.model_type}")
        try:
            found = super().from_pretrained(name, **kwargs)
            (found[0] if isinstance(found, tuple) else found)._check()
        except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the config.json of {name}: {' '.join(str(error).split())}") from error
        return found

    def _check(self) -> None:
        """Raise an error unless the values make a model and its preprocessing."""
        shape, tower = self.vision_config.input_shape, self.text_config.sizes
        if len(shape) != 4 or min(shape) < 1 or self.modality.input_shape != shape:
            raise UserError(f"(channels, frames, height, width) cannot be {shape} for {self.modality_name}")
        at_least(1, projection_dim=self.projection_dim, width=tower.width, depth=tower.depth)
        at_least(1, num_heads=tower.num_heads, mlp_dim=tower.mlp_dim)
        for kind in (self.vision_config.sizes.activation, tower.activation):
            if kind not in ACTIVATIONS:
                raise UserError(f"hidden_act {kind!r}: expected one of {', '.join(ACTIVATIONS)}")

    @property
    def modality(self) -> Modality:
        """The preprocessing that the checkpoint was trained with, as one of our modalities."""
        vision, kind = self.vision_config, modality_class(self.modality_name)
        _, num_frames, height, _ = vision.input_shape
        if self.modality_name == "audio":
            return kind(
                num_mel_bins=height,
                target_length=vision.input_shape[3],
                sample_rate=vision.audio_sample_rate,
                audio_mean=vision.audio_mean,
                audio_std=vision.audio_std,
                channels=vision.audio_channels,
            )
        options = {"video": {"num_frames": num_frames}, "depth": {"max_depth": vision.max_depth}}
        return kind(image_size=height, **options.get(self.modality_name, {}))


def model_type(name: str, **hub) -> str | None:
    """What the config.json of a folder or hub id says that it is.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        return LanguageBindConfig.get_config_dict(name, **hub)[0].get("model_type")
    except OSError as error:
        if not Path(name).exists():
            raise not_there(name, error) from error
        raise UserError(f"cannot load the config of {name}: {' '.join(str(error).split())}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"cannot load the config of {name}: it is no JSON object") from error


def _check_eps(eps: float) -> None:
    if eps != LAYER_NORM_EPS:
        raise UserError(f"layer_norm_eps {eps}: every CLIP has {LAYER_NORM_EPS}, and so have these towers")


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


def to_published(model: DualEncoder, modality: Modality) -> tuple[LanguageBindConfig, State]:
    """Config and weights in the published layout, adapters merged.

    Raises:
        UserError: the layout has no place for this modality, its text tower or its options.
    """
    name = modality_name(modality)
    if name not in KIND_OF:
        raise UserError(f"the published layout knows {', '.join(sorted(KIND_OF))}, not {name}")
    if not isinstance(model.text_model, ClipText):
        raise UserError(
            "the published layout holds CLIP's text tower, and this model has another one: share its checkpoint file,"
            " which languagebind.load takes"
        )
    vision, text = model.vision_model.sizes, model.text_model.sizes
    _, num_frames, height, width = model.vision_model.input_shape
    own = {
        "audio": lambda: {
            "num_mel_bins": height,
            "target_length": width,
            "audio_sample_rate": modality.sample_rate,
            "audio_mean": modality.audio_mean,
            "audio_std": modality.audio_std,
            "audio_channels": modality.channels,
        },
        "depth": lambda: {"image_size": height, "max_depth": modality.max_depth},
    }
    config = CONFIGS[KIND_OF[name]](
        projection_dim=model.embed_dim,
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
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.mlp_dim,
            "hidden_act": vision.activation,
            "patch_size": vision.patch_size,
            "num_frames": num_frames,
            "add_time_attn": vision.temporal_attention,
            "clip_type": "vl_new" if vision.patch_embedding == "3d" else "vl",
            "lora_r": 0,
            **own.get(name, lambda: {"image_size": height})(),
        },
    )
    lost = [
        key for key, value in asdict(modality).items() if key not in AS_EVER and value != getattr(config.modality, key)
    ]
    if lost:
        raise UserError(f"the published layout has no place for {lost[0]} {getattr(modality, lost[0])!r} of {name}")
    return config, model.state_dict()


def training_checkpoint(source: str | Path, kind: type[LanguageBindConfig]) -> tuple[LanguageBindConfig, State]:
    """Config and weights of a checkpoint of our training, adapters merged.

    Raises:
        UserError: it cannot be used, or is of another kind.
    """
    config, state = to_published(*load_checkpoint(source))
    if not isinstance(config, kind):
        raise UserError(f"{source} is a {config.model_type}, not a {kind.model_type}")
    return config, state
