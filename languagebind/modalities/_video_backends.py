"""Four video decoders behind one function. For the same indices, all return the same RGB frames, or an error.

torchcodec and decord find frames by index, so the times of their frames are compared with those of the packets. PyAV
and OpenCV decode a file in order. Each opens the file, decodes on one thread and closes the file; nothing is kept
between samples.
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
from ._containers import Packets, handle, open_stream
from ._sources import DecodeError, Source, describe

log = logging.getLogger(__name__)

Frames = Sequence[np.ndarray] | np.ndarray
Choose = Callable[[int], np.ndarray]
TOLERANCE = 1e-3  # seconds; decord's times are float32


def read_frames(source: Source, packets: Packets, choose: Choose, backend: str) -> Tensor:
    """Return frames (T, 3, H, W), uint8, of a video.

    From the number of frames in the file, `choose` returns the indices (T,) of the wanted ones, which may repeat. Where
    the first backend of `auto` fails or returns frames of other times, PyAV decodes the file in order. Raises
    `DecodeError` if a frame cannot be decoded, or the given backend returns frames of other times. Raises `UserError`
    if the backend is not installed.
    """
    name = resolve(backend)
    try:
        if name in IN_ORDER:
            frames, indices = _in_order(source, packets, choose, IN_ORDER[name])
        else:
            indices = choose(len(packets.times))
            frames = _seek(source, packets, np.unique(indices).tolist(), SEEKING[name])
    except (RuntimeError, IndexError) as error:
        reason = f"{name}: {str(error).strip().splitlines()[-1]}"
        if backend != "auto" or name in IN_ORDER:
            raise DecodeError(source, f"{reason}; try another --video-backend") from error
        _report_fallback(name)
        log.debug("%s: %s; PyAV decodes it in order", describe(source), reason)
        name = "pyav"
        frames, indices = _in_order(source, packets, choose, _pyav)
    wanted, order = np.unique(indices, return_inverse=True)
    sizes = len({frame.shape for frame in frames})
    if len(frames) != len(wanted) or sizes > 1:
        raise DecodeError(source, f"{name}: decoded {len(frames)} of {len(wanted)} frames, in {sizes} sizes")
    clip = torch.from_numpy(np.asarray(frames))  # (K, H, W, 3)
    if packets.mirrored:  # the decoders only turn frames
        clip = clip.flip(2 if packets.rotation % 180 else 1)
    if not np.array_equal(indices, wanted):
        clip = clip[torch.from_numpy(order)]
    return clip.permute(0, 3, 1, 2)


@functools.cache  # once a process
def _report_fallback(name: str) -> None:
    log.info("PyAV decodes videos that %s misses in order, which is slower; the log level DEBUG names them", name)


@functools.cache
def resolve(backend: str) -> str:
    """Return the name of the backend to use; `auto` stands for the first backend that can be imported."""
    names = list(BACKENDS) if backend == "auto" else [backend]
    reasons = []
    for name in names:
        try:
            importlib.import_module(BACKENDS[name])
        except (ImportError, OSError, RuntimeError) as error:  # torchcodec: RuntimeError without FFmpeg's libraries
            reasons.append(f"{name} ({str(error).strip().splitlines()[0]})")
        else:
            log.info("video backend: %s%s", name, f"; not usable: {', '.join(reasons)}" if reasons else "")
            return name
    raise UserError(f"no usable video backend: {', '.join(reasons)}")


def _seek(source: Source, packets: Packets, indices: list[int], find: Callable[..., Any]) -> Frames:
    """Return the frames at sorted indices, found by a decoder. Raises `RuntimeError` if it returns other frames."""
    if packets.unclear:
        raise RuntimeError(packets.unclear)
    frames, times = find(source, packets, indices)
    if not np.allclose(times, [packets.times[i] for i in indices], rtol=0, atol=TOLERANCE):
        raise RuntimeError("the frames are not those of the times asked for")
    if frames.shape[1:3] != packets.shape:
        raise RuntimeError("the frames differ in size or are not turned")
    return frames


def _torchcodec(source: Source, packets: Packets, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    file = source if isinstance(source, bytes) else handle(source)
    decoder = VideoDecoder(
        file, stream_index=packets.stream, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
    )
    _same_count(len(decoder), packets)
    if (getattr(decoder.metadata, "rotation", None) or 0) % 360 != packets.rotation:
        raise RuntimeError("the frames are not turned")
    frames = decoder.get_frames_at(indices)
    return frames.data.numpy(), frames.pts_seconds.numpy()


def _decord(source: Source, packets: Packets, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
    import decord

    try:
        reader = decord.VideoReader(handle(source), num_threads=1)
        _same_count(len(reader), packets)
        # Its times are those of its index, not of the decoded frames, so they do not show that it counted wrongly
        if not packets.countable:
            raise RuntimeError("frames cannot be counted from the key frames of this file")
        frames, times = reader.get_batch(indices), reader.get_frame_timestamp([0, *indices])[:, 0]
    except decord.DECORDError as error:
        raise RuntimeError(str(error)) from error
    frames = frames.numpy() if isinstance(frames, Tensor) else frames.asnumpy()  # a tensor after set_bridge("torch")
    return frames, times[1:] - times[0] + packets.times[0]


def _same_count(found: int, packets: Packets) -> None:
    if found != len(packets.times):
        raise RuntimeError(f"found {found} frames, expected {len(packets.times)}")


def _in_order(source: Source, packets: Packets, choose: Choose, decode: Callable[..., Any]) -> tuple[Frames, Any]:
    """Return the chosen frames and their indices, decoding a file from its start.

    If the number or times of the frames differ from those of the packets, the frames are counted, and chosen again.
    """
    count, known = len(packets.times), not packets.unclear
    while True:
        indices = choose(count)
        wanted, frames, found = set(indices.tolist()), [], 0
        for i, (time, picture) in enumerate(decode(source, packets)):
            found += 1
            if i in wanted:
                known = known and (time is None or abs(time - packets.times[i]) < TOLERANCE)
                frames.append(picture())
            if known and len(frames) == len(wanted):
                return frames, indices
        if known or found in (0, count):
            return frames, indices
        count = found


def _pyav(source: Source, packets: Packets) -> Iterator[tuple[float | None, Callable[[], np.ndarray]]]:
    with open_stream(source, "video") as (container, stream):
        for frame in container.decode(stream):
            yield frame.time, functools.partial(_upright, frame, packets.rotation)


def _upright(frame: Any, rotation: int) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24", interpolation="BICUBIC"), rotation // 90)


def _opencv(source: Source, packets: Packets) -> Iterator[tuple[None, Callable[[], np.ndarray]]]:
    import cv2

    if not packets.leads:
        raise RuntimeError("only the first video stream can be read")

    def picture() -> np.ndarray:
        found, frame = capture.retrieve()
        if not found:
            raise RuntimeError("a frame cannot be decoded")
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    with open_capture(source) as capture:
        if -capture.get(cv2.CAP_PROP_ORIENTATION_META) % 360 != packets.rotation:  # clockwise
            raise RuntimeError("the frames are not turned")
        while capture.grab():
            yield None, picture


@contextmanager
def open_capture(source: Source) -> Iterator[Any]:
    """Open a file with OpenCV, on one thread, or raise `DecodeError` if OpenCV 5 would decode it wrongly."""
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
        if first is not None and (first.interlaced_frame or first.color_primaries > 7 or first.color_trc in (16, 18)):
            raise DecodeError(source, "opencv: interlaced, HDR and wide-gamut video needs another --video-backend")
    capture = cv2.VideoCapture(handle(source), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        yield capture
    finally:
        capture.release()


# In the order that `auto` tries: exact and maintained; fast; always installed, since it reads the headers; slow
BACKENDS = {"torchcodec": "torchcodec.decoders", "decord": "decord", "pyav": "av", "opencv": "cv2"}
SEEKING: dict[str, Callable[..., Any]] = {"torchcodec": _torchcodec, "decord": _decord}
IN_ORDER: dict[str, Callable[..., Any]] = {"pyav": _pyav, "opencv": _opencv}
