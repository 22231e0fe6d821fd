"""Four decoders behind one function: frames by index, in RGB, the same ones from each.

A backend is a function (source, sorted indices, number of frames) -> K frames, (H, W, 3) bytes each. It opens the file,
decodes on one thread and closes it; nothing lives on from one sample to the next.
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
from . import DecodeError, Source
from ._containers import handle, open_stream

log = logging.getLogger(__name__)


def read_frames(source: Source, indices: np.ndarray, count: int, backend: str) -> Tensor:
    """Frames `indices`, in that order and repeated where they repeat, of a video with `count`: (T, 3, H, W), uint8.

    Raises:
        DecodeError: a frame cannot be decoded, or the backend counts frames differently.
        UserError: the backend is not installed.
    """
    wanted, order = np.unique(indices, return_inverse=True)
    backend = resolve(backend)
    try:
        frames = BACKENDS[backend][1](source, wanted.tolist(), count)
    except (RuntimeError, IndexError) as error:
        raise DecodeError(source, f"{backend}: {str(error).strip().splitlines()[-1]}") from error
    if len(frames) != len(wanted) or len({frame.shape for frame in frames}) > 1:
        raise DecodeError(source, f"{backend}: gave {len(frames)} of {len(wanted)} frames, or of several sizes")
    clip = torch.from_numpy(np.asarray(frames))  # (K, H, W, 3)
    if not np.array_equal(indices, wanted):
        clip = clip[torch.from_numpy(order)]
    return clip.permute(0, 3, 1, 2)


@functools.cache
def resolve(backend: str) -> str:
    """The backend that a `--video-backend` means in this process: `auto` is the first one that can be imported."""
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


def _torchcodec(source: Source, indices: list[int], count: int) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    file = source if isinstance(source, bytes) else handle(source)
    decoder = VideoDecoder(file, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    _same_count(len(decoder), count)
    return decoder.get_frames_at(indices).data.numpy()


def _decord(source: Source, indices: list[int], count: int) -> np.ndarray:
    import decord

    try:
        reader = decord.VideoReader(handle(source), num_threads=1)
        _same_count(len(reader), count)
        return reader.get_batch(indices).asnumpy()
    except decord.DECORDError as error:
        raise RuntimeError(str(error)) from error


def _pyav(source: Source, indices: list[int], count: int) -> list[np.ndarray]:
    frames = []
    with open_stream(source, "video") as (container, stream):
        for i, frame in enumerate(container.decode(stream)):
            if i in indices:
                # rotation: degrees to turn the picture counterclockwise; the other backends do it by themselves
                frames.append(np.rot90(frame.to_ndarray(format="rgb24", interpolation="BICUBIC"), frame.rotation // 90))
            if i == indices[-1]:
                break
    return frames


def _opencv(source: Source, indices: list[int], count: int) -> list[np.ndarray]:
    import cv2

    frames = []
    with open_capture(source) as capture:
        # In order from the start: setting a position lands on the wrong frame in some codecs
        for i in range(indices[-1] + 1):
            found, frame = capture.grab(), None
            if found and i in indices:
                found, frame = capture.retrieve()
            if not found:
                raise RuntimeError(f"frame {i} of {count} cannot be read")
            if frame is not None:
                frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    return frames


@contextmanager
def open_capture(source: Source) -> Iterator[Any]:
    """OpenCV's `VideoCapture` of a file, on one thread.

    Raises:
        DecodeError: it is interlaced, which OpenCV 5 gives as noise without an error, or cannot be opened.
    """
    import cv2

    if isinstance(source, bytes):  # OpenCV opens names only
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
    # decord counts, and misplaces, the frames that an edit list hides
    if found != count:
        raise RuntimeError(f"it sees {found} frames where {count} are shown; try another --video-backend")


# In the order in which `auto` tries them: exact and maintained, fast, always there (it reads the headers), and slow
BACKENDS: dict[str, tuple[str, Callable[[Source, list[int], int], Sequence[np.ndarray]]]] = {
    "torchcodec": ("torchcodec.decoders", _torchcodec),
    "decord": ("decord", _decord),
    "pyav": ("av", _pyav),
    "opencv": ("cv2", _opencv),
}
