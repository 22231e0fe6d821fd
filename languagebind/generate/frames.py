"""Cut videos into VIDAL's eight frames, resize the clips, and take their sound."""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import UserError, to_dict
from ..data.packing import PackOptions, jpeg
from ..data.vidal import NUM_FRAMES, SOURCE, media_paths
from ..modalities import DecodeError, modality_class
from ..modalities._containers import open_stream
from .steps import Entry, Failed, Made, Step

VIDEO: Any = modality_class("video")()
AUDIO: Any = modality_class("audio")()
SILENT = 1e-4  # the largest sample of a track that is counted as silent


@dataclass(frozen=True)
class FrameOptions:
    """Eight frames of each video, and the clip at the size of the frames."""

    frames: Literal["original", "even"] = "original"
    """of n frames, i * (n // 8) as the original took, or evenly spaced from the first to the last"""
    size: int = 256
    """short side of frames and clips; smaller videos keep their size"""
    clips: bool = True
    """resize the clips, too"""


@dataclass(frozen=True)
class SoundOptions:
    """The sound of each video."""

    format: Literal["wav", "flac"] = "wav"
    """kind of the files"""
    rate: int | None = 16000
    """samples per second; None: as in the video"""


def video_of(root: Path, entry: Entry) -> Path:
    """Return the video of an entry: its `source`, or where VIDAL's layout has the clip."""
    if SOURCE in entry.fields:
        return root / entry.fields[SOURCE]
    return media_paths(root, entry.id, str(entry.fields.get("folder", "")), "video")[0][0]


class Frames(Step):
    """Frames as JPEG files, and H.264 clips. Needs FFmpeg for the clips."""

    name = "frames"

    def __init__(self, root: Path, options: FrameOptions):
        self.root, self.options, self.packing = root, options, PackOptions(frame_size=options.size)

    def record(self) -> dict[str, Any]:
        return to_dict(self.options)

    def is_done(self, entry: Entry) -> bool:
        return all(path.exists() for path in self._results(entry))

    def _results(self, entry: Entry) -> list[Path]:
        """Return the folder of the frames and, unless it is the source, the clip."""
        (clip,), frames = media_paths(self.root, entry.id, str(entry.fields.get("folder", "")), "video")
        resized = self.options.clips and clip != video_of(self.root, entry)
        return [frames[0].parent, *([clip] if resized else [])]

    def one(self, entry: Entry) -> Made | Failed:
        source = video_of(self.root, entry)
        try:
            frames = VIDEO.read_part(source, 0, choose=self._indices)
            folder, *clips = self._results(entry)
            pictures = {f"{k}.jpg": jpeg(frame, self.packing) for k, frame in enumerate(frames)}
            side = f"'if(gt(iw,ih),-2,min(iw,{self.options.size}))':'if(gt(iw,ih),min(ih,{self.options.size}),-2)'"
            command = ["-vf", f"scale={side}", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac"]
            return Made({folder: pictures} | {clip: ffmpeg(source, ".mp4", *command) for clip in clips})
        except DecodeError as error:
            return Failed("unreadable video", f"{source}: {error.reason}")

    def _indices(self, count: int) -> np.ndarray:
        if self.options.frames == "original":
            return np.arange(NUM_FRAMES) * (count // NUM_FRAMES)
        return np.linspace(0, count - 1, NUM_FRAMES).round().astype(int)


class Sound(Step):
    """Sound as WAV or FLAC files. Videos without a sound track are counted. Needs FFmpeg."""

    name = "sound"

    def __init__(self, root: Path, options: SoundOptions):
        self.root, self.options = root, options

    def record(self) -> dict[str, Any]:
        return to_dict(self.options)

    def is_done(self, entry: Entry) -> bool:
        return self._result(entry).exists()

    def _result(self, entry: Entry) -> Path:
        wav = media_paths(self.root, entry.id, str(entry.fields.get("folder", "")), "audio")[0][0]
        return wav.with_suffix(f".{self.options.format}")

    def one(self, entry: Entry) -> Made | Failed:
        source = video_of(self.root, entry)
        try:
            with open_stream(source, "video") as (container, _):
                if not container.streams.audio:
                    return Made(notes=("no sound track",))
            rate = [] if self.options.rate is None else ["-ar", str(self.options.rate)]
            data = ffmpeg(source, f".{self.options.format}", "-vn", *rate)
            samples, _ = AUDIO.decode(data)
        except DecodeError as error:
            return Failed("unreadable sound", f"{source}: {error.reason}")
        return Made({self._result(entry): data}, notes=("silent",) if samples.abs().max() < SILENT else ())


def ffmpeg(source: Path, suffix: str, *options: str) -> bytes:
    """Return what FFmpeg makes of a file, the same bytes each time. Raises `DecodeError` if it cannot read the file."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, f"made{suffix}")
        words = ["ffmpeg", "-v", "error", "-xerror", "-nostdin", "-i", f"file:{source.absolute()}", *options]
        words += ["-map_metadata", "-1", "-threads", "1", "-fflags", "+bitexact", "-flags", "+bitexact", str(target)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace")
        except FileNotFoundError as error:
            raise UserError("this step needs the command ffmpeg: install FFmpeg") from error
        if done.returncode or not target.exists():
            raise DecodeError(source, (done.stderr.strip().splitlines() or ["FFmpeg wrote nothing"])[-1])
        return target.read_bytes()
