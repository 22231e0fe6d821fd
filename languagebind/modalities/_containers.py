"""Headers and packets of media containers, read with PyAV before anything is decoded."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from ._sample_table import sample_table
from ._sources import DecodeError, Source, file_size

IN_PYTHON = "; in Python, pass max_seconds to load() or encode()"
Kind = Literal["video", "audio"]
VP8_SHOWN = 16  # bit of the first byte of a VP8 frame; it is 0 in frames to which only others refer


@dataclass
class Packets:
    """The packets of a stream that are shown. For video, also how the decoded frames become the frames shown."""

    times: list[float]  # when the frames are shown, in seconds, in order
    unclear: str = ""  # why the frames may differ from the packets in number or time; empty if they do not
    countable: bool = False  # a frame can be found by counting from the key frame before it
    rate: Fraction = Fraction(0)  # mean number of frames per second, by the header
    stream: int = 0
    leads: bool = True  # the stream is the first video stream of the file
    shape: tuple[int, int] = (0, 0)  # height and width of the first frame as it is shown
    rotation: int = 0  # degrees counterclockwise by which a frame is turned to be shown: 0, 90, 180 or 270
    mirrored: bool = False


def read_packets(
    source: Source, kind: Kind, max_seconds: float, check: Callable[[Any], None] = lambda codec: None
) -> Packets:
    """Read the times of a stream's packets. Of a video, decode the first frame.

    Raises `DecodeError` if the stream is missing or longer than `max_seconds`, or the file is truncated; so may
    `check`, which gets the stream's codec context (width, height, ...).
    """
    import av

    with open_stream(source, kind) as (container, stream):
        codec, form, first = stream.codec_context, container.format.name, None
        begin, stated = (container.start_time or 0) / 1e6, (container.duration or 0) / 1e6  # from microseconds
        check_seconds(source, stated - begin, max_seconds)  # Matroska and fragmented MP4 count from 0
        check(codec)
        found: Any = []  # the time, whether it is a key frame and whether it is hidden, of each packet
        ends: dict[int, int] = {}
        hidden = 0
        counted = kind == "video" and form.startswith("mov") and stream.frames > 0  # MP4 states its number of packets
        for other in container.streams:
            if counted and other is not stream:
                other.discard = av.stream.Discard.all
        for packet in container.demux():
            if packet.is_corrupt and form != "mpegts":  # there, it may only mean that segments were joined
                raise DecodeError(source, "the file is truncated within a packet")
            if not packet.size:
                continue
            track, time = packet.stream_index, packet.pts
            if time is not None:
                ends[track] = max(ends.get(track, 0), time + ticks_of(packet))
            if track == stream.index and not (codec.name == "vp8" and not memoryview(packet)[0] & VP8_SHOWN):
                found.append((time, packet.is_keyframe, packet.is_discard))
                hidden += packet.is_discard  # an edit list hides the frames before a cut
                if kind == "video" and first is None:
                    with suppress(av.error.InvalidDataError):  # a recording may begin before its first key frame
                        first = next(iter(packet.decode()), None)
                    if first and counted and (rows := _without_reading(source, stream, found)) is not None:
                        found, ends[track] = rows, int(rows[:, 0].max())
                        break
        end = max((float(ticks * container.streams[track].time_base) for track, ticks in ends.items()), default=0.0)
        length = end - begin
        # All formats except MP3 and raw AAC state their duration, but it is rounded, and the last packet may lack a
        # duration. Both numbers are wrong if an edit list hides packets. A packet of PCM holds many of its frames.
        missing = form.startswith("mov") and not codec.name.startswith("pcm") and len(found) < stream.frames
        known = form.startswith(("mov", "matroska", "avi")) and not counted
        if not hidden and (missing or (known and length < 0.9 * (stated - begin) - 0.5)):
            raise DecodeError(source, f"the file is truncated after {len(found)} packets, {length:.1f} s")
        check_seconds(source, length, max_seconds)
        if len(found) == hidden:
            raise DecodeError(source, f"the {kind} stream is empty")
        if kind == "audio":
            return Packets([0.0] * (len(found) - hidden))
        if first := first or next(iter(codec.decode()), None):  # some decoders hold frames until the end
            return _describe(container, stream, found, first)
        raise DecodeError(source, "no frame can be decoded")


def _without_reading(source: Source, stream: Any, found: list[tuple[Any, ...]]) -> np.ndarray | None:
    """Return `found` for all packets of an MP4, from its first packets and its sample table.

    None if the file is truncated, the edit list hides packets, or FFmpeg's index or packets differ from the table.
    """
    entries, file = stream.index_entries, handle(source)
    with open(file, "rb") if isinstance(file, str) else file as opened:
        table = sample_table(opened, stream.id, len(entries))
    if table is None:
        return None
    decoded, shown, keys = table.T
    rows = np.stack([shown - shown[0] + (found[0][0] or 0), keys, np.zeros_like(keys)], axis=1).astype(float)
    last = entries[-1]
    hides = any(entries[int(i)].is_discard for i in (shown.argmin(), shown.argmax()))
    agrees = last.timestamp - entries[0].timestamp == decoded[-1] and np.array_equal(rows[: len(found)], found)
    return rows if agrees and not hides and last.pos + last.size <= file_size(source) else None


def _describe(container: Any, stream: Any, found: Any, first: Any) -> Packets:
    form, codec, streams = container.format.name, stream.codec_context, container.streams.video
    ticks, keys, hidden = np.array(found, float).T  # the time is NaN where a packet states none
    keys, hidden = keys.astype(bool), hidden.astype(bool)
    times = np.sort(ticks[~hidden]) * float(stream.time_base)
    later = np.minimum.accumulate(ticks[::-1])[::-1]  # the earliest time from each packet on
    unclear = "" if keys[0] and ticks[0] == later[0] else "the file does not begin with a key frame"
    # torchcodec takes full range for limited; one packet holds the palette; all frames of AVI without an index seem key
    full = first.color_range == 2 and not (first.format.is_rgb or first.format.name.startswith("yuvj"))
    sparse = form == "avi" and keys.all() and not codec.codec.intra_only
    if full or sparse or first.format.name == "pal8":
        unclear = "the file has full-range colours, a palette or no index"
    # AVI states no times, a file made from AVI may state those of decoding, and joined parts may overlap
    may = codec.name == "mpeg4" or not form.startswith("mov")
    as_decoded = codec.has_b_frames and (form == "avi" or (may and (np.diff(ticks) > 0).all()))
    if as_decoded or not ((np.diff(times) > 0).all() and (ticks == np.maximum.accumulate(ticks))[keys].all()):
        unclear = "the file does not state when each frame is shown"
    # Elsewhere, decord does not find the key frames
    countable = form.startswith(("mov", "matroska", "avi")) and len(streams) == 1 and bool((ticks == later)[keys].all())
    rotation = round(first.rotation / 90) * 90 % 360
    shape = (first.width, first.height) if rotation % 180 else (first.height, first.width)
    matrix = first.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist() if matrix is not None else (1, 0, 0, 0, 1)
    rate, leads = Fraction(stream.average_rate or 0), stream is streams[0]
    return Packets(times.tolist(), unclear, countable, rate, stream.index, leads, shape, rotation, a * d < b * c)


def ticks_of(packet: Any) -> int:
    """Return a packet's duration. FFmpeg wraps negative ones to 32 bits: of a last packet that is cut short, in Ogg."""
    return ((packet.duration or 0) + 2**31) % 2**32 - 2**31


def check_seconds(source: Any, seconds: float, max_seconds: float) -> None:
    """Raise `DecodeError` if a clip is longer than `max_seconds`."""
    if seconds > max_seconds:
        raise DecodeError(source, f"the length of {seconds:.0f} s exceeds --max-seconds {max_seconds:g}{IN_PYTHON}")


@contextmanager
def open_stream(source: Source, kind: Kind) -> Iterator[tuple[Any, Any]]:
    """Open a container and a stream of a kind, on one thread; turn FFmpeg's errors into `DecodeError`.

    Of several streams, take the default one, then the largest (the most channels), then the first, as `ffmpeg` does.
    """
    import av

    file_size(source)
    try:
        with av.open(handle(source), metadata_errors="replace") as container:
            if container.format.name.endswith("_pipe") or container.format.name in ("image2", "tty"):
                article = "an" if kind == "audio" else "a"
                raise DecodeError(source, f"not {article} {kind} file, but {container.format.name}")
            streams = [s for s in getattr(container.streams, kind) if not s.disposition & s.disposition.attached_pic]
            stream = max(streams, key=_rank, default=None)
            if stream is None or stream.codec_context is None:
                raise DecodeError(source, "the codec is unknown" if streams else f"no {kind} stream")
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        raise DecodeError(source, error.strerror or str(error)) from error


def _rank(stream: Any) -> tuple[bool, int]:
    codec = stream.codec_context
    size = 0 if codec is None else codec.width * codec.height if stream.type == "video" else codec.channels
    return bool(stream.disposition & stream.disposition.default), size


def handle(source: Source) -> Any:
    """Return a file object or an absolute path for the decoders, because FFmpeg reads `a:b.mp4` as a URL."""
    return io.BytesIO(source) if isinstance(source, bytes) else os.path.join(os.getcwd(), source)
