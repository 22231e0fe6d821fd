"""Video clips whose frames show their numbers."""

import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

FRAMES, HEIGHT, WIDTH = 60, 64, 128


def numbered(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A colourful picture that holds its number as eight black or white bars: (H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([x * 2 + number, y * 4, 255 - x], -1).astype(np.uint8)
    for bit in range(8):
        picture[height // 2 :, bit * width // 8 : (bit + 1) * width // 8] = 255 * (number >> bit & 1)
    return picture


def numbers(frames: torch.Tensor) -> list[int]:
    """The numbers in (T, 3, H, W) frames of `numbered`."""
    width = frames.shape[-1] // 8
    bars = frames[:, :, frames.shape[-2] * 3 // 4].float().mean(1)  # (T, W)
    bits = [bars[:, bit * width + width // 2] > 128 for bit in range(8)]
    return sum(b.int() << bit for bit, b in enumerate(bits)).tolist()


def write(
    form="mp4", codec="libx264", count=FRAMES, times=None, sound=False, mux=None, height=HEIGHT, width=WIDTH,
    picture=numbered, **options
) -> bytes:  # fmt: skip
    """A clip of numbered frames; H.264 has B-frames, and a key frame every 25. `times` in milliseconds."""
    options = ({"bf": "3", "g": "25", "crf": "10"} if codec == "libx264" else {"g": "25", "b": "5000000"}) | options
    base = Fraction(1, 1000 if times else 25)
    with tempfile.NamedTemporaryFile() as file, av.open(file.name, "w", format=form, options=mux or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = width, height, "yuv420p", base
        voice = container.add_stream("aac", rate=16000) if sound else None
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24")
            frame.pts, frame.time_base = (times or range(count))[number], base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.rate = 16000
            container.mux(voice.encode(samples))
            container.mux(voice.encode())
        container.close()
        return Path(file.name).read_bytes()
