"""From one sample's files to the members of a shard, or the reason why the sample is left out."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import UserError, at_least
from ..modalities import DecodeError, Modality, modality_class
from .members import member_extension
from .shards import as_key
from .sources import Sample
from .vidal import texts_of

# How a kind of file begins: offset and bytes. This tells a picture from an error page or from half a picture.
_BEGINS = {
    "png": (0, b"\x89PNG\r\n\x1a\n"),
    "jpg": (0, b"\xff\xd8\xff"),
    "wav": (0, b"RIFF"),
    "flac": (0, b"fLaC"),
    "ogg": (0, b"OggS"),
    "mp4": (4, b"ftyp"),
}
_PNG_END = b"IEND\xaeB`\x82"
_ALSO = {"tif": "tiff", "jpeg": "jpg"}  # other names of a kind


@dataclass(frozen=True)
class PackOptions:
    """Which files are usable, and what of a video goes into a shard."""

    verify: Literal["header", "decode"] = "header"
    """`header`: a file is usable if it begins as its kind should; `decode`: if it can be decoded."""
    frames: int | None = None
    """Store N frames of each video as JPEG, spread evenly, in place of the file: they are read far faster."""
    frame_size: int = 256
    """Short side of these frames, in pixels; smaller ones are not enlarged."""
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
    """Return (key, media by extension, metadata) for `ShardWriter.add`, or why the sample is left out."""
    captions = {name: value for name, value in sample.captions.items() if any(map(str.strip, texts_of(value)))}
    if not captions:
        return LeftOut(sample.id, "missing caption", f"of {sorted(sample.captions)}")
    media: dict[str, bytes] = {}
    for name, places in sample.media.items():
        try:
            members = _read_media(modality_class(name), places, options)
        except _Unusable as error:
            return LeftOut(sample.id, *error.args)
        # This includes `jpg` beside `0.jpg`: a reader of the frames would take the one picture.
        if both := {member_extension(n)[0] for n in media} & {member_extension(n)[0] for n in members}:
            return LeftOut(sample.id, "two modalities in one member", f"{min(both)}, of {name} and another one")
        media |= members
    metadata: dict[str, Any] = {"id": sample.id, "captions": captions}
    if len(sample.labels) > 1:
        metadata["labels"] = sample.labels
    elif sample.labels:
        metadata["label"] = sample.labels[0]
    return as_key(sample.id), media, metadata


def has_frames(modality: type[Modality]) -> bool:
    """Whether a sample of a modality has frames, whose number is an option."""
    return hasattr(modality, "num_frames")


def _read_media(modality: type[Modality], places: list[list[Path]], options: PackOptions) -> dict[str, bytes]:
    """Return the members that one modality adds: `mp4`, or `0.depth.png` to `7.depth.png`."""
    paths = next((paths for paths in map(_frames, places) if paths and paths[0].exists()), _frames(places[0]))
    extensions = [_extension(modality, path) for path in paths]
    contents = [_read(path) for path in paths]
    if options.frames and has_frames(modality):
        source = contents[0] if len(contents) == 1 else contents
        frames = _decode(_modality(modality, num_frames=options.frames), source, paths[0])
        return {f"{number}.jpg": _jpeg(frame, options) for number, frame in enumerate(frames)}
    if options.verify == "decode":
        for path, data in zip(paths, contents, strict=True):
            _decode(_modality(modality), data, path)
    if len(paths) == 1:
        return {extensions[0]: contents[0]}
    return {f"{frame}.{extensions[frame]}": data for frame, data in enumerate(contents)}


def _frames(place: list[Path]) -> list[Path]:
    """Return the files of a place; a folder stands for the frames in it, by number."""
    if len(place) == 1 and place[0].is_dir():
        files = (path for path in place[0].iterdir() if not path.name.startswith("."))
        return sorted(files, key=lambda path: (len(path.stem), path.name))
    return place


def _extension(modality: type[Modality], path: Path) -> str:
    """Return the member's extension: the one of those that the modality reads that ends as the file name does."""
    suffix = path.suffix.lower().lstrip(".")
    for kind in (suffix, _ALSO.get(suffix)):
        for extension in modality.extensions:
            if extension.rpartition(".")[2] == kind:
                return extension
    raise _Unusable("unsupported kind of file", f"{path}: expected one of {', '.join(modality.extensions)}")


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = "missing file" if isinstance(error, FileNotFoundError) else "unreadable file"
        raise _Unusable(reason, f"{path}: {error.strerror}") from error
    kind = path.suffix.lower().lstrip(".")
    offset, begin = _BEGINS.get(_ALSO.get(kind, kind), (0, b""))
    whole = data[offset : offset + len(begin)] == begin and (kind != "png" or data.endswith(_PNG_END))
    if not data or not whole:
        raise _Unusable("undecodable" if data else "empty file", f"{path}: not a whole {kind} file")
    return data


@cache
def _modality(modality: type[Modality], **options: int) -> Modality:
    return modality(**options)


def _decode(modality: Modality, source: bytes | Sequence[bytes], path: Path) -> Any:
    try:
        return modality.decode(source)
    except DecodeError as error:
        raise _Unusable("undecodable", f"{path}: {error.reason}") from error


def _jpeg(frame: torch.Tensor, options: PackOptions) -> bytes:
    """Encode a frame (3, H, W), uint8."""
    from PIL import Image

    picture, file = Image.fromarray(frame.permute(1, 2, 0).numpy()), io.BytesIO()
    scale = options.frame_size / min(picture.size)
    if scale < 1:
        width, height = (max(options.frame_size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=options.frame_quality)
    return file.getvalue()
