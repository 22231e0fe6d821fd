"""Draw the examples with a model's best and worst results as small pictures inside the page."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import ListedColormap, hsv_to_rgb, to_hex
from PIL import Image

from ...config import UserError, from_dict
from ...hub.encoders import TEXT
from ...modalities import DecodeError, Modality, modality_class
from ..data.samples import Sample
from ..data.shards import Member
from ..results import Result

SIDE = 240  # longer side in pixels
LONGEST = 20_000  # letters of a picture in the page, for 15,000 bytes
OPACITY = 0.65  # of classes over a picture
# Classes in sequence differ in hue; those of similar hues, in saturation and brightness
TONES = ((1.0, 0.95), (0.4, 1.0), (1.0, 0.6), (0.55, 0.75), (0.8, 0.45))
PALETTE = ListedColormap(hsv_to_rgb([(k * 0.618 % 1, *TONES[k % 5]) for k in range(250)]))


class Picture(NamedTuple):
    """A picture and the meaning of its colours; or no picture, but the reason and perhaps the file concerned."""

    uri: str
    text: str
    file: str = ""


def illustrated(result: Result) -> dict[str, list[tuple[Any, dict[str, Picture], list[tuple[str, str]]]]]:
    """Return the `best` and `worst` examples, each with its pictures by title, and the colours and names of classes."""
    chosen = {kind: examples for kind, examples in result.get("examples", {}).items() if examples}
    sources = {example["key"]: example["source"] for examples in chosen.values() for example in examples}
    modality = _modality(result)

    def card(example: Mapping[str, Any]) -> tuple[Any, dict[str, Picture], list[tuple[str, str]]]:
        key, source = example["key"], example["source"]
        own = draw(modality, key, source)
        if result["task"] == "segmentation" and own.uri:
            maps = np.array(Image.open(io.BytesIO(base64.b64decode(example["maps"])))).astype(int)
            layers = zip(("predicted", "true"), np.vsplit(maps, 2), strict=True)
            over = {title: draw(modality, key, source, classes) for title, classes in layers}
            shown = [k for k in np.argsort(-np.bincount(maps.flat)) if k and k in maps]  # the largest areas first
            legend = [(to_hex(PALETTE(k % PALETTE.N)), result["classes"][k - 1]["name"]) for k in shown]
            return example, {"picture": own, **over}, legend
        found = example.get("found", key)
        beside = [place.removesuffix(key) + found for place in source if str(place).endswith(key)]
        there = sources.get(found) or [file for file in beside if os.path.isfile(file)]
        wrong = result["task"] == "retrieval" and found != key and there
        return example, {"right item": own} | ({"ranked first": draw(modality, found, there)} if wrong else {}), []

    return {kind: [card(each) for each in examples] for kind, examples in chosen.items()}


def over(picture: Image.Image, classes: np.ndarray) -> Image.Image:
    """Return a grey copy of a picture with the colours of classes (h, w) over it, except where they are 0."""
    layer = Image.fromarray(PALETTE(classes % PALETTE.N, alpha=OPACITY * (classes > 0), bytes=True))
    grey = picture.convert("L").point(lambda x: 80 + x // 2).convert("RGBA")  # no black or white
    return Image.alpha_composite(grey, layer.resize(picture.size, Image.Resampling.NEAREST)).convert("RGB")


def _modality(result: Result) -> Modality | str:
    """Return the modality of a result's examples with its options, or the reason why they cannot be drawn."""
    protocol = result["protocol"]
    name, inputs = result["model"], protocol.get("inputs", {})
    side = protocol.get("gallery") or protocol.get("query")
    if isinstance(side, dict):  # For a comparison between modalities, take the first that is not text
        name = next((name for name in side if name != TEXT), None)
        inputs = inputs.get(name, {})
    try:
        return from_dict(modality_class(name), inputs) if name else "The examples are texts: they have no picture."
    except (ValueError, TypeError) as error:  # The result is from a version with other modalities or options
        return f"This version cannot read samples of {name}: {error}"


def draw(modality: Modality | str, key: str, places: Sequence[Any], classes: np.ndarray | None = None) -> Picture:
    """Return the picture of a sample whose files `places` names, as in a result, with classes (h, w) over it if any."""
    if isinstance(modality, str):
        return Picture("", modality)
    source = tuple(Path(p) if isinstance(p, str) else Member(**p | {"shard": Path(p["shard"])}) for p in places)
    files = [place.shard if isinstance(place, Member) else place for place in source]
    if not files:
        return Picture("", "The result does not say where the sample is.")
    if absent := [str(file) for file in files if not file.is_file()]:
        return Picture("", "The file does not exist:", file=absent[0])
    sample = Sample(key, source if len(source) > 1 else source[0])
    try:
        pixels, meaning = modality.picture(modality.decode(sample.load(modality.input_shape[1])))
    except DecodeError as error:
        return Picture("", f"The file cannot be read: {error.reason}")
    except (UserError, ImportError) as error:  # No decoder is installed
        return Picture("", f"The file cannot be decoded here: {error}")
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if classes is not None:
        picture, meaning = over(picture, classes), ""
    picture.thumbnail((SIDE, SIDE))
    for quality in (85, 70, 50, 30, 15):
        uri = data_uri(picture, "jpeg", quality)
        if len(uri) <= LONGEST:
            break
    return Picture(uri, meaning)


def data_uri(picture: Image.Image, kind: str = "", quality: int = 90) -> str:
    """Return a picture as a data URI, so that no file of it has to be served: by default, a small one as a PNG."""
    file, kind = io.BytesIO(), kind or ("png" if max(picture.size) <= 256 else "jpeg")
    picture.save(file, kind, quality=quality)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()
