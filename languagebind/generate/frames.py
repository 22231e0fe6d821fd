"""Cut videos into VIDAL's eight frames, resize the clips, and take their sound."""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..config import UserError
from ..data.packing import PackOptions, jpeg
from ..data.vidal import NUM_FRAMES
from ..modalities import DecodeError
from ..modalities._containers import open_stream
from .steps import AUDIO, VIDEO, Entry, FileStep, Made

SILENT = 1e-4  # a track with only smaller samples is counted as silent


@dataclass(frozen=True)
class FrameOptions:
    """Eight frames of each video, and the clip at the size of the frames."""

    frames: Literal["original", "even"] = "original"
    """original: of n frames, i * (n // 8) for i from 0 to 7; even: evenly spaced from first to last, as in training"""
    size: int = 256
    """short side of frames and clips; smaller videos keep their size"""
    clips: bool = True
    """also make the clips"""


@dataclass(frozen=True)
class SoundOptions:
    """The sound of each video."""

    format: Literal["wav", "flac"] = "wav"
    """kind of the files"""
    rate: int | None = 16000
    """samples per second; None: as in the video"""


class Frames(FileStep):
    """Frames as JPEG files, and H.264 clips. Needs FFmpeg for the clips."""

    name = "frames"

    def results(self, entry: Entry) -> list[Path]:
        """Return the folder of the frames and, unless it is the source, the clip."""
        (clip,), frames = entry.places(self.root, "video")
        resized = self.options.clips and clip != entry.video(self.root)
        return [frames[0].parent, *([clip] if resized else [])]

    def make(self, entry: Entry) -> Made:
        video, size, (folder, *clips) = entry.video(self.root), self.options.size, self.results(entry)
        original = (lambda n: np.arange(NUM_FRAMES) * (n // NUM_FRAMES)) if self.options.frames == "original" else None
        frames = VIDEO.read_part(video, 0, choose=original)
        pictures = {f"{k}.jpg": jpeg(frame, PackOptions(frame_size=size)) for k, frame in enumerate(frames)}
        scale = rf"scale=min(iw\,{size}):min(ih\,{size}):force_original_aspect_ratio=increase:force_divisible_by=2"
        h264 = ["-vf", scale, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac"]
        return Made({folder: pictures} | {clip: ffmpeg(video, ".mp4", *h264) for clip in clips})


class Sound(FileStep):
    """Sound as WAV or FLAC files. Videos without a sound track are counted. Needs FFmpeg."""

    name = "sound"

    def results(self, entry: Entry) -> list[Path]:
        return [entry.places(self.root, "audio")[0][0].with_suffix(f".{self.options.format}")]

    def make(self, entry: Entry) -> Made:
        video, (path,) = entry.video(self.root), self.results(entry)
        with open_stream(video, "video") as (container, _):
            if not container.streams.audio:
                return Made(notes=("no sound track",))
        rate = ["-ar", str(self.options.rate)] if self.options.rate else []
        data = ffmpeg(video, path.suffix, "-vn", *rate)
        samples, _ = AUDIO.decode(data)
        return Made({path: data}, notes=("silent",) if samples.abs().max() < SILENT else ())


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
        if "No space left on device" in done.stderr:
            raise UserError(f"cannot write {target}: No space left on device")
        if done.returncode or not target.exists():
            raise DecodeError(source, (done.stderr.strip().splitlines() or ["FFmpeg wrote nothing"])[-1])
        return target.read_bytes()
