"""RGB pictures, preprocessed for the published image encoder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._images import ImageModality
from ._pictures import to_bytes


@dataclass(frozen=True)
class Image(ImageModality):
    """RGB pictures: short side resized bicubically, centre crop, CLIP's normalisation; no augmentation by default.

    Greyscale, palette, CMYK and 16-bit pictures become RGB, alpha is dropped, and EXIF orientation is applied. The
    original LanguageBind code did none of this; the result is the same for upright RGB files.

    Raw form: (3, H, W), uint8, or float32 in 0..1. In memory: a PIL image, or an array or tensor, (H, W), (H, W, C)
    or (C, H, W), of bytes, 16-bit values or floats in 0..1.
    """

    extensions = ("jpg", "jpeg", "png", "webp", "bmp", "gif")

    def transform(self, raw: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return self.fit(raw[None], rng)

    def picture(self, raw: Tensor) -> tuple[Tensor, str]:
        return to_bytes(raw), ""
