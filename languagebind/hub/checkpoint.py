"""Checkpoints of our training: reading, naming, and building the model they hold."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError, first_line, from_dict
from ..lora import merge_lora
from ..modalities import Modality, modality_class
from ..model import DualEncoder, ModelConfig
from ..remote import is_url, open_url
from ..text import build_text, text_tokens
from ..weights import WeightsError, interpolate_frames, load_strict, published_names, unreadable

CHECKPOINT_NAME = re.compile(r"step_(\d+)\.pt")


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", like: DualEncoder | None = None, num_frames: int | None = None
) -> tuple[DualEncoder, Modality]:
    """Return the model and the modality of a training checkpoint, in evaluation mode and with adapters merged.

    If training kept a moving average of the weights, the model has the average.

    Args:
        path: a checkpoint file or its URL (s3://...), or the folder of a run for its last checkpoint.
        device: where to put the model.
        like: a model whose text tower this one shares.
        num_frames: frames of a clip, if not as in training; temporal embeddings are interpolated.

    Raises:
        UserError: the file does not exist or is not a checkpoint of this library.
        WeightsError: the text tower is not the one that the model was trained with.
    """
    checkpoint = read_checkpoint(path)
    config, modality = options_of(checkpoint, path)
    weights = checkpoint["model"] | checkpoint.get("ema", {})
    state = merge_lora(published_names(weights), config.tuning.lora_alpha)
    if num_frames is not None and num_frames != modality.input_shape[1]:
        state = interpolate_frames(state, num_frames)
        modality = replace(modality, num_frames=num_frames)  # type: ignore[call-arg]  # a modality with frames has it
    encoder = replace(config.encoder, grad_checkpointing=False, patch_dropout=0.0)
    text = (like.text_model, like.text_projection, like.embed_dim) if like is not None else build_text(config.text)
    model = DualEncoder(modality.input_shape, encoder, text, config.init.init_logit_bias)
    if model.text_fingerprint() != checkpoint["text_fingerprint"]:
        tower = "that of the models before it" if like is not None else f"today's {config.text.text_tower}"
        versions = ", ".join(f"{name} {version}" for name, version in checkpoint.get("versions", {}).items())
        raise WeightsError(f"{path} was trained with another text tower than {tower} (trained with {versions})")
    frozen = {key: value for key, value in model.state_dict().items() if key not in model.encoder_state()}
    load_strict(model, state | frozen, f"the model of {path}")
    return model.eval().to(device), modality


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a training checkpoint; pickled code in it is never run.

    Raises:
        UserError: the file does not exist, cannot be read, or is not a checkpoint of this library.
    """
    remote = is_url(path)
    if not remote and Path(path).is_dir():
        path = latest_checkpoint(Path(path) / "checkpoints") or path
    if not remote and not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    if str(path).endswith((".safetensors", ".bin")):
        raise UserError(f"{path} holds weights alone: name its folder, which also has config.json")
    try:
        with open_url(str(path)) if remote else open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for damaged files
        raise unreadable(path, error) from error
    if not isinstance(checkpoint, dict) or not {"model", "config", "text_fingerprint"} <= checkpoint.keys():
        raise UserError(f"{path} is not a training checkpoint: it lacks the model, config or text fingerprint")
    return checkpoint


def options_of(checkpoint: dict[str, Any], path: str | Path) -> tuple[ModelConfig, Modality]:
    """Return the options of the model, and the modality, in what `read_checkpoint` returned.

    Raises:
        UserError: another version of this library wrote the options.
    """
    config = checkpoint["config"]
    try:
        return from_dict(ModelConfig, config["model"]), from_dict(modality_class(config["modality"]), config["inputs"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} was written by another version of this library: {first_line(error)}") from error


def checkpoint_tokens(path: str | Path) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer of a training checkpoint's text tower, `list[str] -> (B, context length)` ids."""
    return text_tokens(options_of(read_checkpoint(path), path)[0].text)


def checkpoints_by_step(folder: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first. Incomplete ones have other names and are left out."""
    steps = {path: checkpoint_step(path.name) for path in folder.glob("step_*.pt")}
    return [path for _, path in sorted((step, path) for path, step in steps.items() if step is not None)]


def checkpoint_step(name: str) -> int | None:
    """Return the step in the name of a checkpoint file, or None if it is another file."""
    match = CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step, or None."""
    return next(reversed(checkpoints_by_step(folder)), None)


def is_training_checkpoint(source: str | Path, subfolder: str | None = None) -> bool:
    """Tell whether this is a file, a URL or a run's folder, not a folder in the published layout or a hub id."""
    path = Path(source, subfolder or "")
    if not is_url(source) and path.is_dir():
        return not (path / "config.json").is_file()
    return is_url(source) or path.is_file() or path.suffix == ".pt"


def checkpoint_name(checkpoint: str) -> str:
    """Return a short name: `depth-epoch_1` for `logs/depth/checkpoints/epoch_1.pt`, `model` for `org/model`."""
    path = Path(checkpoint).absolute()
    name = path.stem if path.is_file() else path.name
    return f"{path.parent.parent.name}-{name}" if path.parent.name == "checkpoints" else name
