"""Pictures for the page: what an encoder sees of a file, and the matrix of similarities."""

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.utils import make_grid

from ..modalities import Modality
from ..modalities._pictures import coloured

LARGEST = 640  # longer side of a picture on the page, in pixels
CELL, GAP, FONT = 96, 4, ImageFont.load_default(14)  # of the matrix; sides in pixels


def draw(modality: Modality, raw: Any, side: int = LARGEST) -> tuple[Image.Image, str]:
    """Return the picture of a raw signal and what its colours mean: of a clip, all of its frames in two rows."""
    if isinstance(raw, Tensor) and raw.ndim == 4 and len(raw) > 1:  # (T, 3, H, W), bytes
        pixels = make_grid(raw, nrow=-(-len(raw) // 2), padding=max(1, raw.shape[3] // 40), pad_value=128)
        meaning = f"the {len(raw)} frames that the encoder sees"
    else:
        pixels, meaning = modality.picture(raw)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((side, side))
    return picture, meaning


def data_uri(picture: Image.Image, lossless: bool = False) -> str:
    """Return a picture as a data URI, so that no file of it has to be served."""
    file, kind = io.BytesIO(), "png" if lossless or max(picture.size) <= 256 else "jpeg"
    picture.save(file, kind, quality=90)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def draw_matrix(edges: Sequence[Image.Image | str], kinds: Sequence[str], cosines: np.ndarray) -> Image.Image:
    """Draw cosines (N, N) with their figures, and along two edges the pictures or texts that were compared.

    Colours fill the range of each pair of `kinds`, because cosines of different modalities differ in level. The
    diagonal and what is not known are grey.
    """
    step, shown = CELL + GAP, np.where(np.eye(len(kinds), dtype=bool), np.nan, cosines)
    for a, b in {(a, b) for a in kinds for b in kinds}:
        block = np.ix_([kind == a for kind in kinds], [kind == b for kind in kinds])
        if not np.isnan(shown[block]).all():
            low, high = np.nanmin(shown[block]), np.nanmax(shown[block])
            shown[block] = (shown[block] - low) / (high - low) if high > low else shown[block] * 0 + 0.5
    colours = coloured(torch.from_numpy(shown).nan_to_num()).permute(1, 2, 0).numpy()
    colours = np.where(np.isnan(shown)[..., None], 224, colours)
    sheet = Image.new("RGB", ((len(edges) + 1) * step,) * 2, "white")
    brush = ImageDraw.Draw(sheet)
    for number, edge in enumerate(edges, 1):
        sheet.paste(_tile(edge), (0, number * step))
        sheet.paste(_tile(edge), (number * step, 0))
    for row, column in np.ndindex(cosines.shape):
        (top, left), fill = ((row + 1) * step, (column + 1) * step), tuple(colours[row, column].tolist())
        text = "–" if np.isnan(cosines[row, column]) else f"{cosines[row, column]:.2f}"
        brush.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill)
        ink = "black" if sum(fill) > 330 else "white"
        brush.text((left + CELL / 2, top + CELL / 2), text, ink, FONT, anchor="mm")
    return sheet


def _tile(edge: Image.Image | str) -> Image.Image:
    if not isinstance(edge, str):
        return ImageOps.pad(edge.convert("RGB"), (CELL, CELL), color="white")
    tile, lines = Image.new("RGB", (CELL, CELL), "white"), textwrap.wrap(edge, 12, max_lines=5, placeholder=" …")
    ImageDraw.Draw(tile).multiline_text((CELL / 2, CELL / 2), "\n".join(lines), "black", FONT, "mm", align="center")
    return tile
