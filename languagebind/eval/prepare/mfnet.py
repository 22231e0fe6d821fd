"""Prepare MFNet's street scenes by day and night, a colour and a thermal picture each, with masks of 9 classes.

A name in `<split>.txt` stands for `images/<name>.png`, whose fourth channel is thermal, and `labels/<name>.png`.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic.dataclasses import dataclass

from ...data.tables import Format, read_list
from ..data.validation import CONFIG
from .writing import Row, inside, reading, write_png


@dataclass(frozen=True, config=CONFIG)
class Options:
    """The split below --source, and the pictures to write."""

    split: str = "test"
    take: Literal["thermal", "colour"] = "thermal"


def prepare(source: Path, output: Path, options: Options) -> Generator[Row, None, None]:
    """Write the pictures and masks below `output`, and yield {"path", "mask"} rows."""
    listed = source / f"{options.split}.txt"
    for name in read_list(listed, Format()):
        row = {"path": f"{options.take}/{name}.png", "mask": f"masks/{name}.png"}
        file, label = (source / folder / f"{inside(name, listed)}.png" for folder in ("images", "labels"))
        with reading(file), Image.open(file) as image:
            picture = image.getchannel("A") if options.take == "thermal" else image.convert("RGB")
        write_png(picture, output / row["path"])
        with reading(label), Image.open(label) as image:
            write_png(image, output / row["mask"])
        yield row
