"""Headers and packets of media containers, read with PyAV before anything is decoded."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ._sources import DecodeError, Source, file_size

Kind = Literal["video", "audio"]


def count_frames(
    source: Source, kind: Kind, max_seconds: float, check: Callable[[Any], None] = lambda codec: None
) -> int:
    """Return the number of shown packets of a stream, without decoding. For video, this is the number of frames.

    Args:
        check: function that gets the stream's codec context (width, height, ...) and may raise `DecodeError`.

    Raises:
        DecodeError: the stream is missing or longer than `max_seconds`, or the file is truncated.
    """
    with open_stream(source, kind) as (container, stream):
        check_seconds(source, (container.duration or 0) / 1e6, max_seconds)  # from microseconds
        check(stream.codec_context)
        packets = shown = 0
        end = 0.0
        for packet in container.demux():
            if packet.is_corrupt:
                raise DecodeError(source, "the file is truncated within a packet")
            if packet.size and packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.size and packet.stream is stream:
                packets += 1
                shown += not packet.is_discard  # an edit list hides the frames before a cut
        form, length = container.format.name, end - (container.start_time or 0) / 1e6
        # MP4 stores its number of packets. All formats except MP3 and raw AAC store their duration, but it is rounded,
        # and the last packet may lack a duration. Both numbers are wrong if an edit list hides packets.
        missing = form.startswith("mov") and packets < stream.frames
        stated = container.duration or 0 if form.startswith(("mov", "matroska", "avi")) else 0
        if packets == shown and (missing or length < 0.9 * stated / 1e6 - 0.5):
            raise DecodeError(source, f"the file is truncated after {packets} packets, {length:.1f} s")
        check_seconds(source, length, max_seconds)
    if not shown:
        raise DecodeError(source, f"the {kind} stream is empty")
    return shown


def check_seconds(source: Any, seconds: float, max_seconds: float) -> None:
    """Raise `DecodeError` if a clip is longer than `max_seconds`."""
    if seconds > max_seconds:
        raise DecodeError(source, f"the length of {seconds:.0f} s exceeds --max-seconds {max_seconds:g}")


@contextmanager
def open_stream(source: Source, kind: Kind) -> Iterator[tuple[Any, Any]]:
    """Open a container and its first stream of a kind, on one thread; turn FFmpeg's errors into `DecodeError`."""
    import av

    file_size(source)
    try:
        with av.open(handle(source), metadata_errors="replace") as container:
            if container.format.name.endswith("_pipe") or container.format.name in ("image2", "tty"):
                raise DecodeError(source, f"not a {kind} file, but {container.format.name}")
            streams = [s for s in getattr(container.streams, kind) if not s.disposition & s.disposition.attached_pic]
            if not streams or streams[0].codec_context is None:
                raise DecodeError(source, "the codec is unknown" if streams else f"no {kind} stream")
            streams[0].codec_context.thread_count = 1
            yield container, streams[0]
    except av.FFmpegError as error:
        raise DecodeError(source, error.strerror or str(error)) from error


def handle(source: Source) -> Any:
    """Return a file object or an absolute path for the decoders, because FFmpeg reads `a:b.mp4` as a URL."""
    return io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(os.fspath(source))
