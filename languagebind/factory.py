"""OpenCLIP's verbs: make a model with its transforms, its tokenizer, and list what there is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UserError, from_dict
from .hub import is_training_checkpoint, load_model, read_checkpoint
from .modalities import Modality, modality_name
from .model import DualEncoder
from .text import TextConfig, clip_tokens, text_tokens

ORGANISATION = "LanguageBind"
PUBLISHED = (
    "LanguageBind_Audio",
    "LanguageBind_Audio_FT",
    "LanguageBind_Depth",
    "LanguageBind_Image",
    "LanguageBind_Thermal",
    "LanguageBind_Video",
    "LanguageBind_Video_FT",
    "LanguageBind_Video_Huge_V1.5_FT",
    "LanguageBind_Video_V1.5_FT",
    "LanguageBind_Video_merge",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Transform = Callable[[Any], Tensor]


class EncoderModel(nn.Module):
    """An encoder and its text tower with OpenCLIP's methods: `encode_text`, and `encode_depth` or whichever it is."""

    def __init__(self, model: DualEncoder, modality: Modality):
        super().__init__()
        self.model = model
        self.modality = modality

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, L) -> (B, D)."""
        features = self.model.project_text({"input_ids": text})
        return F.normalize(features, dim=-1) if normalize else features

    def encode(self, inputs: Tensor, normalize: bool = False) -> Tensor:
        """(B, C, T, H, W) -> (B, D)."""
        features = self.model.project(inputs)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, inputs: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-norm features of both, and exp(logit_scale)."""
        return self.encode(inputs, True), self.encode_text(text, True), self.logit_scale.exp()

    def __getattr__(self, name: str) -> Any:
        modality = self.__dict__.get("modality")
        if modality is not None and name == f"encode_{modality_name(modality)}":
            return self.encode
        return super().__getattr__(name)


def create_model_and_transforms(
    model_name: str | Path, precision: str = "fp32", device: str | torch.device = "cpu"
) -> tuple[EncoderModel, Transform, Transform]:
    """A model, and what makes its inputs (C, T, H, W) of files: augmenting, for training, and plain.

    Args:
        model_name: one of `list_models()`, `hf-hub:ORG/NAME`, `local-dir:FOLDER`, a folder, or a training checkpoint.
        precision: fp32, bf16 or fp16, of the weights.

    Raises:
        UserError: it is not there or cannot be used.
    """
    if precision not in DTYPES:
        raise UserError(f"precision {precision!r}: expected one of {', '.join(DTYPES)}")
    model, modality = load_model(source_of(model_name), device)

    def augment(item: Any) -> Tensor:
        return modality.preprocess(item, torch.Generator().manual_seed(int(torch.randint(2**31, ()))))

    return EncoderModel(model.to(DTYPES[precision]), modality).eval(), augment, modality.preprocess


def create_model_from_pretrained(
    model_name: str | Path, precision: str = "fp32", device: str | torch.device = "cpu"
) -> tuple[EncoderModel, Transform]:
    """As `create_model_and_transforms`, without the augmenting transform."""
    model, _, preprocess = create_model_and_transforms(model_name, precision, device)
    return model, preprocess


def get_tokenizer(model_name: str | Path) -> Callable[[list[str]], Tensor]:
    """`list[str] -> (B, context length)` token ids of a model's text tower.

    Raises:
        UserError: the model is not there.
    """
    source = source_of(model_name)
    if is_training_checkpoint(source):
        return text_tokens(from_dict(TextConfig, read_checkpoint(source)["config"]["model"]["text"]))
    from .published.native import read_config

    return clip_tokens(read_config(source).text_config.max_position_embeddings)


def list_models() -> list[str]:
    """The published models, by name."""
    return list(PUBLISHED)


def list_pretrained() -> list[tuple[str, str]]:
    """(name, hub id) of the published models."""
    return [(name, f"{ORGANISATION}/{name}") for name in PUBLISHED]


def source_of(model_name: str | Path) -> str:
    """What `load_model` takes: names of `list_models()` and OpenCLIP's schemas resolved."""
    name = str(model_name)
    for schema in ("hf-hub:", "local-dir:"):
        if name.startswith(schema):
            return name.removeprefix(schema)
    return f"{ORGANISATION}/{name}" if name in PUBLISHED and not Path(name).exists() else name
