"""Four video decoders behind one function. All return the same RGB frames for the same indices.

A backend is a function (source, sorted indices, number of frames) -> K frames, (H, W, 3) bytes each. It opens the file,
decodes on one thread and closes the file. Nothing is kept between samples.
"""

import functools
import importlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ._containers import handle, open_stream
from ._sources import DecodeError, Source

log = logging.getLogger(__name__)

Frames = Sequence[np.ndarray] | np.ndarray


def read_frames(source: Source, indices: np.ndarray, count: int, backend: str) -> Tensor:
    """Return the frames (T, 3, H, W), uint8, at `indices` of a video of `count` frames. Indices may repeat.

    Raises:
        DecodeError: a frame cannot be decoded, or the backend counts the frames differently.
        UserError: the backend is not installed.
    """
    wanted, order = np.unique(indices, return_inverse=True)
    backend = resolve(backend)
    try:
        frames = BACKENDS[backend][1](source, wanted.tolist(), count)
    except (RuntimeError, IndexError) as error:
        raise DecodeError(source, f"{backend}: {str(error).strip().splitlines()[-1]}") from error
    sizes = len({frame.shape for frame in frames})
    if len(frames) != len(wanted) or sizes > 1:
        raise DecodeError(source, f"{backend}: decoded {len(frames)} of {len(wanted)} frames, in {sizes} sizes")
    clip = torch.from_numpy(np.asarray(frames))  # (K, H, W, 3)
    if not np.array_equal(indices, wanted):
        clip = clip[torch.from_numpy(order)]
    return clip.permute(0, 3, 1, 2)


@functools.cache
def resolve(backend: str) -> str:
    """Return the name of the backend to use; `auto` stands for the first backend that can be imported."""
    names = list(BACKENDS) if backend == "auto" else [backend]
    reasons = []
    for name in names:
        try:
            importlib.import_module(BACKENDS[name][0])
        except (ImportError, OSError, RuntimeError) as error:  # torchcodec: RuntimeError without FFmpeg's libraries
            reasons.append(f"{name} ({str(error).strip().splitlines()[0]})")
        else:
            log.info("video backend: %s%s", name, f"; not usable: {', '.join(reasons)}" if reasons else "")
            return name
    raise UserError(f"no usable video backend: {', '.join(reasons)}")


def _torchcodec(source: Source, indices: list[int], count: int) -> Frames:
    from torchcodec.decoders import VideoDecoder

    file = source if isinstance(source, bytes) else handle(source)
    decoder = VideoDecoder(file, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    _same_count(len(decoder), count)
    return decoder.get_frames_at(indices).data.numpy()


def _decord(source: Source, indices: list[int], count: int) -> Frames:
    import decord

    try:
        reader = decord.VideoReader(handle(source), num_threads=1)
        _same_count(len(reader), count)
        frames = reader.get_batch(indices)
        return frames.numpy() if isinstance(frames, Tensor) else frames.asnumpy()  # a tensor after set_bridge("torch")
    except decord.DECORDError as error:
        raise RuntimeError(str(error)) from error


def _pyav(source: Source, indices: list[int], count: int) -> Frames:
    frames = []
    with open_stream(source, "video") as (container, stream):
        for i, frame in enumerate(container.decode(stream)):
            if i in indices:
                # rotation is in degrees counterclockwise; the other backends rotate the picture themselves
                frames.append(np.rot90(frame.to_ndarray(format="rgb24", interpolation="BICUBIC"), frame.rotation // 90))
            if i == indices[-1]:
                break
    return frames


def _opencv(source: Source, indices: list[int], count: int) -> Frames:
    import cv2

    frames = []
    with open_capture(source) as capture:
        # In order from the start, because seeking finds the wrong frame in some codecs
        for i in range(indices[-1] + 1):
            found = capture.grab()
            if found and i in indices:
                found, frame = capture.retrieve()
                frames += [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)] if found else []
            if not found:
                break  # `read_frames` reports the missing frames
    return frames


@contextmanager
def open_capture(source: Source) -> Iterator[Any]:
    """Open a file with OpenCV's `VideoCapture`, on one thread.

    Raises:
        DecodeError: the file cannot be opened, or is interlaced, which OpenCV 5 decodes to noise without an error.
    """
    import cv2

    if isinstance(source, bytes):  # OpenCV opens only paths
        with tempfile.NamedTemporaryFile() as file:
            file.write(source)
            file.flush()
            with open_capture(file.name) as capture:
                yield capture
        return
    with open_stream(source, "video") as (container, stream):
        first = next(container.decode(stream), None)
        if first is not None and first.interlaced_frame:
            raise DecodeError(source, "opencv: interlaced video is not supported; try another --video-backend")
    capture = cv2.VideoCapture(handle(source), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        yield capture
    finally:
        capture.release()


def _same_count(found: int, count: int) -> None:
    # decord also counts the frames that an edit list hides, and misplaces the others
    if found != count:
        raise RuntimeError(f"found {found} frames, expected {count}; try another --video-backend")


# In the order that `auto` tries: exact and maintained; fast; always installed, since it reads the headers; slow
BACKENDS: dict[str, tuple[str, Callable[[Source, list[int], int], Frames]]] = {
    "torchcodec": ("torchcodec.decoders", _torchcodec),
    "decord": ("decord", _decord),
    "pyav": ("av", _pyav),
    "opencv": ("cv2", _opencv),
}
