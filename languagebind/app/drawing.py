"""Pictures for the page: what an encoder sees of a file, and the matrix of similarities."""

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..modalities import Modality
from ..modalities._pictures import coloured, to_bytes

LARGEST = 640  # longer side of a picture on the page, in pixels
CELL, GAP = 96, 4  # sides of a matrix's cells, and of the lines between them
FONT, LETTERS = ImageFont.load_default(14), 12  # in a line


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


def data_uri(picture: Image.Image, lossless: bool = False) -> str:
    """Return a picture as a data URI, so that no file of it has to be served."""
    file, kind = io.BytesIO(), "png" if lossless or max(picture.size) <= 256 else "jpeg"
    picture.save(file, kind, quality=90)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def draw_matrix(edges: Sequence[Image.Image | str], kinds: Sequence[str], cosines: np.ndarray) -> Image.Image:
    """Draw cosines (N, N) with their figures, and along both edges the pictures or texts that were compared.

    Colours fill the range of each pair of `kinds`, because cosines of different modalities differ in level. What is
    not known is grey.
    """
    step = CELL + GAP
    sheet = Image.new("RGB", ((len(edges) + 1) * step,) * 2, "white")
    colours, brush = _colours(kinds, cosines), ImageDraw.Draw(sheet)
    for row, edge in enumerate(edges, 1):
        for place in ((0, row * step), (row * step, 0)):
            sheet.paste(_tile(edge), place)
        for column in range(1, len(edges) + 1):
            value, fill = cosines[row - 1, column - 1], tuple(colours[row - 1, column - 1].tolist())
            left, top = column * step, row * step
            brush.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill)
            text, ink = "–" if np.isnan(value) else f"{value:.2f}", "black" if sum(fill) > 330 else "white"
            brush.text((left + CELL / 2, top + CELL / 2), text, ink, FONT, anchor="mm")
    return sheet


def _colours(kinds: Sequence[str], cosines: np.ndarray) -> np.ndarray:
    """Return colours (N, N, 3), from dark to bright within each pair of kinds; grey on the diagonal and for NaN."""
    shown = np.where(np.eye(len(kinds), dtype=bool), np.nan, cosines)
    for a, b in {(a, b) for a in kinds for b in kinds}:
        block = np.ix_([kind == a for kind in kinds], [kind == b for kind in kinds])
        if not np.isnan(shown[block]).all():
            low, high = np.nanmin(shown[block]), np.nanmax(shown[block])
            shown[block] = (shown[block] - low) / (high - low) if high > low else shown[block] * 0 + 0.5
    colours = coloured(torch.from_numpy(shown).nan_to_num()).permute(1, 2, 0).numpy()
    return np.where(np.isnan(shown)[..., None], 224, colours)


def _tile(edge: Image.Image | str) -> Image.Image:
    tile = Image.new("RGB", (CELL, CELL), "white")
    if isinstance(edge, str):
        lines = textwrap.wrap(edge, LETTERS, max_lines=5, placeholder=" …")
        ImageDraw.Draw(tile).multiline_text((CELL / 2, CELL / 2), "\n".join(lines), "black", FONT, "mm", align="center")
        return tile
    factor = CELL / max(edge.size)
    small = edge.convert("RGB").resize([max(1, round(side * factor)) for side in edge.size])
    tile.paste(small, ((CELL - small.width) // 2, (CELL - small.height) // 2))
    return tile
