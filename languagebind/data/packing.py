"""From one sample's files to the members of a shard, or the reason why it cannot be used."""

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..config import UserError, at_least
from ..modalities import DecodeError, Modality, modality_class
from .members import member_extension
from .shards import as_key
from .sources import Sample

# How a file of a kind begins and ends: offset and bytes. Enough to tell an error page or a cut PNG from a picture.
_BEGINS = {
    "png": (0, b"\x89PNG\r\n\x1a\n"),
    "jpg": (0, b"\xff\xd8\xff"),
    "jpeg": (0, b"\xff\xd8\xff"),
    "wav": (0, b"RIFF"),
    "flac": (0, b"fLaC"),
    "ogg": (0, b"OggS"),
    "mp4": (4, b"ftyp"),
}
_ALSO = {"tif": "tiff", "jpeg": "jpg"}  # the same kind by another name
_PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class PackOptions:
    """What makes a file usable, and what of a video goes into a shard."""

    verify: Literal["header", "decode"] = "header"
    """What makes a file usable: it is there and begins as its kind should, or it can be decoded."""
    frames: int | None = None
    """Store so many frames of each video as JPEG, spread evenly, in place of the file: they are read far faster."""
    frame_size: int = 256
    """Short side of these frames, in pixels; smaller ones stay as they are."""
    frame_quality: int = 90
    """Their JPEG quality, 1 to 95."""

    def __post_init__(self):
        at_least(1, frames=self.frames, frame_size=self.frame_size, frame_quality=self.frame_quality)
        if self.frame_quality > 95:
            raise UserError(f"--frame-quality is {self.frame_quality}, set 1 to 95")


@dataclass(frozen=True)
class LeftOut:
    """A sample that is in no shard, and why."""

    id: str
    reason: str
    detail: str


class _Unusable(Exception):
    """Ends the packing of one sample: (reason, detail)."""


def pack(sample: Sample, options: PackOptions) -> tuple[str, dict[str, bytes], dict[str, Any]] | LeftOut:
    """(key, media by extension, metadata), as `ShardWriter.add` takes them, or why the sample is left out."""
    try:
        captions = {name: text for name, text in sample.captions.items() if _has_text(text)}
        if not captions:
            raise _Unusable("missing caption", f"of {sorted(sample.captions)}")
        media = {}
        for name, places in sample.media.items():
            members = _read_media(modality_class(name), places, options)
            # `jpg` beside `0.jpg` as well: whoever reads the frames would take the one picture
            if both := {member_extension(n)[0] for n in media} & {member_extension(n)[0] for n in members}:
                raise _Unusable("two modalities in one member", f"{min(both)}, of {name} and another one")
            media |= members
    except _Unusable as error:
        return LeftOut(sample.id, *error.args)
    metadata = {"id": sample.id, "captions": captions}
    if sample.labels:
        metadata["labels" if len(sample.labels) > 1 else "label"] = (
            sample.labels if len(sample.labels) > 1 else sample.labels[0]
        )
    return as_key(sample.id), media, metadata


def _has_text(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and text.strip() for text in texts)


def _read_media(modality: type[Modality], places: list[list[Path]], options: PackOptions) -> dict[str, bytes]:
    """The members that one modality adds: `mp4`, or `0.depth.png` to `7.depth.png`."""
    paths = next((paths for paths in map(_frames, places) if paths and paths[0].exists()), _frames(places[0]))
    extensions = [_extension(modality, path) for path in paths]
    contents = [_read(path) for path in paths]
    if options.frames and has_frames(modality):
        return _extract(modality, paths, contents, options)
    if options.verify == "decode":
        for path, data in zip(paths, contents, strict=True):
            _decode(modality, path, data)
    if len(paths) == 1:
        return {extensions[0]: contents[0]}
    return {f"{frame}.{extensions[frame]}": data for frame, data in enumerate(contents)}


def has_frames(modality: type[Modality]) -> bool:
    """Whether a sample of a modality is a number of frames that can be chosen."""
    return hasattr(modality, "num_frames")


def _extract(
    modality: type[Modality], paths: list[Path], contents: list[bytes], options: PackOptions
) -> dict[str, bytes]:
    """The frames that a model with as many takes from a video, as pictures: `0.jpg` and so on."""
    from PIL import Image

    try:
        frames = modality(num_frames=options.frames).decode(contents[0] if len(contents) == 1 else contents)
    except DecodeError as error:
        raise _Unusable("undecodable", f"{paths[0]}: {error.reason}") from error
    members = {}
    for number, frame in enumerate(frames.permute(0, 2, 3, 1).numpy()):  # (T, H, W, 3)
        picture, file = Image.fromarray(frame), io.BytesIO()
        scale = options.frame_size / min(picture.size)
        if scale < 1:
            size = (max(options.frame_size, round(side * scale)) for side in picture.size)
            picture = picture.resize(tuple(size), Image.Resampling.BICUBIC)
        picture.save(file, "JPEG", quality=options.frame_quality)
        members[f"{number}.jpg"] = file.getvalue()
    return members


def _frames(place: list[Path]) -> list[Path]:
    """The files of a place; a folder stands for the frames in it, by number."""
    if len(place) == 1 and place[0].is_dir():
        files = (path for path in place[0].iterdir() if not path.name.startswith("."))
        return sorted(files, key=lambda path: (len(path.stem), path.name))
    return place


def _extension(modality: type[Modality], path: Path) -> str:
    """The member's extension: of those that the modality reads, the one that ends as the file does."""
    suffix = path.suffix.lower().lstrip(".")
    if all(extension.rpartition(".")[2] != suffix for extension in modality.extensions):
        suffix = _ALSO.get(suffix, suffix)
    for extension in modality.extensions:
        if extension.rpartition(".")[2] == suffix:
            return extension
    raise _Unusable("unsupported kind of file", f"{path}: expected one of {', '.join(modality.extensions)}")


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise _Unusable("missing file", str(path)) from error
    except OSError as error:
        raise _Unusable("unreadable file", f"{path}: {error.strerror}") from error
    if not data:
        raise _Unusable("empty file", str(path))
    kind = path.suffix.lower().lstrip(".")
    offset, begin = _BEGINS.get(kind, (0, b""))
    if data[offset : offset + len(begin)] != begin or (kind == "png" and not data.endswith(_PNG_END)):
        raise _Unusable("undecodable", f"{path}: not a whole {kind} file")
    return data


def _decode(modality: type[Modality], path: Path, data: bytes) -> None:
    try:
        _with_defaults(modality).decode(data)
    except DecodeError as error:
        raise _Unusable("undecodable", f"{path}: {error.reason}") from error


@cache
def _with_defaults(modality: type[Modality]) -> Modality:
    return modality()
