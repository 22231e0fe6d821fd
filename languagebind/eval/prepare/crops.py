"""Cut crops for classification out of pictures with annotated boxes (LLVIP, FLIR ADAS v1 and v2).

The authors of LanguageBind published finished crops but no script, so the rule is ours. "The crop rule" in
docs/evaluation.md defines it exactly, so that two people who follow it get the same files.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from xml.etree import ElementTree

from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass

from ...config import UserError
from ...files import parse_json, twice
from ..data.validation import CONFIG, Count
from .writing import Row, inside, reading, write_png

SUFFIXES = (".jpg", ".jpeg", ".png")

Label = Annotated[str, Field(pattern="^[^./][^/]*$")]  # it names a folder
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, config=CONFIG)
class Options:
    """The paths of pictures and annotations below --source, and the numbers of the crop rule."""

    format: Literal["voc", "coco"]
    annotations: str  # coco: a file; voc: a folder
    classes: Annotated[dict[str, Label], Field(min_length=1)]  # name or number of an annotated category -> label
    images: str = ""  # voc: the folder of the pictures
    pictures: Count | None = None  # expected number of pictures; VOC has no list that would reveal a missing picture
    min_size: Count = 1
    background: Label | None = None
    background_tries: Count = 100

    def __post_init__(self) -> None:
        if self.background in self.classes.values():
            raise ValueError(f"background {self.background!r} is also a label of the classes; choose another name")


class Box(NamedTuple):
    """An annotated rectangle in whole pixels, not clipped. `label` is None if `classes` lacks its category."""

    id: int
    category: str
    label: str | None
    edges: Rectangle


class Picture(NamedTuple):
    """A picture's file, its boxes, and its annotated (width, height), which are empty or 0 if not annotated."""

    path: Path
    annotation: Path
    size: tuple[Any, Any]
    boxes: list[Box]


def prepare(source: Path, output: Path, options: Options) -> Generator[Row, None, dict[str, int]]:
    """Write the crops below `output`, yield {"path", "label"} rows, and count the boxes left out or clipped."""
    pictures = list((_read_voc if options.format == "voc" else _read_coco)(source, options))
    if options.pictures not in (None, len(pictures)):
        place = source / (options.images or options.annotations)
        raise UserError(f"{place}: {len(pictures)} pictures, expected {options.pictures}: unpack the download again")
    counts: Counter[str] = Counter()
    for picture in pictures:
        image = _open(picture) if picture.path.is_file() else None
        for box in picture.boxes:
            for label, rectangle in _rectangles(picture, box, image, options, counts):
                row = {"path": f"{label}/{picture.path.stem}_{box.id}.png", "label": label}
                if image is None:
                    row["where"] = f"{picture.annotation}: the picture {picture.path} is missing"
                else:
                    write_png(image.crop(rectangle), output / row["path"])
                yield row
    return dict(counts)


def _read_voc(source: Path, options: Options) -> Iterator[Picture]:
    """Yield the pictures of a folder in the order of their names, each with its boxes from `annotations`/<stem>.xml."""
    images = source / options.images
    with reading(images):
        paths = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    for path in paths:
        file = source / options.annotations / f"{path.stem}.xml"
        boxes = []
        with reading(file):
            root = ElementTree.parse(file).getroot()
            for number, item in enumerate(root.iterfind("object")):
                category = item.findtext("name", "").strip()
                edges = [float(item.findtext(f"bndbox/{edge}", "")) for edge in ("xmin", "ymin", "xmax", "ymax")]
                boxes.append(Box(number, category, options.classes.get(category), _whole(*edges)))
        yield Picture(path, file, (root.findtext("size/width"), root.findtext("size/height")), boxes)


def _read_coco(source: Path, options: Options) -> Iterator[Picture]:
    """Yield the pictures with boxes in the order of a COCO file. `file_name` is relative to the folder of the file."""
    file, classes = source / options.annotations, options.classes
    with reading(file):
        content = parse_json(file.read_bytes())
        names = {str(item["id"]): str(item["name"]) for item in content["categories"]}
        pictures = {}
        for item in content["images"]:
            path, size = file.parent / inside(item["file_name"], file), (item.get("width"), item.get("height"))
            pictures[item["id"]] = Picture(path, file, size, [])
        for item in content["annotations"]:
            number, (left, top, width, height) = str(item["category_id"]), map(float, item["bbox"])
            label = classes.get(names[number], classes.get(number))
            edges = _whole(left, top, left + width, top + height)
            pictures[item["image_id"]].boxes.append(Box(int(item["id"]), names[number], label, edges))
    if repeated := twice(str(item["id"]) for item in content["images"]):
        raise UserError(f"{file}: the image id {repeated} is listed twice")
    if unknown := sorted(classes.keys() - names.keys() - set(names.values())):
        raise UserError(f"{file} has no category {unknown[0]!r}, only {', '.join(names.values())}")
    yield from (picture for picture in pictures.values() if picture.boxes)


def _whole(left: float, top: float, right: float, bottom: float) -> Rectangle:
    """Return the edges rounded to the nearest whole pixel, halves up."""
    return math.floor(left + 0.5), math.floor(top + 0.5), math.floor(right + 0.5), math.floor(bottom + 0.5)


def _open(picture: Picture) -> Image.Image:
    """Return a picture without its colour profile and orientation, and check its size."""
    with reading(picture.path), Image.open(picture.path) as image:
        image.load()
    with reading(picture.annotation):
        width, height = (float(side or 0) for side in picture.size)
    if width and height and image.size != (width, height):
        sizes = f"{image.width}x{image.height} pixels, but {width:g}x{height:g}"
        raise UserError(f"{picture.path} has {sizes} in {picture.annotation}: use the original pictures")
    image.info = {}
    return image


def _rectangles(
    picture: Picture, box: Box, image: Image.Image | None, options: Options, counts: Counter[str]
) -> Iterator[tuple[str, Rectangle]]:
    """Yield (label, rectangle) of a box's crop and of its background, and count boxes left out or clipped."""
    if image is None:  # The rows are listed as missing
        yield from ((label, box.edges) for label in (box.label, box.label and options.background) if label)
        return
    left, top, right, bottom = box.edges
    crop = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
    smaller = min(crop[2] - crop[0], crop[3] - crop[1])
    if box.label is None:
        counts[f"category {box.category}"] += 1
    elif right <= left or bottom <= top:
        counts["no area"] += 1
    elif smaller < 1:
        counts["outside"] += 1
    elif smaller < options.min_size:
        counts["small"] += 1
    else:
        counts.update(["clipped"] if crop != box.edges else [])
        yield box.label, crop
        if options.background:
            place = _background(picture, box, crop, image.size, options.background_tries)
            if place:
                yield options.background, place
            else:
                counts["no place for a background"] += 1


def _background(picture: Picture, box: Box, crop: Rectangle, size: tuple[int, int], tries: int) -> Rectangle | None:
    """Return a rectangle of the crop's size that shares no pixel with any box, or None after `tries` attempts."""
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    taken = [edges for *_, edges in picture.boxes if edges[0] < edges[2] and edges[1] < edges[3]]
    for attempt in range(tries):
        digest = hashlib.sha256(f"{picture.path.stem}/{box.id}/{attempt}".encode()).digest()
        left = int.from_bytes(digest[:8], "big") % (size[0] - width + 1)
        top = int.from_bytes(digest[8:16], "big") % (size[1] - height + 1)
        right, bottom = left + width, top + height
        if all(right <= x0 or x1 <= left or bottom <= y0 or y1 <= top for x0, y0, x1, y1 in taken):
            return left, top, right, bottom
    return None
