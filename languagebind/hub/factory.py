"""Create models, transforms and tokenizers, and list the published models, with OpenCLIP's function names."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import UserError
from ..modalities import Modality, modality_name
from ..model import DualEncoder
from ..text import clip_tokens
from ..weights import dtype_of
from .checkpoint import checkpoint_tokens, is_training_checkpoint
from .encoders import load_model
from .files import ORGANISATION, PUBLISHED

Transform = Callable[[Any], Tensor]


class OpenClipInterface(nn.Module):
    """A model with OpenCLIP's methods: `encode_text`, and a method named after its modality such as `encode_depth`."""

    def __init__(self, model: DualEncoder, modality: Modality):
        super().__init__()
        self.model = model
        self.modality = modality
        setattr(self, f"encode_{modality_name(modality)}", self.encode)

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Return the features (B, D) of token ids (B, L)."""
        features = self.model.project_text({"input_ids": text})
        return F.normalize(features, dim=-1) if normalize else features

    def encode(self, inputs: Tensor, normalize: bool = False) -> Tensor:
        """Return the features (B, D) of inputs (B, C, T, H, W)."""
        features = self.model.project(inputs)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, inputs: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the unit-norm features of inputs and texts, and exp(logit_scale)."""
        return self.encode(inputs, True), self.encode_text(text, True), self.logit_scale.exp()


def create_model_and_transforms(
    model_name: str | Path, pretrained: str | None = None, precision: str = "fp32",
    device: str | torch.device = "cpu", **hub: Any,
) -> tuple[OpenClipInterface, Transform, Transform]:  # fmt: skip
    """Return a model, its training transform and its evaluation transform, which map files to inputs (C, T, H, W).

    Args:
        model_name: one of `list_models()`, `hf-hub:ORG/NAME`, `local-dir:FOLDER`, a folder, or a training checkpoint.
        pretrained: the model's entry in `list_pretrained()`; optional, since every model includes its weights.
        precision: dtype of the weights: fp32, bf16 or fp16.
        hub: options of the Hugging Face hub, as in `languagebind.load`; and `modality`, of a run of several.
    """
    dtype = dtype_of(precision)
    if pretrained not in (None, dict(list_pretrained()).get(str(model_name))):
        raise UserError(f"omit pretrained={pretrained!r}: {model_name} includes its weights")
    model, modality = load_model(source_of(model_name), device, **hub)
    model = model.requires_grad_(False).to(dtype)
    return OpenClipInterface(model, modality).eval(), partial(_augment, modality), modality.preprocess


def create_model(model_name: str | Path, *args: Any, **kwargs: Any) -> OpenClipInterface:
    """Return only the model of `create_model_and_transforms`."""
    return create_model_and_transforms(model_name, *args, **kwargs)[0]


def create_model_from_pretrained(
    model_name: str | Path, *args: Any, **kwargs: Any
) -> tuple[OpenClipInterface, Transform]:
    """Return the model and the evaluation transform of `create_model_and_transforms`."""
    model, _, preprocess = create_model_and_transforms(model_name, *args, **kwargs)
    return model, preprocess


def get_tokenizer(model_name: str | Path, **hub: Any) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer of a model: from a list of B texts to token ids (B, context length)."""
    source = source_of(model_name)
    if is_training_checkpoint(source, hub.get("subfolder")):
        return checkpoint_tokens(source)
    from .config import read_config  # needs transformers, unlike our own checkpoints

    config = read_config(source, **hub)[0].text
    return clip_tokens(config.context_length or config.max_position_embeddings)


def list_models() -> list[str]:
    """Return the names of the published models."""
    return list(PUBLISHED)


def list_pretrained() -> list[tuple[str, str]]:
    """Return the names and hub ids of the published models."""
    return [(name, f"{ORGANISATION}/{name}") for name in PUBLISHED]


def source_of(model_name: str | Path) -> str:
    """Return a model's name without OpenCLIP's schema, as `load_model` takes it."""
    return str(model_name).removeprefix("hf-hub:").removeprefix("local-dir:")


def _augment(modality: Modality, item: Any) -> Tensor:
    return modality.preprocess(item, torch.Generator().manual_seed(int(torch.randint(2**31, ()))))
