"""Infrared pictures. The class names of the original LanguageBind code say Thermal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import UserError
from ._images import ImageModality
from ._pictures import to_bytes
from ._sources import DecodeError


@dataclass(frozen=True)
class Infrared(ImageModality):
    """Infrared pictures of one or three channels: 8-bit as in the original code, or raw counts or temperatures.

    Raw form: (C, H, W) with C 1 or 3: uint8, or float32 counts or temperatures. In memory: a PIL image, or an array
    or tensor, (H, W), (H, W, C) or (C, H, W), of bytes, wider integers or floats.
    """

    # A plain .tiff comes before the pictures, because versions that packed it so put colour pictures beside it
    extensions = ("infrared.jpg", "infrared.png", "infrared.tiff", "tiff", "jpg", "png")

    infrared_range: Literal["minmax", "full"] | tuple[float, float] = "minmax"
    """Input range of values above 8 bits: each picture's minimum to maximum, full 16 bits (floats: 0 to 1), or two
    temperatures or counts, such as 0 80. Values outside two numbers are clipped, and 8-bit pictures are refused."""

    def __post_init__(self):
        super().__post_init__()
        bounds: Any = self.infrared_range
        if not isinstance(bounds, str):  # a list: from a JSON file
            object.__setattr__(self, "infrared_range", bounds := tuple(map(float, bounds)))
        numbers = isinstance(bounds, tuple) and len(bounds) == 2 and -math.inf < bounds[0] < bounds[1] < math.inf
        if not numbers and bounds not in ("minmax", "full"):
            raise UserError(f"--infrared-range is {bounds}; choose from minmax, full, or set two numbers, lower first")

    def transform(self, raw: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return self.fit(self._unit_range(raw)[None], rng)

    def picture(self, raw: Tensor) -> tuple[Tensor, str]:
        if raw.dtype == torch.uint8:
            return to_bytes(raw), ""
        low, high = self._bounds(raw)
        return to_bytes(self._unit_range(raw)), f"{low:g} (black) to {high:g} (white)"

    def check(self, x: Tensor, source: Any) -> Tensor:
        if x.dtype == torch.uint8:
            if isinstance(self.infrared_range, tuple):
                raise DecodeError(source, "8-bit pictures hold no temperatures or counts; use --infrared-range minmax")
            return x
        values = x.to(torch.float32 if x.is_floating_point() else torch.float64)
        if not bool(values.isfinite().all()):
            raise DecodeError(source, "the picture contains NaN or infinity")
        if self.infrared_range == "full":
            values = values if x.is_floating_point() else values / 65535
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise DecodeError(source, "values are not 16 bits or floats in 0..1; use --infrared-range minmax")
        return values.float()

    def _unit_range(self, raw: Tensor) -> Tensor:
        # A 14-bit sensor uses a small part of 16 bits: divided by 65535, every picture would be nearly black
        if raw.dtype == torch.uint8 or self.infrared_range == "full":
            return raw
        low, high = self._bounds(raw)
        return ((raw - low) / (high - low).clamp(min=torch.finfo(raw.dtype).tiny)).clamp(0, 1)

    def _bounds(self, raw: Tensor) -> Sequence[Tensor]:
        if self.infrared_range == "minmax":
            return raw.aminmax()
        return raw.new_tensor((0.0, 1.0) if self.infrared_range == "full" else self.infrared_range).unbind()
