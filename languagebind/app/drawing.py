"""Pictures for the page: what an encoder sees of a file, and the matrix of similarities."""

import textwrap
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.utils import make_grid

from ..modalities import Modality

LARGEST, LONGEST = 640, 6000  # sides of a picture on the page and of the matrix, in pixels


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


def draw_matrix(edges: Sequence[Image.Image | str], kinds: Sequence[str], cosines: np.ndarray) -> Image.Image:
    """Draw cosines (N, N) with their figures, and along two edges the pictures or texts that were compared.

    Colours fill the range of each pair of `kinds`, because cosines of different modalities differ in level. The
    diagonal and what is not known are grey.
    """
    size, shown = len(edges), np.where(np.eye(len(edges), dtype=bool), np.nan, cosines)
    for pair in product({*kinds}, repeat=2):
        block = np.ix_(*(np.array(kinds) == kind for kind in pair))
        if not np.isnan(shown[block]).all():
            low, high = np.nanmin(shown[block]), np.nanmax(shown[block])
            shown[block] = (shown[block] - low) / (high - low) if high > low else shown[block] * 0 + 0.5
    canvas: Any = FigureCanvasAgg(Figure(figsize=(size + 1, size + 1), dpi=min(100, LONGEST // (size + 1))))
    axes = canvas.figure.add_axes((0, 0, 1, 1))
    colours, style = colormaps["viridis"].with_extremes(bad="0.88"), {"ha": "center", "va": "center", "fontsize": 9}
    places = np.arange(size + 1) - 0.5
    axes.pcolormesh(places, places, shown, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=3)
    for (row, column), cosine in np.ndenumerate(cosines) if size <= 60 else ():  # else they would be too small
        text, ink = "–" if np.isnan(cosine) else f"{cosine:.2f}", "white" if shown[row, column] < 0.5 else "black"
        axes.text(column, row, text, color=ink, **style)
    for place, edge in enumerate(edges):
        for x, y in ((-1, place), (place, -1)):
            if isinstance(edge, str):
                axes.text(x, y, textwrap.fill(edge, 12, max_lines=5, placeholder=" …"), parse_math=False, **style)
            else:
                tile = ImageOps.pad(edge.convert("RGB"), (96, 96), color="white")
                axes.imshow(tile, extent=(x - 0.48, x + 0.48, y + 0.48, y - 0.48))
    axes.axis((-1.5, size - 0.5, size - 0.5, -1.5))
    axes.axis("off")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
