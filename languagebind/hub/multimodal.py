"""Encode several modalities and text with one module, with the inputs and outputs of the original LanguageBind code."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import UserError
from ..model import same_text
from .config import CONFIGS, LanguageBindConfig, read_pretrained
from .processing import PROCESSORS
from .published import MODELS, LanguageBindModel, build_published
from .state import OriginalState

log = logging.getLogger(__name__)

LANGUAGE = "language"
DEFAULTS = {
    "video": "LanguageBind_Video_FT",
    "audio": "LanguageBind_Audio_FT",
    "thermal": "LanguageBind_Thermal",
    "image": "LanguageBind_Image",
    "depth": "LanguageBind_Depth",
}


class LanguageBind(OriginalState):
    """Encoders of several modalities and one text tower.

    Args:
        clip_type: mapping from modalities to repositories (`LanguageBind_Audio_FT`, `org/name`) or folders, or a list
            of modalities for the published checkpoints. The last checkpoint provides the text tower, as in the
            original; `languagebind.load` keeps the towers of all.
        use_temp: multiply the features of each modality, but not of text, by the encoder's logit scale.
        cache_dir: folder for downloads.
        local_files_only: read repositories from the cache, without asking the hub.

    Raises `UserError` if a modality is unknown or features differ in size, and `WeightsError` if weights do not fit.
    """

    def __init__(
        self,
        clip_type: Mapping[str, str | Path] | Iterable[str] = tuple(DEFAULTS),
        use_temp: bool = True,
        cache_dir: str | Path | None = "./cache_dir",
        local_files_only: bool = False,
    ):
        super().__init__()
        self.use_temp = use_temp
        self.modality_encoder, self.modality_proj = nn.ModuleDict(), nn.ModuleDict()
        self.modality_scale: dict[str, nn.Parameter] = {}
        self.modality_config: dict[str, LanguageBindConfig] = {}
        models: dict[str, LanguageBindModel] = {}
        for name, source in _sources(clip_type).items():
            hub: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only}
            config, state, _ = read_pretrained(source, CONFIGS[name], **hub)
            models[name] = model = build_published(config, state, source)  # memory-mapped
            self.modality_encoder[name], self.modality_proj[name] = model.vision_model, model.visual_projection
            self.modality_scale[name] = model.logit_scale
            self.modality_config[name] = config
        _check_text(models)
        self.modality_encoder[LANGUAGE], self.modality_proj[LANGUAGE] = model.text_model, model.text_projection
        self.eval()

    def forward(self, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return features (B, D) by modality; without `use_temp` all have unit norm.

        Inputs are `{modality: {"pixel_values": ...}, "language": {"input_ids": ..., "attention_mask": ...}}`.
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
    """Return the mapping with each value moved to a device."""
    return {key: value.to(device) for key, value in x.items()}


def _sources(clip_type: Mapping[str, str | Path] | Iterable[str]) -> dict[str, str]:
    given = dict(clip_type) if isinstance(clip_type, Mapping) else dict.fromkeys(clip_type)
    if unknown := [name for name in given if name not in CONFIGS]:
        raise UserError(f"unknown modality {unknown[0]!r}, expected one of {', '.join(CONFIGS)}")
    return {name: str(source or DEFAULTS[name]) for name, source in given.items()}


def _check_text(models: Mapping[str, LanguageBindModel]) -> None:
    """Raise `UserError` if features differ in size, and warn once if text towers differ from the last one."""
    *others, last = models
    sizes = {name: model.config.projection_dim for name, model in models.items()}
    if odd := [name for name in others if sizes[name] != sizes[last]]:
        towers = f"the text towers of {odd[0]} and {last} differ in size ({sizes[odd[0]]} and {sizes[last]})"
        raise UserError(f"{towers}, so their features lie in different spaces: load them separately")
    if odd := [name for name in others if not same_text(models[name], models[last])]:
        advice = "use languagebind.load(...).encode(text=[...], of=%r)"
        differ = "the text towers differ: language is encoded with that of %s; to compare texts with %s, " + advice
        log.warning(differ, last, " or ".join(odd), models[odd[0]].config.modality_name)


config_dict = CONFIGS
model_dict = MODELS
transform_dict = PROCESSORS
