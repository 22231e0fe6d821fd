"""A published checkpoint as one of our models, with its modality; and the other way round."""

from dataclasses import asdict
from pathlib import Path

import torch

from ..config import UserError
from ..hub import load_checkpoint
from ..modalities import Modality, modality_name
from ..model import DualEncoder, same_text
from ..text import ClipText, Tokenizer, clip_tokens
from ..weights import State, WeightsError, load_strict
from .config import CONFIGS, KIND_OF, LanguageBindConfig, model_type
from .files import repository
from .model import MODELS, read_pretrained

# Options of a modality that change no input in evaluation: augmentation, limits, the choice of a decoder.
AS_EVER = ("hflip", "random_crop", "fast_resize", "max_pixels", "max_seconds", "video_backend")


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


def training_checkpoint(source: str | Path, kind: type[LanguageBindConfig]) -> tuple[LanguageBindConfig, State]:
    """Config and weights of a checkpoint of our training, adapters merged.

    Raises:
        UserError: it cannot be used, or is of another kind.
    """
    config, state = to_published(*load_checkpoint(source))
    if not isinstance(config, kind):
        raise UserError(f"{source} is a {config.model_type}, not a {kind.model_type}")
    return config, state


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
