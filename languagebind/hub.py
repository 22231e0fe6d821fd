"""Load trained models, with their preprocessing, and encode files with them."""

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import UserError, first_line, from_dict
from .lora import merge_lora
from .modalities import Modality, modality_class, modality_name
from .model import DualEncoder, ModelConfig
from .text import build_text
from .weights import WeightsError, load_strict, published_names, unreadable

CHECKPOINT_NAME = re.compile(r"step_(\d+)\.pt")


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", like: DualEncoder | None = None
) -> tuple[DualEncoder, Modality]:
    """The model and the modality of a training checkpoint, ready for evaluation; adapters are merged.

    Args:
        path: a file that training wrote, or the folder of a run, for the last one in it.
        device: where to put the model.
        like: a model whose text tower this one is to share.

    Raises:
        UserError: no such file, not a checkpoint of this library, or its text tower is not the one it was trained with.
    """
    checkpoint = read_checkpoint(path)
    try:
        config = from_dict(ModelConfig, checkpoint["config"]["model"])
        modality = from_dict(modality_class(checkpoint["config"]["modality"]), checkpoint["config"]["inputs"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or of another version of this library: {first_line(error)}") from error
    encoder = replace(config.encoder, grad_checkpointing=False, patch_dropout=0.0)
    text = (like.text_model, like.text_projection, like.embed_dim) if like is not None else build_text(config.text)
    model = DualEncoder(modality.input_shape, encoder, text)
    if model.text_fingerprint() != checkpoint["text_fingerprint"]:
        tower = "those before it were" if like is not None else f"{config.text.text_tower} is now"
        versions = ", ".join(f"{name} {version}" for name, version in checkpoint.get("versions", {}).items())
        raise WeightsError(f"{path} was trained with another text tower than {tower} (it was made with {versions})")
    state = merge_lora(published_names(checkpoint["model"]), config.tuning.lora_alpha)
    frozen = {key: value for key, value in model.state_dict().items() if key not in model.encoder_state()}
    load_strict(model, state | frozen, f"the model of {path}")
    return model.eval().to(device), modality


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a training checkpoint holds. Never runs pickled code.

    Raises:
        UserError: no such file, or not a checkpoint of this library.
    """
    path = Path(path)
    if path.is_dir():
        path = latest_checkpoint(path / "checkpoints") or path
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises many kinds for damaged files
        raise UserError(f"{path} {unreadable(error)}") from error
    if not isinstance(checkpoint, dict) or not {"model", "config", "text_fingerprint"} <= checkpoint.keys():
        raise UserError(
            f"{path} is no training checkpoint of this library (no model, config and text fingerprint in it)"
        )
    return checkpoint


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step; a half-written one has another name and is not seen."""
    found = [path for path in folder.glob("step_*.pt") if CHECKPOINT_NAME.fullmatch(path.name)]
    return max(found, key=lambda path: int(CHECKPOINT_NAME.fullmatch(path.name)[1]), default=None)


class Encoders:
    """Encoders of one or more modalities that share a text tower; `load` makes them."""

    def __init__(self, encoders: dict[str, tuple[DualEncoder, Modality]]):
        self.encoders = encoders

    def encode(self, batch_size: int = 64, **inputs: list[Any]) -> Tensor:
        """Unit-norm features (N, D) of one list: `encode(depth=[...])` or `encode(text=[...])`.

        Items are paths, bytes or in-memory forms.

        Raises:
            DecodeError: an item cannot be used.
            ValueError: no list or several, or a modality that is not loaded.
            TypeError: one item in place of a list, or a text that is none.
        """
        if len(inputs) != 1:
            raise ValueError(f"encode takes one list at a time, got {sorted(inputs)}")
        ((name, items),) = inputs.items()
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1, got {batch_size}")
        if isinstance(items, (str, bytes, os.PathLike)) or not isinstance(items, Iterable):
            raise TypeError(f"encode takes a list: {name}=[...], not one {type(items).__name__}")
        items = list(items)
        if name == "text" and not all(isinstance(item, str) for item in items):
            raise TypeError("texts should be strings")
        if name != "text" and name not in self.encoders:
            raise ValueError(f"no encoder for {name!r} is loaded, only {sorted(self.encoders)} and text")
        model, modality = self.encoders.get(name) or next(iter(self.encoders.values()))
        device = model.logit_scale.device
        features = []
        with torch.inference_mode():
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                if name == "text":
                    tokens = {key: value.to(device) for key, value in model.tokenize(batch).items()}
                    features.append(model.encode_text(tokens))
                else:
                    inputs_ = torch.stack([modality.preprocess(item) for item in batch])
                    features.append(model.encode(inputs_.to(device)))
        return torch.cat(features) if features else torch.empty(0, model.visual_projection.out_features, device=device)


def load(*checkpoints: str | Path, device: str | torch.device = "cpu") -> Encoders:
    """Load training checkpoints or the folders of runs, one a modality, that were fitted to the same text tower.

    Raises:
        UserError: a checkpoint cannot be used, two are of one modality, or their text towers differ.
    """
    encoders: dict[str, tuple[DualEncoder, Modality]] = {}
    for path in checkpoints:
        first = next(iter(encoders.values()))[0] if encoders else None
        model, modality = load_checkpoint(path, device, like=first)
        name = modality_name(modality)
        if name in encoders:
            raise UserError(f"{path} is a second checkpoint for {name}")
        encoders[name] = model, modality
    if not encoders:
        raise UserError("give load() at least one checkpoint")
    return Encoders(encoders)
