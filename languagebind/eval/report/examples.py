"""Draw the examples with a model's best and worst results as small pictures inside the page."""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ...config import UserError, from_dict
from ...hub.encoders import TEXT
from ...modalities import DecodeError, Modality, modality_class
from ..data.samples import Sample
from ..data.shards import Member
from ..results import Result

SIDE = 240  # longer side in pixels
MAX_BYTES = 15_000


class Picture(NamedTuple):
    """A picture and the meaning of its colours; or no picture, but the reason and perhaps the file concerned."""

    uri: str
    text: str
    file: str = ""


def illustrated(result: Result) -> dict[str, list[tuple[dict[str, Any], Picture, Picture | None]]]:
    """Return the `best` and `worst` examples, each with its picture and the wrong picture that ranked first, if any."""
    chosen = {kind: examples for kind, examples in result.get("examples", {}).items() if examples}
    sources = {example["key"]: example["source"] for examples in chosen.values() for example in examples}
    modality = _modality(result)

    def found_instead(example: Mapping[str, Any]) -> Picture | None:
        key, found = example["key"], example["found"]
        beside = [place.removesuffix(key) + found for place in example["source"] if str(place).endswith(key)]
        source = sources.get(found) or [file for file in beside if os.path.isfile(file)]
        wrong = result["task"] == "retrieval" and found != key
        return draw(modality, found, source) if wrong and source else None

    return {
        kind: [(each, draw(modality, each["key"], each["source"]), found_instead(each)) for each in examples]
        for kind, examples in chosen.items()
    }


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


def draw(modality: Modality | str, key: str, places: Sequence[Any]) -> Picture:
    """Return the picture of a sample. `places` names its files, as in a result."""
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
    return Picture(data_uri(pixels), meaning)


def data_uri(pixels: Tensor) -> str:
    """Return a data URI with pixels (3, H, W), uint8, as a JPEG of at most `MAX_BYTES`."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((SIDE, SIDE))
    for quality in (85, 70, 50, 30, 15):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        if file.tell() <= MAX_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
