"""Read and name the checkpoints of a training run, and build their models."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..clip4clip import CLIP4CLIP
from ..config import UserError, first_line, from_dict
from ..lora import merge_lora
from ..modalities import Modality, modality_class, with_options
from ..model import TEXT_PREFIXES, DualEncoder, InitConfig, ModelConfig, build_model, text_state
from ..remote import is_url, open_url
from ..text import TextConfig, build_text, text_tokens
from ..timm_tower import tower_options
from ..vit import EncoderConfig
from ..weights import WeightsError, interpolate_frames, load_strict, published_names, unreadable
from .imagebind import IMAGEBIND

CHECKPOINT_NAME = re.compile(r"step_(\d+)\.pt")
PARTS = "modalities"  # key of the parts in the checkpoint of a run of several modalities


def build_checkpoint(
    checkpoint: dict[str, Any], path: str | Path, like: DualEncoder | None, num_frames: int | None
) -> tuple[DualEncoder, Modality]:
    """Return the model, on the CPU with adapters merged, and the modality of what `read_checkpoint` returned.

    The model gets the moving average of the weights if training kept one, and shares the text tower of `like`. Temporal
    embeddings are interpolated to `num_frames`; None: as in training. Raises `WeightsError` if the text tower differs
    from the one used in training.
    """
    config, modality = options_of(checkpoint, path)
    state = merge_lora(published_names(checkpoint["model"] | checkpoint.get("ema", {})), config.tuning.lora_alpha)
    if num_frames is not None and num_frames != modality.input_shape[1]:
        sizes = config.encoder
        one_by_one = sizes.timm_model or (sizes.temporal_head and not sizes.temporal_attention)
        if not one_by_one or not hasattr(modality, "num_frames"):
            state = interpolate_frames(state, num_frames)
        modality = replace(modality, num_frames=num_frames)  # type: ignore[call-arg]  # a modality with frames has it
    encoder = replace(config.encoder, grad_checkpointing=False, patch_dropout=0.0)
    trained_text = any(key.startswith(TEXT_PREFIXES) for key in checkpoint["model"])
    shared = None if like is None else (like.text_model, like.text_projection, like.embed_dim)
    text = shared if shared and not trained_text else build_text(config.text, pretrained=not trained_text)
    model = DualEncoder(modality.input_shape, encoder, text, config.init.init_logit_bias)
    if not trained_text and model.text_fingerprint() != checkpoint["text_fingerprint"]:
        tower = "the one loaded before" if like is not None else f"the current {config.text.text_tower}"
        versions = ", ".join(f"{name} {version}" for name, version in checkpoint.get("versions", {}).items())
        raise WeightsError(f"the text tower of {path} differs from {tower}; versions in training: {versions}")
    load_strict(model, text_state(model) | state, f"the model of {path}")
    if (partner := checkpoint.get("partner")) and partner["weight"]:
        model.trained_with = (*model.trained_with, partner["modality"])
    return model.eval(), modality


def load_clip4clip(source: str, num_frames: int | None = None) -> tuple[DualEncoder, Modality]:
    """Return the model of `clip4clip:FILE`, on the CPU, and its modality. Any number of frames is supported."""
    encoder, inputs = tower_options(source, None)
    frames = {} if num_frames is None else {"num_frames": num_frames}
    modality = with_options(modality_class("video")(), inputs | frames)
    init = InitConfig("own", source, init_temperature=0)
    config = ModelConfig(EncoderConfig(**encoder), TextConfig(source, "own"), init=init)
    return build_model(config, modality.input_shape).eval(), modality


def read_checkpoint(path: str | Path, modality: str | None = None) -> dict[str, Any]:
    """Return the content of a training checkpoint, or `modality`'s part of one with several, or raise `UserError`."""
    parts = read_parts(path)
    if len(parts) > 1 and modality not in parts:
        raise UserError(f"{path} holds {', '.join(parts)}: name one of them (--modality)")
    return parts.get(str(modality)) or next(iter(parts.values()))


def read_parts(path: str | Path) -> dict[str, dict[str, Any]]:
    """Return the content of a training checkpoint by modality, without running pickled code, or raise `UserError`."""
    remote = is_url(path)
    if not remote and Path(path).is_dir():
        path = latest_checkpoint(Path(path) / "checkpoints") or path
    if not remote and not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    if str(path).endswith((".safetensors", ".bin")):
        raise UserError(f"{path} contains only weights: pass its folder, or clip4clip:FILE for CLIP4Clip's")
    try:
        with open_url(str(path)) if remote else open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises many types for damaged files
        raise unreadable(path, error) from error
    parts = checkpoint.get(PARTS, {"": checkpoint}) if isinstance(checkpoint, dict) else {"": {}}
    if any(not {"model", "config", "text_fingerprint"} <= part.keys() for part in parts.values()):
        raise UserError(f"{path} is not a training checkpoint: it lacks the model, config or text fingerprint")
    return {name or part["config"]["modality"].rpartition(".")[2]: part for name, part in parts.items()}


def options_of(checkpoint: dict[str, Any], path: str | Path) -> tuple[ModelConfig, Modality]:
    """Return the model's options and the modality from a checkpoint that `read_checkpoint` returned."""
    config = checkpoint["config"]
    try:
        return from_dict(ModelConfig, config["model"]), from_dict(modality_class(config["modality"]), config["inputs"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not fit this installation: {first_line(error)}") from error


def checkpoint_tokens(path: str | Path) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer of a training checkpoint: from a list of B texts to token ids (B, context length)."""
    return text_tokens(options_of(next(iter(read_parts(path).values())), path)[0].text)


def checkpoints_by_step(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. Incomplete ones have other names."""
    return [folder / name for name in sorted_by_step(path.name for path in folder.glob("step_*.pt"))]


def sorted_by_step(names: Iterable[str]) -> list[str]:
    """Return the names or paths of checkpoints among `names`, oldest first."""
    steps = {name: checkpoint_step(name.rpartition("/")[2]) for name in names}
    return [name for _, name in sorted((step, name) for name, step in steps.items() if step is not None)]


def checkpoint_step(name: str) -> int | None:
    """Return the step in a checkpoint's file name, or None for other names."""
    match = CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step, or None if there is none."""
    return next(reversed(checkpoints_by_step(folder)), None)


def is_training_checkpoint(source: str | Path, subfolder: str | None = None) -> bool:
    """Return True for a checkpoint file, a URL or a run's folder; False for the published layout or a hub id."""
    path = Path(source, subfolder or "")
    if not is_url(source) and path.is_dir():
        return not (path / "config.json").is_file()
    return is_url(source) or path.is_file() or path.suffix == ".pt"


def checkpoint_name(checkpoint: str) -> str:
    """Return a short name: `depth-step_1` for `logs/depth/checkpoints/step_1.pt`, `model` for `org/model`."""
    path = Path(checkpoint.removeprefix(IMAGEBIND).removeprefix(CLIP4CLIP)).absolute()
    name = path.stem if path.is_file() and not checkpoint.startswith(CLIP4CLIP) else path.name
    return f"{path.parent.parent.name}-{name}" if path.parent.name == "checkpoints" else name
