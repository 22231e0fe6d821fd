"""Video clips: frames spread evenly over the whole clip."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import at_least
from . import check_options, spans
from ._containers import Packets, check_seconds, open_stream, read_packets
from ._images import ImageModality
from ._pictures import to_bytes
from ._sources import DecodeError, Source, read
from ._video_backends import Choose, read_frames

WINDOW_BYTES = 2**28  # of the frames that `windows` holds at once


@dataclass(frozen=True)
class Video(ImageModality):
    """`num_frames` frames, spread evenly from the first to the last frame of a clip. Short clips repeat frames.

    The original LanguageBind code also flipped at random in evaluation, so its features changed from run to run.

    A source is a video file, or a sequence of picture files that are the clip's frames in order. Raw form:
    (num_frames, 3, H, W), uint8. In memory: (T, H, W, 3) or (T, 3, H, W) arrays or tensors of bytes or of floats in
    0..1, or a list of PIL images, of any length T.
    """

    # Frames extracted beforehand are shard members `<key>.<k>.jpg`, passed as a sequence
    extensions = ("mp4", "webm", "mkv", "avi", "mov", "mpg", "ts", "wmv", "flv", "ogv", "jpg", "jpeg", "png")

    num_frames: int = 8
    """Number of frames taken from each clip."""
    frames_per_second: float = 0.0
    """Take this many frames a second. If that is more than num_frames, take num_frames of them, evenly spaced. Shorter
    clips are padded with zeros, which a temporal head leaves out. 0: spread num_frames over the whole clip."""
    video_backend: Literal["auto", "torchcodec", "decord", "pyav", "opencv"] = "auto"
    """Video decoder. auto uses the first of the listed decoders that is installed, and pyav for files whose frames that
    decoder misses. All give the same frames, or an error: see the table in docs/performance.md."""
    max_seconds: float = 3600.0
    """Maximum length in seconds, checked before decoding."""
    interpolation: Literal["bicubic", "bilinear"] = "bilinear"
    """Interpolation in resizing."""
    hflip: float = 0.5
    """Probability of a left-right flip; training only."""
    random_crop: bool = True
    """Crop at a random place instead of the centre; training only."""

    def __post_init__(self):
        super().__post_init__()
        check_options(self, "num_frames", "max_seconds")
        at_least(0, frames_per_second=self.frames_per_second)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (3, self.num_frames, self.image_size, self.image_size)

    def decode(self, source: Source | Sequence[Source]) -> Tensor:
        if not isinstance(source, Source):
            return self._pick(source, self.open_picture)
        if self.num_frames == 1 and is_picture(source):  # one of a sample's frames
            return self._pick([source], self.open_picture)
        packets = self._packets(source)
        return read_frames(source, packets, partial(self.frame_indices, rate=packets.rate), self.video_backend)

    def read_part(self, source: Source, start: float, end: float | None = None, choose: Choose | None = None) -> Tensor:
        """Return frames (T, 3, H, W) from `start` to `end` in seconds; by default those of `frame_indices`.

        Raises `DecodeError` if no frame lies there, or the file cannot be decoded.
        """
        packets = self._packets(source)

        def indices(count: int) -> np.ndarray:
            # Exact fractions, because 1.1 * 10.0 is more than 11 in floating point
            times = (Fraction(str(float(time))) * packets.rate if time is not None else count for time in (start, end))
            first, last = (min(max(math.ceil(time), 0), count) for time in times)
            if last <= first:
                until = "the end" if end is None else f"{end:g} s"
                raise DecodeError(source, f"no frame of {count} lies from {start:g} s to {until}")
            return first + (choose or partial(self.frame_indices, rate=packets.rate))(last - first).flatten()

        return read_frames(source, packets, indices, self.video_backend)

    def windows(self, source: Any, seconds: float) -> Iterator[tuple[float | None, float | None, Any]]:
        packets = self._packets(source)
        times, number = np.subtract(packets.times, packets.times[0]), len(packets.times)
        cut = spans(times[-1] * number / max(1, number - 1), seconds)  # the last frame is shown, too
        starts = np.searchsorted(times, [start or 0.0 for start, _ in cut]).clip(max=number - 1)
        picked = [low + self.frame_indices(max(1, high - low), packets.rate)  # if none lies there, the next one
                  for low, high in pairwise([*starts, number])]  # fmt: skip
        step = max(1, WINDOW_BYTES // (self.num_frames * math.prod(packets.shape) * 3))
        for begin in range(0, len(cut), step):
            some = picked[begin : begin + step]
            # Decoding may find another number of frames
            choose = partial(lambda indices, count: indices * count // number, np.concatenate(some))
            frames = read_frames(source, packets, choose, self.video_backend).split([*map(len, some)])
            yield from ((*span, raw) for span, raw in zip(cut[begin:], frames, strict=False))

    def header_seconds(self, source: Source) -> float:
        """Return a video's length by its header. Raises `DecodeError` if it is not a video or exceeds the limits."""
        with open_stream(source, "video") as (container, stream):
            self.check_size(source, stream.codec_context.width, stream.codec_context.height)
            seconds = (container.duration or 0) / 1e6  # from microseconds
        check_seconds(source, seconds, self.max_seconds)
        return seconds

    def _packets(self, source: Source) -> Packets:
        return read_packets(source, "video", self.max_seconds, lambda x: self.check_size(source, x.width, x.height))

    def from_memory(self, value: Any) -> Tensor:
        value = value.asnumpy() if hasattr(value, "asnumpy") else value  # frames of decord
        if not isinstance(value, (list, tuple)) and getattr(value, "ndim", 0) != 4:
            raise DecodeError(value, "expected a path, bytes, (T, H, W, 3), (T, 3, H, W) or a list of pictures")
        return self._pick(value, lambda frame: frame)

    def transform(self, raw: Tensor, rng: torch.Generator | None = None) -> Tensor:
        x = self.fit(raw, rng)
        return F.pad(x, (0, 0, 0, 0, 0, self.num_frames - x.shape[1])) if self.frames_per_second else x

    def picture(self, raw: Tensor) -> tuple[Tensor, str]:
        """Draw the middle frames of the four quarters of the clip, or one middle frame of a clip below four frames."""
        count = len(raw)
        if count < 4:
            return to_bytes(raw[count // 2]), f"frame {count // 2 + 1} of {count}"
        chosen = [(2 * quarter + 1) * count // 8 for quarter in range(4)]
        gap = max(1, raw.shape[3] // 60)  # a grey line between the frames
        frames = [F.pad(to_bytes(raw[i]), (0, gap, 0, gap), value=128) for i in chosen]
        grid = torch.cat([torch.cat(frames[:2], dim=2), torch.cat(frames[2:], dim=2)], dim=1)
        return grid[:, :-gap, :-gap], f"frames {', '.join(str(i + 1) for i in chosen)} of {count}"

    def frame_indices(self, count: int, rate: Fraction | None = None) -> np.ndarray:
        """Return the indices of the frames taken from a clip of `count` frames, with `rate` frames per second."""
        if not self.frames_per_second:
            return np.linspace(0, count - 1, self.num_frames, dtype=int)  # as in the original code
        step = max(1, int(int(rate) / self.frames_per_second)) if rate else 1  # as CLIP4Clip does
        found = np.arange(0, count, step)
        return found[np.linspace(0, len(found) - 1, min(len(found), self.num_frames), dtype=int)]

    def _pick(self, frames: Any, load: Callable[[Any], Any]) -> Tensor:
        """Return the chosen frames (num_frames, 3, H, W) of a sequence or array; load no others."""
        if len(frames) == 0:
            raise DecodeError(frames, "the clip has no frames")
        indices = self.frame_indices(len(frames)).tolist()
        loaded = {i: self.check(self.pixels(load(frames[i])), frames).permute(1, 2, 0) for i in sorted(set(indices))}
        sizes = {tuple(frame.shape) for frame in loaded.values()}
        if len(sizes) > 1:
            raise DecodeError(frames, f"the frames differ in size: {sorted(sizes)}")
        return torch.stack([loaded[i] for i in indices]).permute(0, 3, 1, 2)  # channels last in memory, like pictures


def is_picture(source: Source) -> bool:
    """Tell whether a file is a JPEG, PNG or WebP, by its first bytes."""
    head = read(source, first=12)
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG")) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
