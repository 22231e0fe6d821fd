"""`LanguageBind`: encoders of several modalities with one text tower, with the original's inputs and outputs."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import UserError
from ..model import same_text, text_state
from ..weights import load_strict
from .config import CONFIGS, LanguageBindConfig
from .processing import PROCESSORS
from .published import MODELS, LanguageBindModel, read_pretrained

log = logging.getLogger(__name__)

LANGUAGE = "language"
DEFAULTS = {
    "video": "LanguageBind_Video_FT",
    "audio": "LanguageBind_Audio_FT",
    "thermal": "LanguageBind_Thermal",
    "image": "LanguageBind_Image",
    "depth": "LanguageBind_Depth",
}


class LanguageBind(nn.Module):
    """Encoders of several modalities and the text tower that binds them.

    Args:
        clip_type: modality -> repository (`LanguageBind_Audio_FT`, `org/name`) or folder; or names of modalities, for
            the published checkpoints. The text tower is the last checkpoint's, as in the original.
        use_temp: multiply features by their encoder's logit scale, except the texts'.
        cache_dir: where downloads are kept.

    Raises:
        UserError: a modality is unknown, or text towers differ in size.
        WeightsError: weights do not fit.
    """

    def __init__(
        self,
        clip_type: Mapping[str, str | Path] | Iterable[str] = tuple(DEFAULTS),
        use_temp: bool = True,
        cache_dir: str | Path | None = "./cache_dir",
    ):
        super().__init__()
        self.use_temp = use_temp
        self.modality_scale: dict[str, nn.Parameter] = {}
        self.modality_config: dict[str, LanguageBindConfig] = {}
        encoders: dict[str, nn.Module] = {}
        projections: dict[str, nn.Module] = {}
        last: tuple[str, LanguageBindModel] | None = None
        for name, source in _sources(clip_type).items():
            config, state, _ = read_pretrained(CONFIGS[name], source, cache_dir=cache_dir)
            with torch.device("meta"):
                model = MODELS[name](config)
            # The tensors are memory-mapped: the weights of text towers that are replaced are never read.
            load_strict(model, state, source, assign=True)
            if last is not None:
                _check_text(*last, name, model)
            encoders[name], projections[name] = model.vision_model, model.visual_projection
            self.modality_scale[name] = model.logit_scale
            self.modality_config[name] = config
            last = name, model
        encoders[LANGUAGE], projections[LANGUAGE] = model.text_model, model.text_projection
        self.modality_encoder = nn.ModuleDict(encoders)
        self.modality_proj = nn.ModuleDict(projections)
        self.eval()

    def forward(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """`{modality: {"pixel_values"}, "language": {"input_ids", "attention_mask"}}` -> features (B, D) by name.

        They have unit norm, or with `use_temp`, except for texts, the norm of the logit scale.
        """
        features = {}
        for name, value in inputs.items():
            if name not in self.modality_encoder:
                raise ValueError(f"no encoder for {name!r} is loaded, only {', '.join(self.modality_encoder)}")
            x = F.normalize(self.modality_proj[name](self.modality_encoder[name](**value)[1]), dim=-1)
            scaled = self.use_temp and name != LANGUAGE
            features[name] = x * self.modality_scale[name].exp().to(x.device) if scaled else x
        return features


def to_device(x: Mapping[str, Any], device: str | torch.device) -> dict[str, Any]:
    """Move each value to a device."""
    return {key: value.to(device) for key, value in x.items()}


def _sources(clip_type: Mapping[str, str | Path] | Iterable[str]) -> dict[str, str]:
    given = dict(clip_type) if isinstance(clip_type, Mapping) else dict.fromkeys(clip_type)
    if unknown := [name for name in given if name not in CONFIGS]:
        raise UserError(f"unknown modality {unknown[0]!r}, expected one of {', '.join(CONFIGS)}")
    sources = {name: str(source or DEFAULTS[name]) for name, source in given.items()}
    # The original took only short names.
    short = {name for name, source in sources.items() if "/" not in source and not Path(source).exists()}
    return {name: f"LanguageBind/{source}" if name in short else source for name, source in sources.items()}


def _check_text(first: str, model: LanguageBindModel, second: str, other: LanguageBindModel) -> None:
    """Check that all features lie in one space; the original failed at the first product, if at all."""
    old, new = text_state(model), text_state(other)
    if {key: value.shape for key, value in old.items()} != {key: value.shape for key, value in new.items()}:
        raise UserError(
            f"the text towers of {first} and {second} differ in size, so their features lie in different spaces:"
            " load them apart"
        )
    if not same_text(model, other):
        log.warning(
            "the text towers of %s and %s differ in their weights; the one of %s is used", first, second, second
        )


config_dict = CONFIGS
model_dict = MODELS
transform_dict = PROCESSORS
