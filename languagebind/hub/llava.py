"""Frozen encoders with the interface of Video-LLaVA's towers, for language models that take patch tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UserError
from .config import CONFIGS, NAMES, LanguageBindVisionConfig, read_config, subclasses
from .hf_modules import HFVisionTransformer
from .processing import PROCESSORS
from .published import MODELS


class LlavaTower(nn.Module):
    """A frozen encoder that returns the tokens of one layer.

    Args:
        name: a hub id, a folder in the published layout, a training checkpoint, or a run's folder. Also `image_tower`,
            `video_tower`, ... after the tower's modality.
        args: options `mm_vision_select_layer`, the index of the hidden state (-2: before the last block), and
            `mm_vision_select_feature`, `patch` or `cls_patch` (keep the class token; clips always keep it).
        delay_load: read only the config; `load_model()` reads the weights later.
        cache_dir: folder for downloads.
        local_files_only: read a repository from the cache, without asking the hub.

    Attributes:
        image_processor, video_processor: the processor of the tower's modality, under both names.
        image_tower, video_tower, ..., and encoder: the loaded encoder.
        image_tower_name, video_tower_name, ..., and name: the name as given.
        hidden_size, num_patches, config, dtype, device, dummy_feature: as in Video-LLaVA.
    """

    modality = ""

    def __init__(
        self, name: str | Path | None = None, args: Any = None, delay_load: bool = False,
        cache_dir: str | None = "./cache_dir", local_files_only: bool = False, **tower: str | Path,
    ):  # fmt: skip
        super().__init__()
        name = tower.pop(f"{self.modality}_tower", name)
        if name is None or tower:
            raise TypeError(f"expected the argument {self.modality}_tower, got {', '.join(tower) or 'nothing'}")
        self.name, self.cache_dir = str(name), cache_dir
        self.hub: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only}
        setattr(self, f"{self.modality}_tower_name", self.name)
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature not in ("patch", "cls_patch"):
            raise UserError(f"mm_vision_select_feature should be patch or cls_patch, not {self.select_feature!r}")
        self.is_loaded = False
        self.cfg_only, _ = read_config(name, CONFIGS[self.modality], **self.hub)
        self.image_processor = self.video_processor = PROCESSORS[self.modality](self.cfg_only)
        depth = self.cfg_only.vision.num_hidden_layers
        if not -depth - 1 <= self.select_layer <= depth:
            raise UserError(f"no mm_vision_select_layer {self.select_layer}: {name} has hidden states 0 to {depth}")
        if not delay_load:
            self.load_model()

    def load_model(self) -> None:
        """Read the weights if they are not loaded yet."""
        if not self.is_loaded:
            model = MODELS[self.modality].from_pretrained(self.name, **self.hub)
            setattr(self, f"{self.modality}_tower", model.vision_model.requires_grad_(False).eval())
            self.is_loaded = True

    @property
    def encoder(self) -> HFVisionTransformer:
        if not self.is_loaded:
            raise UserError(f"{self.name} is not loaded yet: call load_model()")
        return getattr(self, f"{self.modality}_tower")

    def feature_select(self, outputs: Any) -> Tensor:
        """Return the tokens (B, N, D) of the selected layer; for clips (B, T, 1 + N, D), with the class tokens."""
        x, num_frames = outputs.hidden_states[self.select_layer], self.encoder.input_shape[1]
        if num_frames > 1:
            return x.unflatten(0, (-1, num_frames))
        return x[:, 1:] if self.select_feature == "patch" else x

    @torch.no_grad()
    def forward(self, inputs: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Return the tokens of a batch, or a list of tokens for a list of unbatched inputs."""
        if isinstance(inputs, list):
            return [self(x.unsqueeze(0)) for x in inputs]
        outputs = self.encoder(inputs.to(self.device, self.dtype), output_hidden_states=True)
        return self.feature_select(outputs).to(inputs.dtype)

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.embeddings.class_embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.embeddings.class_embedding.device

    @property
    def config(self) -> LanguageBindVisionConfig:
        return self.encoder.config if self.is_loaded else self.cfg_only.vision

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches(self) -> int:
        """Return the number of patches per frame."""
        *_, height, width = self.config.input_shape
        return (height // self.config.sizes.patch[0]) * (width // self.config.sizes.patch[1])


TOWERS = subclasses(LlavaTower, "Tower", modality={name: name for name in NAMES})
