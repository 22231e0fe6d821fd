"""Models with their preprocessing, from checkpoints of our training and from published ones."""

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
from ..text import TextConfig, build_text, text_tokens
from ..weights import WeightsError, interpolate_frames, load_strict, published_names, unreadable

CHECKPOINT_NAME = re.compile(r"step_(\d+)\.pt")


def load_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    like: DualEncoder | None = None,
    num_frames: int | None = None,
) -> tuple[DualEncoder, Modality]:
    """The model and the modality of a training checkpoint, ready for evaluation; adapters are merged.

    Where training kept a moving average of the weights, the model is that average.

    Args:
        path: a file that training wrote, or its URL (s3://...); or the folder of a run, for the last one in it.
        device: where to put the model.
        like: a model whose text tower this one is to share.
        num_frames: of the clips, in place of what it was trained with; temporal embeddings are interpolated.

    Raises:
        UserError: no such file, not a checkpoint of this library, or its text tower is not the one it was trained with.
    """
    checkpoint = read_checkpoint(path)
    try:
        config = from_dict(ModelConfig, checkpoint["config"]["model"])
        modality = from_dict(modality_class(checkpoint["config"]["modality"]), checkpoint["config"]["inputs"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or of another version of this library: {first_line(error)}") from error
    weights = checkpoint["model"] | checkpoint.get("ema", {})
    state = merge_lora(published_names(weights), config.tuning.lora_alpha)
    if num_frames is not None and num_frames != modality.input_shape[1]:
        state, modality = interpolate_frames(state, num_frames), replace(modality, num_frames=num_frames)
    encoder = replace(config.encoder, grad_checkpointing=False, patch_dropout=0.0)
    text = (like.text_model, like.text_projection, like.embed_dim) if like is not None else build_text(config.text)
    model = DualEncoder(modality.input_shape, encoder, text, config.init.init_logit_bias)
    if model.text_fingerprint() != checkpoint["text_fingerprint"]:
        tower = "those before it were" if like is not None else f"{config.text.text_tower} is now"
        versions = ", ".join(f"{name} {version}" for name, version in checkpoint.get("versions", {}).items())
        raise WeightsError(f"{path} was trained with another text tower than {tower} (it was made with {versions})")
    frozen = {key: value for key, value in model.state_dict().items() if key not in model.encoder_state()}
    load_strict(model, state | frozen, f"the model of {path}")
    return model.eval().to(device), modality


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a training checkpoint holds. Never runs pickled code.

    Raises:
        UserError: no such file, it cannot be reached, or is not a checkpoint of this library.
    """
    remote, path = is_url(path), path if is_url(path) else Path(path)
    if not remote and path.is_dir():
        path = latest_checkpoint(path / "checkpoints") or path
    if not remote and not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    if str(path).endswith((".safetensors", ".bin")):
        raise UserError(f"{path} holds weights alone: name its folder, where config.json is")
    try:
        with open_url(str(path)) if remote else open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises many kinds for damaged files
        raise UserError(f"{path} {unreadable(error)}") from error
    if not isinstance(checkpoint, dict) or not {"model", "config", "text_fingerprint"} <= checkpoint.keys():
        raise UserError(
            f"{path} is no training checkpoint of this library (no model, config and text fingerprint in it)"
        )
    return checkpoint


def checkpoint_tokens(path: str | Path) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a training checkpoint's text tower, `list[str] -> (B, context length)` ids.

    Raises:
        UserError: as `read_checkpoint`; the tower cannot be found.
    """
    return text_tokens(from_dict(TextConfig, read_checkpoint(path)["config"]["model"]["text"]))


def checkpoints_by_step(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; a half-written one has another name and is not seen."""
    found = (path for path in folder.glob("step_*.pt") if checkpoint_step(path.name) is not None)
    return sorted(found, key=lambda path: checkpoint_step(path.name))


def checkpoint_step(name: str) -> int | None:
    """The step in the name of a checkpoint's file; None for another file."""
    match = CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step."""
    return next(reversed(checkpoints_by_step(folder)), None)


def is_training_checkpoint(source: str | Path) -> bool:
    """Whether it is a file, a URL or a run's folder, rather than a folder in the published layout or a hub id."""
    path = Path(source)
    if not is_url(source) and path.is_dir():
        return not (path / "config.json").is_file()
    return is_url(source) or path.is_file() or path.suffix == ".pt"


def checkpoint_name(checkpoint: str) -> str:
    """A short name for a checkpoint: `logs/depth/checkpoints/epoch_1.pt` is `depth-epoch_1`, `org/model` is `model`."""
    path = Path(checkpoint).absolute()
    name = path.stem if path.is_file() else path.name
    return f"{path.parent.parent.name}-{name}" if path.parent.name == "checkpoints" else name
