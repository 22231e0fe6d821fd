"""Small pictures of samples, inside the page."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...config import UserError, from_dict
from ...hub.encoders import TEXT
from ...modalities import DecodeError, Modality, modality_class
from ..data.samples import Sample
from ..data.shards import Member
from .markup import Markup, short_path, tag

SIDE = 240  # pixels, of the longer side
MAX_BYTES = 15_000
MAX_MEMBER = 2**31  # bytes; no sample is as large
MEMBER = {"shard": str, "name": str, "offset": int, "size": int}


class Thumbnails:
    """Draws the examples of a result with the modality, and its options, that they were evaluated with."""

    def __init__(self, result: dict[str, Any]):
        self.modality: Modality | None = None
        self.reason = ""
        name, inputs = _shown(result)
        if name is None:
            self.reason = "The examples are texts: they have no picture."
            return
        try:
            self.modality = from_dict(modality_class(name), inputs)
        except (ValueError, TypeError) as error:  # of a version, or with a modality, that is not this one's
            self.reason = f"The samples of {name} cannot be read here: {error}"

    def draw(self, key: str, places: Sequence[Any]) -> Markup:
        """The picture of a sample with what its colours mean, or why there is none.

        Args:
            key: of the sample.
            places: its files, as a result names them.
        """
        if self.modality is None:
            return _placeholder(self.reason)
        source = tuple(map(_place, places))
        if not source or None in source:
            return _placeholder("The result does not say where the sample is.")
        missing = next((file for file in map(_file, source) if not os.path.isfile(file)), None)
        if missing is not None:
            return _placeholder("The file is not there: ", short_path(str(missing)))
        sample = Sample(key, source if len(source) > 1 else source[0])
        try:
            raw = self.modality.decode(sample.load(self.modality.input_shape[1]))
            pixels, meaning = self.modality.picture(raw)
        except DecodeError as error:
            return _placeholder(f"The file cannot be read: {error.reason}")
        except (UserError, ImportError) as error:  # no decoder is installed
            return _placeholder(f"The file cannot be decoded here: {error}")
        note = tag("span", meaning, class_="meaning") if meaning else None
        described = f"Sample {key}" + (f": {meaning}" if meaning else "")
        return tag("div", tag("img", src=data_uri(pixels), alt=described), note, class_="thumbnail")


def _shown(result: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The modality that a result's examples are files of, and its options; None where they are texts.

    Between modalities that is the first of the gallery that is no text; of a fusion that is classified, of the query.
    """
    protocol = result["protocol"]
    side = protocol.get("gallery") or protocol.get("query")
    if not isinstance(side, dict):
        return result["model"], protocol.get("inputs", {})
    name = next((name for name in side if name != TEXT), None)
    return name, protocol.get("inputs", {}).get(name, {})


def data_uri(pixels: Tensor) -> str:
    """(3, H, W) bytes as a JPEG of at most `MAX_BYTES`."""
    from PIL import Image

    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((SIDE, SIDE))
    for quality in (85, 70, 50, 30, 15):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        if file.tell() <= MAX_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _place(item: Any) -> Path | Member | None:
    """A path, or a place in a shard, as a result file names it; None where it is neither."""
    if isinstance(item, str):
        return Path(item)
    if not isinstance(item, dict) or not all(isinstance(item.get(key), kind) for key, kind in MEMBER.items()):
        return None
    if min(item["offset"], item["size"]) < 0 or item["size"] > MAX_MEMBER:
        return None
    return Member(Path(item["shard"]), item["name"], item["offset"], item["size"])


def _file(place: Path | Member) -> Path:
    return place.shard if isinstance(place, Member) else place


def _placeholder(*reason: str) -> Markup:
    return tag("div", tag("p", *reason), class_="thumbnail placeholder")
