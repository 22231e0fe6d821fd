"""Draw arrays as pictures for people. Encoders never see these pictures."""

import numpy as np
import torch
from torch import Tensor

# Nine evenly spaced colours of Viridis (Smith and van der Walt), whose lightness increases evenly
VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip


def coloured(x: Tensor) -> Tensor:
    """Return the colours (3, H, W), in bytes, of values (H, W) from 0 (dark blue) to 1 (bright yellow)."""
    places = np.linspace(0, 1, len(VIRIDIS))
    values = x.numpy().astype(np.float64)
    channels = [np.interp(values, places, channel) for channel in zip(*VIRIDIS, strict=True)]
    return torch.from_numpy(np.stack(channels).round().astype(np.uint8))


def to_bytes(x: Tensor) -> Tensor:
    """Convert pixels (C, H, W), C 1 or 3, bytes or floats in 0..1, to (3, H, W) bytes."""
    x = x if x.dtype == torch.uint8 else (x * 255).round().to(torch.uint8)
    return x.expand(3, -1, -1)


def stretched(x: Tensor) -> tuple[Tensor, float, float]:
    """Return the values scaled to 0..1, and their minimum and maximum before scaling."""
    low, high = (bound.item() for bound in x.aminmax())
    return (x - low) / ((high - low) or 1.0), low, high
