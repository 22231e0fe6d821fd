"""Estimate the depth of frames, in metres, with a depth model of transformers."""

import inspect
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import UserError
from ..distributed import own_device
from .models import ONE_CALL, FrameStep, HubModel
from .steps import Entry, Unmade

METRIC = ("glpn", "zoedepth", "depth_pro")  # and depth_anything, if its config says so
SIDE = 256  # pixels, of VIDAL-10M's depth maps
LIMITS = {"original": 10_000, "picture": 65_535}  # millimetres: VIDAL-10M's limit, and what 16 bits hold


@dataclass(frozen=True)
class DepthOptions:
    """Depth maps of the frames: 16-bit PNG in millimetres, 0 where the depth is unknown."""

    model: str
    """a transformers model that gives metres: a folder or hub id"""
    revision: str | None = None
    """commit, tag or branch on the hub; only a commit cannot change while the step runs"""
    size: Literal["original", "picture"] = "original"
    """original: short side 256, at most 10 m, as in VIDAL-10M; picture: the size of the frames, at most 65.535 m"""
    half: bool = True
    """compute in float16 on a GPU"""
    device: str | None = None
    """None: a GPU if there is one"""


class Depth(FrameStep):
    """Depth maps as PNG files."""

    name = "depth"

    def __init__(self, root: Path, options: DepthOptions):
        super().__init__(root, options)
        self.model = HubModel(options.model, options.revision)
        kind, config = self.model.config.get("model_type"), self.model.config
        if kind not in METRIC and (kind != "depth_anything" or config.get("depth_estimation_type") != "metric"):
            advice = f"relative depth has no unit; use a metric depth_anything, {', '.join(METRIC)}"
            raise UserError(f"{options.model} ({kind}) is not known to give metres: {advice}")

    def record(self) -> dict[str, Any]:
        return self.model.record() | {"size": self.options.size, "half": self.options.half}

    def pictures(self, entry: Entry, frames: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        sides = list(frames.shape[-2:])
        size = [SIDE * side // min(sides) for side in sides] if self.options.size == "original" else sides
        with ONE_CALL:
            depth = self.estimate(frames, size)
        known = depth.isfinite() & (depth > 0)
        if not known.flatten(1).any(1).all():
            raise Unmade("no depth", f"{entry.id}: the model's output for a frame has no finite number above 0")
        millimetres = torch.where(known, depth, 0).mul(1000).round().clamp(max=LIMITS[self.options.size])
        return millimetres[:, None].to(torch.uint16), ()

    @torch.no_grad()
    def estimate(self, frames: Tensor, size: list[int]) -> Tensor:
        """Return the depth (T, height, width), in metres, of frames (T, 3, H, W) in bytes."""
        model, processor = self._loaded
        outputs = model(**processor(list(frames.to(model.device)), return_tensors="pt").to(model.device, model.dtype))
        outputs = type(outputs)(**{key: value.float() for key, value in outputs.items()})
        # DepthPro's outputs are inverse depth, and ZoeDepth's have borders to cut
        finish, sizes = processor.post_process_depth_estimation, {"target_sizes": [size] * len(frames)}
        if "source_sizes" in inspect.signature(finish).parameters:
            sizes["source_sizes"] = [list(frames.shape[-2:])] * len(frames)
        return torch.stack([each["predicted_depth"] for each in finish(outputs, **sizes)]).cpu()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        device = own_device(self.options.device)
        dtype = torch.float16 if self.options.half and device.type == "cuda" else torch.float32
        return self.model.load(AutoModelForDepthEstimation, AutoImageProcessor, device, dtype)
