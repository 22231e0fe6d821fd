"""Load trained models, with their preprocessing, and encode files with them."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import UserError, first_line, from_dict
from .lora import merge_lora
from .modalities import Modality, modality_class
from .model import DualEncoder, ModelConfig
from .text import build_text
from .weights import WeightsError, load_strict, published_names


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[DualEncoder, Modality]:
    """The model and the modality of a training checkpoint, ready for evaluation; adapters are merged.

    Raises:
        UserError: no such file, not a checkpoint of this library, or its text tower is not the one it was trained with.
    """
    checkpoint = read_checkpoint(path)
    config = from_dict(ModelConfig, checkpoint["config"]["model"])
    modality = modality_from_config(checkpoint["config"])
    encoder = replace(config.encoder, grad_checkpointing=False, patch_dropout=0.0)
    model = DualEncoder(modality.input_shape, encoder, build_text(config.text))
    if model.text_fingerprint() != checkpoint["text_fingerprint"]:
        raise WeightsError(
            f"{path} was trained with another text tower than {config.text.text_tower} is now"
            f" (fingerprints {checkpoint['text_fingerprint'][:12]} and {model.text_fingerprint()[:12]})"
        )
    state = merge_lora(published_names(checkpoint["model"]), config.tuning.lora_alpha)
    text = {key: value for key, value in model.state_dict().items() if key not in model.encoder_state()}
    load_strict(model, state | text, f"the model of {path}")
    return model.eval().to(device), modality


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a training checkpoint holds. Never runs pickled code.

    Raises:
        UserError: no such file, or not a checkpoint of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise UserError(f"{path} is damaged or no checkpoint: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or not {"model", "config", "text_fingerprint"} <= checkpoint.keys():
        raise UserError(
            f"{path} is no training checkpoint of this library (no model, config and text fingerprint in it)"
        )
    return checkpoint


def modality_from_config(config: dict[str, Any]) -> Modality:
    """The modality, with its options, that a resolved config names."""
    cls = modality_class(config["modality"])
    names = {field.name for field in fields(cls)}
    if unknown := config["inputs"].keys() - names:
        raise UserError(f"unknown {config['modality']} options: {', '.join(sorted(unknown))}")
    return cls(**config["inputs"])


class Encoders:
    """Encoders of one or more modalities that share a text tower; `load` makes them."""

    def __init__(self, encoders: dict[str, tuple[DualEncoder, Modality]]):
        self.encoders = encoders

    def encode(self, batch_size: int = 64, **inputs: list[Any]) -> Tensor:
        """Unit-norm features (N, D) of one list: `encode(depth=[...])` or `encode(text=[...])`.

        Items are paths, bytes or in-memory forms.

        Raises:
            DecodeError: an item cannot be used.
            ValueError: no or several lists, or a modality that is not loaded.
        """
        if len(inputs) != 1:
            raise ValueError(f"encode takes one list at a time, got {sorted(inputs)}")
        ((name, items),) = inputs.items()
        if name != "text" and name not in self.encoders:
            raise ValueError(f"no encoder for {name!r} is loaded, only {sorted(self.encoders)} and text")
        model, modality = self.encoders.get(name) or next(iter(self.encoders.values()))
        device = model.logit_scale.device
        features = []
        with torch.inference_mode():
            for start in range(0, len(items), batch_size):
                batch = list(items[start : start + batch_size])
                if name == "text":
                    tokens = {key: value.to(device) for key, value in model.tokenize(batch).items()}
                    features.append(model.encode_text(tokens))
                else:
                    inputs_ = torch.stack([modality.preprocess(item) for item in batch])
                    features.append(model.encode(inputs_.to(device)))
        return torch.cat(features) if features else torch.empty(0, model.visual_projection.out_features, device=device)


def load(*checkpoints: str | Path, device: str | torch.device = "cpu") -> Encoders:
    """Load training checkpoints, one a modality, that were fitted to the same text tower.

    Raises:
        UserError: a checkpoint cannot be used, two are of one modality, or their text towers differ.
    """
    encoders, fingerprints = {}, {}
    for path in checkpoints:
        name = read_checkpoint(path)["config"]["modality"]
        if name in encoders:
            raise UserError(f"two checkpoints for {name}: {path} and another")
        encoders[name] = load_checkpoint(path, device)
        fingerprints[name] = encoders[name][0].text_fingerprint()
    if len(set(fingerprints.values())) > 1:
        raise UserError("these checkpoints were fitted to different text towers: " + ", ".join(sorted(encoders)))
    if not encoders:
        raise UserError("give load() at least one checkpoint")
    return Encoders(encoders)
