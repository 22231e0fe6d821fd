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
from .models import FrameStep, HubModel, encoded
from .steps import Entry, Failed

METRIC = ("glpn", "zoedepth", "depth_pro")  # and depth_anything, if its config says so
RELATIVE = ("dpt", "depth_anything", "prompt_depth_anything")
LIMIT = 65_535  # millimetres that 16 bits hold
ORIGINAL_SIDE, ORIGINAL_LIMIT = 256, 10_000  # pixels and millimetres, as in VIDAL-10M


@dataclass(frozen=True)
class DepthOptions:
    """Depth maps of the frames: 16-bit PNG in millimetres, 0 where the depth is unknown."""

    model: str
    """a transformers model that gives metres: a folder or hub id"""
    revision: str | None = None
    """commit, tag or branch on the hub; with a commit, no upload can change the model before the step has ended"""
    size: Literal["original", "picture"] = "original"
    """original: short side 256, at most 10 m, as in VIDAL-10M; picture: the size of the frames, at most 65.535 m"""
    half: bool = True
    """compute in float16 on a GPU"""
    device: str | None = None
    """device to use; None: a GPU if there is one. Under torchrun, each rank uses its own"""


class Depth(FrameStep):
    """Depth maps as PNG files."""

    name = "depth"

    def __init__(self, root: Path, options: DepthOptions):
        super().__init__(root)
        self.options, self.model = options, HubModel(options.model, options.revision)
        kind, config = self.model.config.get("model_type"), self.model.config
        if kind not in METRIC and (kind != "depth_anything" or config.get("depth_estimation_type") != "metric"):
            why = "gives relative depth, which has no unit" if kind in RELATIVE else "is not known to give metres"
            known = f"use a metric depth_anything, {', '.join(METRIC)}"
            raise UserError(f"{options.model} ({kind}) {why}: {known}")

    def record(self) -> dict[str, Any]:
        return self.model.record() | {"size": self.options.size, "half": self.options.half}

    def make(self, entry: Entry, frames: Tensor) -> tuple[list[bytes], tuple[str, ...]] | Failed:
        original = self.options.size == "original"
        size, short = tuple(frames.shape[-2:]), min(frames.shape[-2:])
        depth = self.estimate(frames, tuple(ORIGINAL_SIDE * side // short for side in size) if original else size)
        known = depth.isfinite() & (depth > 0)
        if not known.any():
            return Failed("no depth", f"{entry.id}: the model's output has no finite number above 0")
        maps = torch.where(known, depth, 0).mul(1000).round().clamp(max=ORIGINAL_LIMIT if original else LIMIT)
        return [encoded(each[None], "PNG") for each in maps.to(torch.uint16)], ()

    @torch.no_grad()
    def estimate(self, frames: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return the depth (T, height, width), in metres, of frames (T, 3, H, W) in bytes.

        The processor turns outputs into metres: DepthPro's are inverse depth, and ZoeDepth's have borders to cut.
        """
        model, processor = self._loaded
        inputs = processor(images=list(frames.to(model.device)), return_tensors="pt")
        outputs = model(**inputs.to(model.device, model.dtype))
        for key, value in outputs.items():
            outputs[key] = value.float()
        finish, sizes = processor.post_process_depth_estimation, {"target_sizes": [size] * len(frames)}
        if "source_sizes" in inspect.signature(finish).parameters:
            sizes["source_sizes"] = [tuple(frames.shape[-2:])] * len(frames)
        return torch.stack([each["predicted_depth"] for each in finish(outputs, **sizes)]).cpu()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        device = own_device(self.options.device)
        dtype = torch.float16 if self.options.half and device.type == "cuda" else torch.float32
        model = self.model.load(AutoModelForDepthEstimation, device, dtype)
        return model, AutoImageProcessor.from_pretrained(self.model.found, **self.model.hub)
