"""Depth maps: 16-bit PNG in millimetres, or floats in metres."""

import io
import tokenize
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ._images import ImageModality
from ._pictures import coloured
from ._sources import DecodeError, Source, read

NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class Depth(ImageModality):
    """Depth maps clipped to 0.01 m .. `max_depth`, scaled to 0..1 and repeated in three channels.

    Integers (PNG, TIFF, .npy, arrays) are millimetres and floats are metres. 8-bit values are refused, because they
    are a picture of depth, not depth. A negative or NaN pixel is a hole, like 0 in a PNG, and gets the minimum depth;
    an infinite one, such as rendered sky, is as far as `max_depth` or the farthest finite pixel. Maps without a finite
    pixel are refused, and so are float maps with nine tenths above 100, which must be millimetres.

    Raw form: (H, W), float32, metres. In memory: a PIL image, or an array or tensor, (H, W) with or without a channel.
    """

    # A plain .tiff comes before the pictures, because versions that packed it so put colour pictures beside it
    extensions = ("depth.png", "depth.npy", "depth.tiff", "tiff", "png", "npy")

    max_depth: float = 10.0
    """Maximum depth in metres; farther points are clipped. 0 scales each map by its own maximum."""
    sun_rgbd: bool = False
    """Undo the bit rotation in SUN RGB-D's PNGs."""

    def __post_init__(self):
        super().__post_init__()
        if not self.max_depth >= 0:
            raise UserError(f"--max-depth is {self.max_depth}; set metres, or 0 to scale each map by its maximum")

    def decode(self, source: Source) -> Tensor:
        if read(source, first=len(NPY_MAGIC)) == NPY_MAGIC:
            return self.check(self._load_npy(source), source)
        return super().decode(source)

    def transform(self, raw: Tensor, rng: torch.Generator | None = None) -> Tensor:
        depth = raw.clamp(0.01, self.max_depth or None)
        return self.fit(depth.div_(self.max_depth or depth.max())[None, None], rng)

    def picture(self, raw: Tensor) -> tuple[Tensor, str]:
        """Colour the map over its own range, up to `max_depth`; pixels without a measurement are black."""
        depth = raw.clamp(max=self.max_depth or raw.max())
        measured = depth > 0
        if not bool(measured.any()):
            return torch.zeros(3, *raw.shape, dtype=torch.uint8), "no distance was measured"
        low, high = (bound.item() for bound in depth[measured].aminmax())
        shown = coloured(((depth - low) / ((high - low) or 1.0)).clamp(min=0)) * measured
        holes = "" if bool(measured.all()) else "; black: not measured"
        return shown, f"{low:.2f} m (dark) to {high:.2f} m (bright){holes}"

    def check(self, x: Tensor, source: Any) -> Tensor:
        """Return the depth (H, W) in metres of pixels (1, H, W) of any dtype."""
        if x.shape[0] != 1 or x.is_complex():
            kind = "complex numbers" if x.is_complex() else f"{x.shape[0]} channels"
            raise DecodeError(source, f"depth should have one channel of real numbers, got {kind}")
        if x.dtype in (torch.uint8, torch.int8, torch.bool):
            raise DecodeError(source, "8-bit images show depth but hold no distances; use 16-bit millimetres or floats")
        depth = x[0]
        if depth.is_floating_point():
            depth = depth.float()
            finite = depth[depth.isfinite()]
            if not len(finite):
                raise DecodeError(source, "no pixel is finite")
            depth = depth.nan_to_num(0.0, max(self.max_depth, finite.max().item()), 0.0)
            # Not all, because holes that were resized have near edges; NaN without points
            if (depth[depth > 0] > 100).float().mean() > 0.9:
                raise DecodeError(source, "nine tenths of the points are beyond 100 m; divide millimetres by 1000")
            return depth
        if self.sun_rgbd:
            depth = depth.long() & 0xFFFF
            depth = ((depth >> 3) | (depth << 13)) & 0xFFFF
        return depth.float().div_(1000)

    def _load_npy(self, source: Source) -> Tensor:
        file = io.BytesIO(read(source, 16 * self.max_pixels + 2**20))
        try:
            array = np.load(file, allow_pickle=False)
            if file.read(1):
                raise ValueError("bytes follow the array")
        except (ValueError, EOFError, MemoryError, tokenize.TokenError) as error:
            raise DecodeError(source, f"not a usable .npy file: {error}") from error
        if array.dtype.kind not in "iuf" or array.ndim not in (2, 3):
            raise DecodeError(source, f"expected real numbers (H, W), got {array.shape} of {array.dtype}")
        return self.pixels(array)
