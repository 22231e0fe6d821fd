"""What a media container's header and packets say, read with PyAV before anything is decoded."""

import io
import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Literal

from . import DecodeError, Source
from ._checks import file_size

Kind = Literal["video", "audio"]


def count_frames(
    source: Source, kind: Kind, max_seconds: float, check: Callable[[Any], None] = lambda codec: None
) -> int:
    """Frames that a stream shows, counted by its packets: for video the exact number, before any decoding.

    Args:
        check: is given the stream's codec context (its width, height, sample rate...), and may raise `DecodeError`.

    Raises:
        DecodeError: no such stream, longer than `max_seconds`, or the file ends before its header says.
    """
    with open_stream(source, kind) as (container, stream):
        if (container.duration or 0) / 1e6 > max_seconds:  # microseconds
            raise DecodeError(source, f"{container.duration / 1e6:.0f} s are more than --max-seconds {max_seconds:g}")
        check(stream.codec_context)
        packets = shown = 0
        end = 0.0
        for packet in container.demux():
            if packet.is_corrupt:
                raise DecodeError(source, "cut off in the middle of a packet")
            if packet.size and packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.size and packet.stream is stream:
                packets += 1
                shown += not packet.is_discard  # an edit list hides the frames before a cut
        form, length = container.format.name, end - (container.start_time or 0) / 1e6
        # MP4 knows its number of packets; all but MP3 and raw AAC state their duration, though rounded, and the last
        # packet may not know its own. Neither holds where an edit list hides packets.
        missing = form.startswith("mov") and packets < stream.frames
        stated = container.duration or 0 if form.startswith(("mov", "matroska", "avi")) else 0
        if packets == shown and (missing or length < 0.9 * stated / 1e6 - 0.5):
            raise DecodeError(source, f"cut off after {packets} packets, {length:.1f} s")
        if length > max_seconds:
            raise DecodeError(source, f"{length:.0f} s are more than --max-seconds {max_seconds:g}")
    if not shown:
        raise DecodeError(source, f"the {kind} stream is empty")
    return shown


@contextmanager
def open_stream(source: Source, kind: Kind):
    """The container and its first stream of a kind, decoded on one thread; FFmpeg's errors become `DecodeError`."""
    import av

    file_size(source)
    try:
        with av.open(handle(source), metadata_errors="replace") as container:
            if container.format.name.endswith("_pipe") or container.format.name in ("image2", "tty"):
                raise DecodeError(source, f"not a {kind} file but {container.format.name}")
            streams = [s for s in getattr(container.streams, kind) if not s.disposition & s.disposition.attached_pic]
            if not streams:
                raise DecodeError(source, f"no {kind} stream")
            if streams[0].codec_context is None:
                raise DecodeError(source, "the codec is unknown")
            streams[0].codec_context.thread_count = 1
            yield container, streams[0]
    except av.FFmpegError as error:
        raise DecodeError(source, error.strerror or str(error)) from error


def handle(source: Source) -> Any:
    """What decoders open: a file object, or an absolute path, in which FFmpeg cannot mistake `a:b.mp4` for a URL."""
    return io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(os.fspath(source))
