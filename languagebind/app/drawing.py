"""Pictures for the page: what an encoder sees of a file, and the matrix of similarities."""

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..modalities import Modality
from ..modalities._pictures import to_bytes

LARGEST = 640  # longer side of a picture on the page, in pixels
CELL, GAP = 88, 3  # sides of a matrix's cells and of the lines between them


def draw(modality: Modality, raw: Any) -> tuple[Image.Image, str]:
    """Return the picture of a raw signal and what its colours mean: of a clip, all of its frames in two rows."""
    if isinstance(raw, Tensor) and raw.ndim == 4 and len(raw) > 1:
        pixels, meaning = frames(raw), f"the {len(raw)} frames that the encoder sees"
    else:
        pixels, meaning = modality.picture(raw)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((LARGEST, LARGEST))
    return picture, meaning


def frames(raw: Tensor) -> Tensor:
    """Return the frames (T, 3, H, W) of a clip as one picture (3, H, W) of two rows, with grey lines between them."""
    columns, gap = -(-len(raw) // 2), max(1, raw.shape[3] // 40)
    sheet = torch.full((3, 2 * raw.shape[2] + gap, columns * (raw.shape[3] + gap) - gap), 128, dtype=torch.uint8)
    for number, frame in enumerate(raw):
        top, left = number // columns * (raw.shape[2] + gap), number % columns * (raw.shape[3] + gap)
        sheet[:, top : top + raw.shape[2], left : left + raw.shape[3]] = to_bytes(frame)
    return sheet


def data_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI, so that no file of it has to be served."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG" if max(picture.size) <= 256 else "JPEG", quality=90)
    kind = "png" if max(picture.size) <= 256 else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()
