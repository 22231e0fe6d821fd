"""Pack the files of one sample as members of a shard, or give the reason why the sample is left out."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from ..config import UserError, at_least
from ..files import POINTER, as_on_disk, is_pointer, printable
from ..modalities import DecodeError, Modality, modality_class
from .members import media_members
from .shards import as_key
from .sources import Sample
from .vidal import LEFT_OUT, caption_faults, clean_captions

# The signature of each kind of file, as offset and bytes. A file with another one is decoded: it may be of another kind
# than its suffix says, or an error page that was saved as a picture.
_SIGNATURES = {
    "png": (0, b"\x89PNG\r\n\x1a\n"),
    "jpg": (0, b"\xff\xd8\xff"),
    "webp": (8, b"WEBP"),
    "gif": (0, b"GIF8"),
    "wav": (8, b"WAVE"),
    "flac": (0, b"fLaC"),
    "ogg": (0, b"OggS"),
    "mp4": (4, b"ftyp"),
}
_PNG_END = b"IEND\xaeB`\x82"  # a truncated PNG does not have it
# Other suffixes of the same kind
_ALIASES = {"tif": "tiff", "jpeg": "jpg", "aif": "aiff", "oga": "ogg", "mpeg": "mpg", "vob": "mpg", "asf": "wmv"}


@dataclass(frozen=True)
class PackOptions:
    """Options for checking media files and for storing videos as frames."""

    verify: Literal["header", "decode"] = "header"
    """Check of each media file: `header` decodes only files whose signature is not that of the suffix, `decode` all."""
    frames: int | None = None
    """Store N evenly spaced JPEG frames of each video instead of the file. They are much faster to read."""
    frame_size: int = 256
    """Short side of the stored frames in pixels. Smaller frames are not enlarged."""
    frame_quality: int = 90
    """JPEG quality of the stored frames, 1 to 95."""

    def __post_init__(self):
        at_least(1, frames=self.frames, frame_size=self.frame_size, frame_quality=self.frame_quality)
        if self.frame_quality > 95:
            raise UserError(f"--frame-quality is {self.frame_quality}; use 1 to 95")


@dataclass(frozen=True)
class LeftOut:
    """A sample that is left out of the shards, and the reason."""

    id: str
    reason: str
    detail: str


class _Unusable(Exception):
    """Raised with (reason, detail) if a sample cannot be packed."""


def pack(sample: Sample, options: PackOptions) -> tuple[str, dict[str, bytes], dict[str, Any]] | LeftOut:
    """Return the arguments of `ShardWriter.add` (key, media by extension, metadata), or a `LeftOut` with the reason."""
    if reasons := sample.captions.get(LEFT_OUT):  # of VIDAL's annotation
        return LeftOut(sample.id, reasons[0].partition(": ")[0], "; ".join(reasons))
    captions = clean_captions(sample.captions)
    if not captions:
        faults = caption_faults(sample.captions)
        return LeftOut(sample.id, "missing caption", f"the caption is {' and '.join(faults) or 'missing'}")
    try:
        own = {name: _read_media(modality_class(name), files, options) for name, files in sample.media.items()}
    except _Unusable as error:
        return LeftOut(sample.id, *error.args)
    media = {name: data for members in own.values() for name, data in members.items()}
    for name, members in own.items():  # a reader would use `jpg` in place of the frames `0.png`, `1.png`
        found = media_members(media, modality_class(name).extensions) or {}
        names = [found] if isinstance(found, str) else list(found.values())
        if {each: media[each] for each in names} != members:
            detail = f"{names[0]} would be read for {name}: pack {name} into shards of its own"
            return LeftOut(sample.id, "two modalities in one member", detail)
    metadata: dict[str, Any] = {"id": printable(sample.id), "captions": captions}
    if len(sample.labels) > 1:
        metadata["labels"] = sample.labels
    elif sample.labels:
        metadata["label"] = sample.labels[0]
    return as_key(sample.id), media, metadata


def has_frames(modality: type[Modality]) -> bool:
    """Return True if the number of frames per sample is an option of the modality."""
    return hasattr(modality, "num_frames")


def _read_media(modality: Any, locations: list[list[Path]], options: PackOptions) -> dict[str, bytes]:
    """Return one modality's media by extension: a whole file, numbered frames, or the JPEG frames of a video."""
    spelled = [[as_on_disk(path) for path in paths] for paths in locations]
    paths = next((paths for paths in map(_frames, spelled) if paths and paths[0].exists()), _frames(locations[0]))
    contents = [_read(path) for path in paths]
    extensions = [_extension(modality, path, data) for path, data in zip(paths, contents, strict=True)]
    if options.frames and has_frames(modality):
        source = contents[0] if len(contents) == 1 else contents
        frames = _decode(modality(num_frames=options.frames), source, paths[0])
        return {f"{number}.jpg": jpeg(frame, options) for number, frame in enumerate(frames)}
    for path, data in zip(paths, contents, strict=True):
        if options.verify == "decode" or not _has_signature(_kind(path), data):
            _decode(modality(), [data] if has_frames(modality) and len(paths) > 1 else data, path)
    if len(paths) == 1:
        return {extensions[0]: contents[0]}
    return {f"{frame}.{extensions[frame]}": data for frame, data in enumerate(contents)}


def _frames(location: list[Path]) -> list[Path]:
    """Return the files of a location. A folder stands for its files, in the order of their frame numbers."""
    if len(location) == 1 and location[0].is_dir():
        files = (path for path in location[0].iterdir() if not path.name.startswith("."))
        return sorted(files, key=lambda path: (len(path.stem), path.name))
    return location


def _extension(modality: type[Modality], path: Path, data: bytes) -> str:
    """Return the modality's extension for a file: that of its suffix, or of its content if they contradict."""
    suffix = _kind(path)
    content = next((kind for kind in _SIGNATURES if _has_signature(kind, data)), "")
    kinds = (path.suffix.lower().lstrip("."), suffix, content)
    for kind in kinds if _has_signature(suffix, data) else reversed(kinds):
        for extension in modality.extensions:
            if extension.rpartition(".")[2] == kind:
                return extension
    raise _Unusable("unsupported kind of file", f"{path}: expected one of {', '.join(modality.extensions)}")


def _kind(path: Path) -> str:
    suffix = path.suffix.lower().lstrip(".")
    return _ALIASES.get(suffix, suffix)


def _has_signature(kind: str, data: bytes) -> bool:
    offset, signature = _SIGNATURES.get(kind, (0, b""))
    return data[offset : offset + len(signature)] == signature and (kind != "png" or data.endswith(_PNG_END))


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = "missing file" if isinstance(error, FileNotFoundError) else "unreadable file"
        raise _Unusable(reason, f"{path}: {error.strerror}") from error
    if not data:
        raise _Unusable("empty file", f"{path}: the file is empty")
    if is_pointer(data):
        raise _Unusable("Git LFS pointer", f"{path}: {POINTER}")
    return data


def _decode(modality: Modality, source: bytes | Sequence[bytes], path: Path) -> Any:
    try:
        return modality.decode(source)
    except DecodeError as error:
        raise _Unusable("undecodable", f"{path}: {error.reason}") from error


def jpeg(frame: torch.Tensor, options: PackOptions) -> bytes:
    """Encode a uint8 frame (3, H, W) as JPEG."""
    picture, file = Image.fromarray(frame.permute(1, 2, 0).numpy()), io.BytesIO()
    scale = options.frame_size / min(picture.size)
    if scale < 1:
        width, height = (max(options.frame_size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=options.frame_quality)
    return file.getvalue()
