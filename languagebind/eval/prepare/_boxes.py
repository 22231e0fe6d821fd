"""Pictures with annotated boxes, from Pascal VOC's XML or COCO's JSON."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ...config import UserError, first_line
from ...files import check_regular, is_plain, parse_json, twice

PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Box:
    """An annotated rectangle in whole pixels, not clipped: columns left .. right - 1, rows top .. bottom - 1.

    `category` is the annotation's name for it (its number where that has no name); `label` is None where the options
    name no class for it.
    """

    id: int
    category: str
    label: str | None
    left: int
    top: int
    right: int
    bottom: int

    @property
    def has_area(self) -> bool:
        return self.right > self.left and self.bottom > self.top


@dataclass(frozen=True)
class Picture:
    """A picture's file and its boxes; `size` is (width, height) as annotated, None where it is not."""

    path: Path
    annotation: Path
    size: tuple[int, int] | None
    boxes: tuple[Box, ...]


def read_voc(images: Path, annotations: Path, classes: dict[str, str]) -> Iterator[Picture]:
    """The pictures of a folder in the order of their names, each with `annotations`/<stem>.xml.

    VOC numbers no annotations: an id is the place of the <object> in its file, from 0.

    Raises:
        UserError: a folder is missing or empty; an annotation is missing, no XML or has a DOCTYPE, or an object in it
            has no name or no box of numbers.
    """
    if not images.is_dir() or not annotations.is_dir():
        missing = annotations if images.is_dir() else images
        raise UserError(f"{missing} is no folder: --source is the folder of the download")
    paths = sorted(path for path in images.iterdir() if path.suffix.lower() in PICTURES and path.name[0] != ".")
    if not paths:
        raise UserError(f"{images} holds no pictures ({', '.join(PICTURES)}): unpack the download again")
    if stem := twice(path.stem for path in paths):
        raise UserError(f"{images} holds two pictures named {stem}: keep the one of the release")
    for path in paths:
        file = annotations / f"{path.stem}.xml"
        root = _parse_xml(file)
        boxes = [_voc_box(item, i, f"{file}: object {i}", classes) for i, item in enumerate(root.iterfind("object"))]
        size = _size([root.findtext(f"size/{side}") for side in ("width", "height")], str(file))
        yield Picture(path, file, size, tuple(boxes))


def read_coco(file: Path, classes: dict[str, str]) -> Iterator[Picture]:
    """The pictures of a COCO file in its order, leaving out those without a box; `file_name` starts at its folder.

    Raises:
        UserError: the file is missing, no JSON or not laid out like COCO's, repeats an id or a picture, or lacks a
            category that `classes` or a box names.
    """
    content = _parse_json(file)
    names = {str(item.get("id")): str(item.get("name")) for item in _records(content, "categories", file)}
    declared = names.keys() | names.values()
    for category in classes:
        if category not in declared:
            raise UserError(f"{file} has no category {category!r}: name one of {', '.join(sorted(declared))}")
    pictures: dict[Any, tuple[dict, list[Box]]] = {}
    stems: set[str] = set()
    for item in _records(content, "images", file):
        key, name = item.get("id"), item.get("file_name")
        if not isinstance(key, (int, str)) or not isinstance(name, str) or not is_plain(name):
            raise UserError(f"{file}: an image has no id or no file_name: {json.dumps(item)[:80]}")
        if key in pictures or Path(name).stem in stems:
            raise UserError(f"{file}: the image {name} (id {key}) is there twice, by id or by name")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{file}: the image {name!r} is outside of {file.parent}")
        stems.add(Path(name).stem)
        pictures[key] = (item, [])
    seen: set[tuple[Any, int]] = set()
    for item in _records(content, "annotations", file):
        number, key = item.get("id"), item.get("image_id")
        where = f"{file}: annotation {number}"
        if not isinstance(number, int) or not isinstance(key, (int, str)) or key not in pictures:
            raise UserError(f"{where}: expected an id and the image_id of one of the images, found {number}, {key}")
        if (key, number) in seen:
            raise UserError(f"{where} of image {key} is there twice")
        seen.add((key, number))
        pictures[key][1].append(_coco_box(item, number, where, names, classes))
    for item, boxes in pictures.values():
        if boxes:
            size = _size([item.get("width"), item.get("height")], f"{file}: the image {item['file_name']}")
            yield Picture(file.parent / item["file_name"], file, size, tuple(boxes))


def _voc_box(item: ElementTree.Element, number: int, where: str, classes: dict[str, str]) -> Box:
    category = item.findtext("name", "").strip()
    if not category:
        raise UserError(f"{where} has no <name>")
    edges = [item.findtext(f"bndbox/{edge}", "") for edge in ("xmin", "ymin", "xmax", "ymax")]
    return Box(number, category, classes.get(category), *_whole(edges, where))


def _coco_box(item: dict, number: int, where: str, names: dict[str, str], classes: dict[str, str]) -> Box:
    category = str(item.get("category_id"))
    if category not in names:
        raise UserError(f"{where}: category_id {category} is not among the file's categories ({', '.join(names)})")
    box = item.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(n, (int, float)) for n in box):
        raise UserError(f"{where}: bbox should be [left, top, width, height], found {box!r}")
    label = classes.get(names[category], classes.get(category))
    left, top, width, height = box
    return Box(number, names[category], label, *_whole([left, top, left + width, top + height], where))


def _size(sides: list[Any], where: str) -> tuple[int, int] | None:
    """Width and height, None where either is not annotated, or 0."""
    try:
        # As text, since a boolean is no number there.
        width, height = (0.0 if side in (None, "") else float(str(side)) for side in sides)
    except ValueError:
        width = height = math.nan
    if not (width.is_integer() and height.is_integer() and min(width, height) >= 0):
        raise UserError(f"{where}: the size should be two whole numbers, found {sides}")
    return (int(width), int(height)) if min(width, height) > 0 else None


def _whole(edges: list[Any], where: str) -> list[int]:
    """Each edge to the nearest whole pixel, halves up."""
    try:
        return [math.floor(float(edge) + 0.5) for edge in edges]
    except (ValueError, OverflowError) as error:  # of NaN and of infinity
        raise UserError(f"{where}: a box has four numbers, found {edges}") from error


class _NoDoctype(ElementTree.TreeBuilder):
    """A DOCTYPE may define entities that grow without end, and no annotation needs one."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise UserError(f"has a DOCTYPE ({name}), which no annotation needs")


def _parse_xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(_read(file), parser=ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # LookupError: an unknown encoding
        raise UserError(f"{file} is no usable XML: {first_line(error)}; take it from the release again") from error


def _parse_json(file: Path) -> dict:
    try:
        content = parse_json(_read(file))
    except ValueError as error:
        raise UserError(f"{file} is no usable JSON: {first_line(error)}; take it from the release again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} should hold one JSON object with images, annotations and categories")
    return content


def _read(file: Path) -> bytes:
    try:
        check_regular(file)
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; --source is the folder of the download") from error


def _records(content: dict, key: str, file: Path) -> list[dict]:
    records = content.get(key)
    if not isinstance(records, list) or not all(isinstance(item, dict) for item in records):
        raise UserError(f"{file}: {key!r} should be a list of objects, as in COCO's files")
    return records
