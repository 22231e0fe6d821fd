"""Base class of all modalities made of pictures: options, file reading, and resizing to the encoder's input.

Pictures are resized as in the original LanguageBind code: as floats, without antialiasing, the short side to
`image_size`, the long side rounded down, then a square crop. The published weights expect exactly this. torchvision's
antialiasing, the default since 0.17, gives other features.
"""

import io
import re
import struct
import sys
import zlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import UserError
from . import Modality, check_options, to_tensor
from ._sources import DecodeError, Source, describe, read

# CLIP's pixel statistics, the default of every modality but audio (openai/CLIP, clip.py)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PREPROCESSING = ("image_mean", "image_std", "interpolation", "resize_mode", "antialias")  # options that a tower sets

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
# PIL's errors for damaged files, which depend on the format and the place of the damage
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)
ORIENTATION = 0x0112  # EXIF tag
# PIL's names of the layouts of 16-bit colour, and those of the other byte order
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
BYTE_ORDERS = {f"{mode};16{a}": f"{mode};16{b}" for mode in ("RGB", "RGBA") for a, b in _SWAPPED.items()}
JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # 00 and d0 to d7 belong to the pixels


@dataclass(frozen=True)
class ImageModality(Modality):
    """A modality whose samples are one or more pictures; the input is (3, T, image_size, image_size)."""

    image_size: int = 224
    """Height and width of the encoder's input, in pixels."""
    max_pixels: int = 50_000_000
    """Maximum number of pixels in a picture or frame, checked before decoding."""
    image_mean: tuple[float, float, float] = MEAN
    """Mean of each channel. --encoder-tower sets this and the next four options to what its weights expect."""
    image_std: tuple[float, float, float] = STD
    """Standard deviation of each channel."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation in resizing."""
    resize_mode: Literal["shortest", "squash", "whole"] = "shortest"
    """Scale the short side to image_size and crop a square (shortest), scale both (squash), or crop nothing (whole)."""
    antialias: bool = False
    """Smooth before shrinking, as PIL does."""
    exif: bool = True
    """Turn and mirror pictures as their EXIF orientation says."""
    hflip: float = 0.0
    """Probability of a left-right flip; training only."""
    random_crop: bool = False
    """Crop at a random place instead of the centre; training only."""
    fast_resize: bool = False
    """Resize 8-bit pictures as bytes instead of floats; in training only, where it is the default. Faster, but values
    are rounded, and clipped at hard edges where cubic weights overshoot."""

    def __post_init__(self):
        check_options(self, "image_size", "max_pixels")
        if not 0 <= self.hflip <= 1:
            raise UserError(f"--hflip is {self.hflip}; set a probability from 0 to 1")

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (3, 1, self.image_size, self.image_size)

    def decode(self, source: Source) -> Tensor:
        return self.check(self.pixels(self.open_picture(source)), source)

    def from_memory(self, value: Any) -> Tensor:
        return self.check(self.pixels(value), value)

    def check(self, x: Tensor, source: Any) -> Tensor:
        """Return the raw signal of pixels (C, H, W), C 1 or 3, of any dtype; by default (3, H, W), bytes or 0..1."""
        if x.dtype == torch.uint16:
            x = x.float() / 65535
        elif x.is_floating_point():
            x = x.float()
        low, high = x.aminmax() if x.is_floating_point() else (-1, -1)  # both are NaN if a value is
        if x.dtype != torch.uint8 and not (low >= 0 and high <= 1):
            raise DecodeError(source, f"expected 8- or 16-bit integers or finite floats in 0..1, got {x.dtype}")
        return x.expand(3, -1, -1)

    def open_picture(self, source: Source, upright: bool = True) -> Any:
        """Return a picture file as a PIL image; if `upright`, apply the EXIF orientation unless the option is off.

        PIL reads 16-bit colours as 8 bits. `pixels` finds the lower bytes in the attribute `low`, an image as well.
        Raises `DecodeError` if the file is not a picture, is truncated, or has more than `max_pixels` pixels.
        """
        from PIL import Image, ImageOps

        # 16 bytes per pixel are twice the uncompressed size of any format; 1 MB is for metadata
        data = read(source, 16 * self.max_pixels + 2**20)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            self.check_size(source, *image.size)
            if image.format == "PNG":
                image.verify()  # check the checksums, which load() ignores; then the file must be reopened
                image = Image.open(io.BytesIO(data), formats=FORMATS)
            images = [image, *_lower_bytes(image, data)]
            for each in images:
                each.load()
                if upright and self.exif:
                    ImageOps.exif_transpose(each, in_place=True)
        except DecodeError:
            raise
        except (*BROKEN, Image.DecompressionBombError) as error:
            reason = "not a picture that PIL reads" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise DecodeError(source, reason or type(error).__name__) from error
        if is_cut(data):
            raise DecodeError(source, "the picture is truncated")
        image.filename = describe(source)  # for errors
        image.low = images[1] if len(images) > 1 else None  # type: ignore[attr-defined]  # our own attribute
        return image

    def check_size(self, source: Any, width: int, height: int) -> None:
        """Raise `DecodeError` if a picture is empty, or has too many pixels before or after resizing."""
        short, long = sorted((width, height))
        resized = self.image_size**2 * long // max(short, 1)  # a strip of 1x1000000 grows
        if short < 1 or max(width * height, resized) > self.max_pixels:
            reason = f"{width}x{height} pixels ({resized} resized), expected 1 to --max-pixels {self.max_pixels}"
            raise DecodeError(source, reason)

    def pixels(self, value: Any) -> Tensor:
        """Return the pixels (C, H, W), C 1 or 3, of a PIL image, array or tensor, with the dtype unchanged.

        Arrays may be (H, W), (H, W, C) or (C, H, W); an alpha channel is dropped.
        """
        x = as_tensor(value, upright=self.exif)
        first, last = (x.ndim == 3 and x.shape[side] in (1, 3, 4) for side in (0, 2))
        if x.ndim == 2:
            x = x[None]
        elif last and not (first and isinstance(value, Tensor)):  # if both are possible, tensors are (C, H, W)
            x = x.permute(2, 0, 1)
        elif not first:
            raise DecodeError(value, "expected (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels")
        self.check_size(value, x.shape[2], x.shape[1])
        return x[:3]

    def fit(self, frames: Tensor, rng: torch.Generator | None) -> Tensor:
        """Resize, crop and normalise frames (T, C, H, W), C 1 or 3, bytes or floats in 0..1."""
        size = self.image_size
        height, width = frames.shape[-2:]
        resized = (size * height // min(height, width), size * width // min(height, width))
        if self.resize_mode == "squash":
            resized = (size, size)
        rows, columns = resized if self.resize_mode == "whole" else (size, size)
        top, left = self._crop_corner((resized[0] - rows, resized[1] - columns), rng)
        flipped = rng is not None and bool(torch.rand((), generator=rng) < self.hflip)
        mean, std = (torch.tensor(x, device=frames.device).view(3, 1, 1) for x in (self.image_mean, self.image_std))
        stay_bytes = self.fast_resize and rng is not None
        floats = torch.empty_like(frames[:1], dtype=torch.float32)
        fitted = floats.new_empty(3, len(frames), rows, columns)
        # Frame by frame, so that a clip of large frames is never held as floats
        for frame, out in zip(frames.split(1), fitted.unbind(1), strict=True):
            if frame.dtype == torch.uint8 and not stay_bytes:
                frame = floats.copy_(frame).div_(255)  # in place, because new memory costs more than the division
            x = F.interpolate(frame, resized, mode=self.interpolation, antialias=self.antialias)
            x = x[0, :, top : top + rows, left : left + columns]
            x = x.float().div_(255) if x.dtype == torch.uint8 else x
            x = x.clamp_(0, 1) if self.antialias else x  # PIL's bytes do not overshoot at edges
            torch.sub(x.flip(-1) if flipped else x, mean, out=out).div_(std)  # a single channel becomes three
        return fitted

    def _crop_corner(self, room: tuple[int, int], rng: torch.Generator | None) -> tuple[int, int]:
        if rng is None or not self.random_crop:
            return round(room[0] / 2), round(room[1] / 2)  # to even at .5, as torchvision's CenterCrop
        top, left = (int(torch.randint(r + 1, (), generator=rng)) for r in room)
        return top, left


def as_tensor(value: Any, upright: bool = False) -> Tensor:
    """Return a PIL image (H, W[, 3]), `upright` as its EXIF says or as it is, or an array, as a tensor of its dtype."""
    from PIL import Image, ImageOps

    if isinstance(value, Image.Image):
        with suppress(*BROKEN):  # damaged EXIF data
            if upright and value.getexif().get(ORIENTATION, 1) != 1:
                value = ImageOps.exif_transpose(value)
        low = getattr(value, "low", None)
        value = np.asarray(plain_mode(value))
        if low is not None:
            value = (value.astype(np.uint16) << 8) | np.asarray(plain_mode(low))
    elif hasattr(value, "asnumpy"):  # an array of decord
        value = value.asnumpy()
    if isinstance(value, (np.ndarray, Tensor)):
        return to_tensor(value)
    raise DecodeError(value, "expected a path, bytes, a PIL image, an array or a tensor")


def plain_mode(image: Any) -> Any:
    """Convert a PIL image to one channel of any depth (L, I;16, I, F) or to RGB, without palette or alpha."""
    if image.mode in ("L", "F") or image.mode.startswith("I"):
        return image
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if "transparency" in image.info:  # PIL warns about palettes otherwise
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _lower_bytes(image: Any, data: bytes) -> list[Any]:
    """Return a picture of 16-bit colours, not loaded yet, once more with swapped bytes; an empty list for others."""
    from PIL import Image

    def swapped(name: Any) -> Any:  # or a tuple that begins with it
        return (swapped(name[0]), *name[1:]) if isinstance(name, tuple) else BYTE_ORDERS.get(name, name)

    for *_, form in image.tile:  # of a 16-bit PPM or PGM, a pair with its maximum
        wide = image.format == "PPM" and isinstance(form, tuple) and form[-1] > 255 and form != ("I", 65535)
        if wide or form == "LA;16B":
            raise ValueError("PIL changes the 16-bit values of such a file; convert it to PNG without alpha")
    tiles = [(*tile[:3], swapped(tile[3])) for tile in image.tile]
    if tiles == [tuple(tile) for tile in image.tile]:
        return []
    low = Image.open(io.BytesIO(data), formats=FORMATS)
    low.tile = tiles  # type: ignore[assignment]  # a named tuple since Pillow 11.1
    return [low]


def is_cut(data: bytes) -> bool:
    """Tell whether a picture's end is missing or zeros, as after a broken download. PIL would fill it with grey."""
    if data.startswith(b"\xff\xd8"):
        # JPEG: no end marker after the last scan. The video behind a motion photo may look like a scan.
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda") and _jpeg_is_cut(data)
    end = 8 + int.from_bytes(data[4:8], "little")
    return data.startswith(b"RIFF") and data.endswith(bytes(64), 0, end)  # WebP


def _jpeg_is_cut(data: bytes) -> bool:
    """Tell whether a JPEG has no end marker; what follows that marker does not matter."""
    at = 2
    while marker := JPEG_MARKER.search(data, at):
        at = marker.end()
        if marker[0].endswith(b"\xd9"):
            return False
        at += int.from_bytes(data[at : at + 2], "big")
    return True
