"""Crops for classification, cut from pictures with annotated boxes (LLVIP, FLIR ADAS v1 and v2).

The authors of LanguageBind published finished crops and no script, so this is a rule of our own, to the pixel:

1. Every annotated box of a category that `classes` names is cut out: crowds, occluded and cut-off ones, too. Boxes of
   other categories are left out and counted.
2. A box has four edges: COCO's (x, y, x + width, y + height), VOC's (xmin, ymin, xmax, ymax). Each is rounded to the
   nearest whole pixel, halves up: floor(edge + 0.5). The crop is the columns left .. right - 1 and the rows
   top .. bottom - 1, counted from 0.
3. The box is clipped to the picture. If less than `min_size` (1) columns or rows are left, it is left out and counted:
   as `no area` where the box itself has none, as `outside` where it lies beside the picture, else as `small`.
4. Pixels are stored as they are decoded: no resampling, padding, turning or change of the number of channels or bits;
   as PNG, without loss, named `<label>/<stem of the picture>_<id of the annotation>.png`. The id in VOC, which has
   none, is the place of the object in its file, from 0.
5. With `background` (a label), each crop gets a second one of the same size in the same picture, with the same name in
   the folder `background`. Its place is tried `background_tries` (100) times. In try t, from 0, with
   d = SHA-256("<stem>/<id>/<t>"), left is the integer in d[0:8] modulo (picture width - width + 1) and top that in
   d[8:16] modulo (picture height - height + 1), most significant byte first. The first place that shares no pixel with
   any annotated box of the picture, of whatever category, is taken; if none does, it is left out and counted.

Options: `format` (voc, coco), `annotations` (coco: the file; voc: the folder), `images` (voc: the folder), all from
--source; `pictures`, how many these are (COCO lists them, VOC does not, so that a missing one would not be noticed);
`classes`, the annotation's category, by name or number, to the label; and those named above.
"""

import hashlib
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ...config import UserError, first_line
from ._boxes import Box, Picture, read_coco, read_voc
from ._common import check_options, log_counts, write_png

KNOWN = ("format", "annotations", "images", "pictures", "classes", "min_size", "background", "background_tries")
MODES = ("L", "RGB", "RGBA", "P", "I;16")  # what PNG stores as it is

Rectangle = tuple[int, int, int, int]  # left, top, right, bottom


def prepare(source: Path, output: Path, options: dict[str, Any]) -> Generator[dict, None, dict[str, int]]:
    """Write the crops below `output`; yields {"path", "label"} rows, returns what was left out or clipped.

    Where a picture is missing, its rows are yielded without a file and say in "where" whose they are.

    Raises:
        UserError: an option, an annotation or a picture is wrong.
    """
    classes, numbers = _check(options)
    counts: Counter[str] = Counter()
    pictures = list(_pictures(Path(source), options, classes))
    if numbers["pictures"] not in (None, len(pictures)):
        place = Path(source, options.get("images", options["annotations"]))
        raise UserError(f"{place}: {len(pictures)} pictures, expected {numbers['pictures']}: unpack the release again")
    for picture in pictures:
        if not picture.path.is_file():
            where = f"{picture.annotation}: the picture {picture.path} is missing"
            background = [options["background"]] if options.get("background") else []
            for box in picture.boxes:
                for label in [box.label, *background] if box.label else ():
                    yield {**_row(picture, box, label), "where": where}
            continue
        image = _open(picture)
        for box in picture.boxes:
            crop = _clip(box, image.size, numbers["min_size"], counts)
            if crop is None:
                continue
            yield _write(image, crop, picture, box, box.label, output)
            if background := options.get("background"):
                place = _background(picture, box, crop, image.size, numbers["background_tries"])
                if place is None:
                    counts["no place for a background"] += 1
                else:
                    yield _write(image, place, picture, box, background, output)
    log_counts("boxes left out or clipped", counts)
    return dict(counts)


def _check(options: dict[str, Any]) -> tuple[dict[str, str], dict[str, int | None]]:
    """The classes, and the options that are numbers."""
    check_options(options, KNOWN)
    classes = options.get("classes")
    if not isinstance(classes, dict) or not classes:
        raise UserError("prepare: classes should map the annotation's categories to labels, as in `person: person`")
    classes = {str(category): label for category, label in classes.items()}
    for label in (*classes.values(), options.get("background", "background")):
        if not isinstance(label, str) or not label or label[0] == "." or "/" in label:
            raise UserError(f"prepare: the label {label!r} cannot be a folder's name")
    if options.get("background") in classes.values():
        raise UserError(f"prepare: background {options['background']!r} is a label of the classes, choose another one")
    numbers: dict[str, int | None] = {"min_size": 1, "background_tries": 100, "pictures": None}
    for name in numbers.keys() & options.keys():
        value = str(options[name])
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"prepare: {name} should be a whole number, at least 1; got {value}")
        numbers[name] = int(value)
    return classes, numbers


def _pictures(source: Path, options: dict[str, Any], classes: dict[str, str]) -> Iterator[Picture]:
    kind = options.get("format")
    for name in ("annotations", "images") if kind == "voc" else ("annotations",):
        if not isinstance(options.get(name), str):
            raise UserError(f"prepare: {name} is missing: the path of the {name} below --source")
    if kind == "voc":
        return read_voc(source / options["images"], source / options["annotations"], classes)
    if kind == "coco":
        return read_coco(source / options["annotations"], classes)
    raise UserError(f"prepare: format should be voc or coco, not {kind!r}")


def _open(picture: Picture) -> Image.Image:
    try:
        with Image.open(picture.path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{picture.path} cannot be read: {first_line(error)}; take it from the release again"
        ) from error
    if picture.size and image.size != picture.size:
        sizes = "{}x{} pixels, {}x{}".format(*image.size, *picture.size)
        raise UserError(f"{picture.path} has {sizes} in {picture.annotation}: use the pictures of the release")
    if image.mode not in MODES:
        raise UserError(f"{picture.path} is {image.mode}, which PNG cannot store as it is: use the release's pictures")
    return image


def _clip(box: Box, size: tuple[int, int], min_size: int, counts: Counter[str]) -> Rectangle | None:
    """The part of a box that is in the picture, or None where it is left out; counts why, and what was clipped."""
    crop = max(box.left, 0), max(box.top, 0), min(box.right, size[0]), min(box.bottom, size[1])
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    reason = None
    if box.label is None:
        reason = f"category {box.category}"
    elif not box.has_area:
        reason = "no area"
    elif min(width, height) < 1:
        reason = "outside"
    elif min(width, height) < min_size:
        reason = "small"
    elif crop != (box.left, box.top, box.right, box.bottom):
        counts["clipped"] += 1
    if reason:
        counts[reason] += 1
    return None if reason else crop


def _background(picture: Picture, box: Box, crop: Rectangle, size: tuple[int, int], tries: int) -> Rectangle | None:
    """A rectangle of the crop's size that shares no pixel with any box, or None if no try found one."""
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


def _write(image: Image.Image, crop: Rectangle, picture: Picture, box: Box, label: str, output: Path) -> dict[str, str]:
    """Store one crop; its row."""
    row = _row(picture, box, label)
    part = image.crop(crop)
    part.info = {}  # nothing but pixels: no colour profile, no orientation
    write_png(part, Path(output, row["path"]))
    return row


def _row(picture: Picture, box: Box, label: str) -> dict[str, str]:
    return {"path": f"{label}/{picture.path.stem}_{box.id}.png", "label": label}
