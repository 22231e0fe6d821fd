"""Crops for classification, cut from pictures with annotated boxes (LLVIP, FLIR ADAS v1 and v2).

The authors of LanguageBind published finished crops and no script, so this rule is ours, down to the pixel:

1. Every annotated box of a category in `classes` is cropped: crowds, occluded and truncated objects too. Boxes of other
   categories are left out and counted.
2. A box has four edges: COCO's (x, y, x + width, y + height), VOC's (xmin, ymin, xmax, ymax). Each is rounded to the
   nearest whole pixel, halves up: floor(edge + 0.5). The crop is the columns left .. right - 1 and the rows
   top .. bottom - 1, counted from 0.
3. The box is clipped to the picture. A box with fewer than `min_size` (1) columns or rows left is left out and counted:
   as `no area` if the box itself has none, as `outside` if it lies beside the picture, else as `small`.
4. Pixels are stored as decoded: no resampling, padding, rotation or change of channels or bits; as PNG, without loss,
   named `<label>/<stem of the picture>_<id of the annotation>.png`. VOC has no ids, so the id is the position of the
   object in its file, from 0.
5. With `background` (a label), each crop gets a second one of the same size from the same picture, with the same name
   in the folder `background`. Its place is tried `background_tries` (100) times. In try t, from 0, with
   d = SHA-256("<stem>/<id>/<t>"), left is the integer in d[0:8] modulo (picture width - width + 1) and top that in
   d[8:16] modulo (picture height - height + 1), most significant byte first. The first place that shares no pixel with
   any annotated box of the picture, of whatever category, is taken; if there is none, it is left out and counted.

Options: `format` (voc, coco); `annotations`, below --source (coco: the file; voc: the folder); `images` (voc: the
folder of the pictures); `pictures`, how many there are (COCO lists them; VOC does not, so a missing one would go
unnoticed); `classes`, from the annotation's category, by name or number, to the label; and those named above.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from xml.etree import ElementTree

from PIL import Image
from pydantic import BaseModel, Field, model_validator

from ...config import UserError
from ...files import parse_json, twice
from ..data.validation import CONFIG, Whole
from .writing import Row, reading, write_png

SUFFIXES = (".jpg", ".jpeg", ".png")

Label = Annotated[str, Field(pattern="^[^./][^/]*$")]  # it names a folder
Positive = Annotated[Whole, Field(ge=1)]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom


class Options(BaseModel):
    """The options above."""

    model_config = CONFIG

    format: Literal["voc", "coco"]
    annotations: str
    images: str = ""
    pictures: Positive | None = None
    classes: Annotated[dict[str, Label], Field(min_length=1)]
    min_size: Positive = 1
    background: Label | None = None
    background_tries: Positive = 100

    @model_validator(mode="after")
    def _background_is_no_class(self) -> "Options":
        if self.background in self.classes.values():
            raise ValueError(f"background {self.background!r} is also a label of the classes; choose another name")
        return self


@dataclass(frozen=True)
class Box:
    """An annotated rectangle in whole pixels, not clipped: columns left .. right - 1, rows top .. bottom - 1."""

    id: int
    category: str
    label: str | None  # None for a category that `classes` does not name
    left: int
    top: int
    right: int
    bottom: int

    @property
    def has_area(self) -> bool:
        return self.right > self.left and self.bottom > self.top


@dataclass(frozen=True)
class Picture:
    """A picture's file and its boxes, with the annotated (width, height), if there is one."""

    path: Path
    annotation: Path
    size: tuple[float, float] | None
    boxes: tuple[Box, ...]


def prepare(source: Path, output: Path, options: Options) -> Generator[Row, None, dict[str, int]]:
    """Write the crops below `output`, yield {"path", "label"} rows, and return what was left out or clipped.

    The rows of a missing picture are yielded without a file, and "where" names the picture.

    Raises:
        UserError: an annotation file or a picture is missing, damaged, or not the one that the options describe.
    """
    read = {"voc": _read_voc, "coco": _read_coco}[options.format]
    pictures = list(read(source, options))
    if options.pictures not in (None, len(pictures)):
        place = source / (options.images or options.annotations)
        raise UserError(f"{place}: {len(pictures)} pictures, expected {options.pictures}: unpack the download again")
    counts: Counter[str] = Counter()
    for picture in pictures:
        if picture.path.is_file():
            yield from _crop(picture, output, options, counts)
            continue
        where = f"{picture.annotation}: the picture {picture.path} is missing"
        for box in picture.boxes:
            for label in filter(None, (box.label, box.label and options.background)):
                yield {**_row(picture, box, label), "where": where}
    return dict(counts)


def _read_voc(source: Path, options: Options) -> Iterator[Picture]:
    """Yield the pictures of a folder in the order of their names, each with `annotations`/<stem>.xml."""
    images = source / options.images
    with reading(images):
        paths = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    for path in paths:
        file = source / options.annotations / f"{path.stem}.xml"
        with reading(file):
            root = ElementTree.parse(file).getroot()
            boxes = tuple(_voc_box(item, i, options) for i, item in enumerate(root.iterfind("object")))
            size = _size(root.findtext("size/width"), root.findtext("size/height"))
        yield Picture(path, file, size, boxes)


def _voc_box(item: ElementTree.Element, number: int, options: Options) -> Box:
    category = item.findtext("name", "").strip()
    edges = [float(item.findtext(f"bndbox/{edge}", "")) for edge in ("xmin", "ymin", "xmax", "ymax")]
    return Box(number, category, options.classes.get(category), *_whole(*edges))


def _read_coco(source: Path, options: Options) -> Iterator[Picture]:
    """Yield the pictures of a COCO file in its order, without those that have no box.

    `file_name` starts at the folder of the COCO file.
    """
    file = source / options.annotations
    with reading(file):
        content = parse_json(file.read_bytes())
        categories = {str(item["id"]): str(item["name"]) for item in content["categories"]}
        images = {item["id"]: (file.parent / item["file_name"], item) for item in content["images"]}
        boxes: dict[Any, list[Box]] = {key: [] for key in images}
        for item in content["annotations"]:
            boxes[item["image_id"]].append(_coco_box(item, categories, options))
        sizes = {key: _size(item.get("width"), item.get("height")) for key, (_, item) in images.items()}
    if repeated := twice(item["id"] for item in content["images"]):
        raise UserError(f"{file}: the image id {repeated} is listed twice")
    names = categories.keys() | categories.values()
    if unknown := sorted(options.classes.keys() - names):
        raise UserError(f"{file} has no category {unknown[0]!r}, only {', '.join(sorted(names))}")
    for key, (path, _) in images.items():
        if boxes[key]:
            yield Picture(path, file, sizes[key], tuple(boxes[key]))


def _coco_box(item: dict[str, Any], categories: dict[str, str], options: Options) -> Box:
    number = str(item["category_id"])
    category = categories[number]
    label = options.classes.get(category, options.classes.get(number))
    left, top, width, height = map(float, item["bbox"])
    return Box(int(item["id"]), category, label, *_whole(left, top, left + width, top + height))


def _size(width: Any, height: Any) -> tuple[float, float] | None:
    """Return the annotated width and height, None if either is missing or 0."""
    size = float(width or 0), float(height or 0)
    return size if all(size) else None


def _whole(*edges: float) -> list[int]:
    """Round each edge to the nearest whole pixel, halves up."""
    return [math.floor(edge + 0.5) for edge in edges]


def _crop(picture: Picture, output: Path, options: Options, counts: Counter[str]) -> Iterator[Row]:
    """Write a picture's crops and their backgrounds, yield their rows, and count what was left out or clipped."""
    with reading(picture.path), Image.open(picture.path) as image:
        image.load()
    if picture.size and image.size != picture.size:
        sizes = "{}x{} pixels, but {:g}x{:g}".format(*image.size, *picture.size)
        raise UserError(f"{picture.path} has {sizes} in {picture.annotation}: use the pictures of the release")
    for box in picture.boxes:
        crop = _clip(box, image.size, options.min_size, counts)
        if crop is None or box.label is None:
            continue
        yield _write(image, crop, _row(picture, box, box.label), output)
        if options.background:
            place = _background(picture, box, crop, image.size, options.background_tries)
            if place is None:
                counts["no place for a background"] += 1
            else:
                yield _write(image, place, _row(picture, box, options.background), output)


def _clip(box: Box, size: tuple[int, int], min_size: int, counts: Counter[str]) -> Rectangle | None:
    """Return the part of a box that lies in the picture, None if it is left out; count why, and what was clipped."""
    crop = max(box.left, 0), max(box.top, 0), min(box.right, size[0]), min(box.bottom, size[1])
    smaller = min(crop[2] - crop[0], crop[3] - crop[1])
    reason = None
    if box.label is None:
        reason = f"category {box.category}"
    elif not box.has_area:
        reason = "no area"
    elif smaller < 1:
        reason = "outside"
    elif smaller < min_size:
        reason = "small"
    elif crop != (box.left, box.top, box.right, box.bottom):
        counts["clipped"] += 1
    if reason:
        counts[reason] += 1
    return None if reason else crop


def _background(picture: Picture, box: Box, crop: Rectangle, size: tuple[int, int], tries: int) -> Rectangle | None:
    """Return a rectangle of the crop's size that shares no pixel with any box, None if no try found one."""
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    taken = [other for other in picture.boxes if other.has_area]
    for attempt in range(tries):
        digest = hashlib.sha256(f"{picture.path.stem}/{box.id}/{attempt}".encode()).digest()
        left = int.from_bytes(digest[:8], "big") % (size[0] - width + 1)
        top = int.from_bytes(digest[8:16], "big") % (size[1] - height + 1)
        right, bottom = left + width, top + height
        if all(right <= b.left or b.right <= left or bottom <= b.top or b.bottom <= top for b in taken):
            return left, top, right, bottom
    return None


def _write(image: Image.Image, rectangle: Rectangle, row: Row, output: Path) -> Row:
    """Store one crop, and return its row."""
    part = image.crop(rectangle)
    part.info = {}  # pixels alone: no colour profile, no orientation
    write_png(part, output / row["path"])
    return row


def _row(picture: Picture, box: Box, label: str) -> Row:
    return {"path": f"{label}/{picture.path.stem}_{box.id}.png", "label": label}
