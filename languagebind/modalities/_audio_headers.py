"""Check what the headers of sound files say: decoders believe them, and would leave out what they do not cover."""

import zlib
from itertools import pairwise
from typing import Literal

# Of files made of chunks: place of the first chunk, bytes of a size, their order, and name of the chunk of samples
_RIFF: tuple[int, int, Literal["little", "big"], bytes] = (12, 4, "little", b"data")
_LAYOUTS = {b"RIFF": _RIFF, b"RF64": _RIFF, b"BW64": _RIFF, b"FORM": (12, 4, "big", b"SSND"),
            b"caff": (8, 8, "big", b"data")}  # fmt: skip

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # each byte with its bits in reverse


def close_header(data: bytes) -> bytes | None:
    """Return a WAV or CAF file with the sizes filled in that were unknown when it was written, as to a pipe.

    Return other files unchanged, and None if the file ends before the samples that its header promises.
    """
    magic = data[:4]
    layout = _LAYOUTS.get(magic)
    if layout is None or (magic != b"caff" and data[8:12] not in (b"WAVE", b"AIFF", b"AIFC")):
        return data
    _, width, order, _ = layout
    at, size = _sample_chunk(data, *layout)
    there, whole = len(data) - at, int.from_bytes(data[4:8], order)
    # The size of a WAV file is unknown as well, or ends it before the samples
    unknown = _is_open(size, width) and (magic == b"caff" or _is_open(whole, 4) or whole + 8 <= at)
    if not unknown or there < 0 or magic == b"FORM":
        return data if size <= there else None
    head = data[: at - width]
    if magic != b"caff":  # the sizes of RF64 count only if they are needed
        head = b"RIFF" + min(len(data) - 8, 2**32 - 1).to_bytes(4, order) + head[8:]
    return head + min(there, 2 ** (8 * width) - 1).to_bytes(width, order) + data[at:]


def _sample_chunk(data: bytes, at: int, width: int, order: Literal["little", "big"], wanted: bytes) -> tuple[int, int]:
    """Return the place and the size of the samples, or a place beyond the end."""
    long_size = 0
    while at + 4 + width <= len(data):
        chunk, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 4 + width], order)
        if chunk == b"ds64":  # RF64: the second number here is the sample chunk's size in 64 bits
            long_size = int.from_bytes(data[at + 16 : at + 24], order)
        at += 4 + width
        if chunk == wanted:
            return at, long_size or size
        at += size + (size % 2 if width == 4 else 0)
    return len(data) + 1, 0


def _is_open(size: int, width: int) -> bool:
    """Tell whether a size stands for an unknown one: 0, or about the largest signed or unsigned number (-1)."""
    largest = 2 ** (8 * width)
    return size == 0 or largest - size <= 4096 or abs(largest // 2 - size) <= 4096


def split_joined(data: bytes) -> list[bytes] | None:
    """Return the WAV files or the Ogg files that were joined to one (`cat a b`, web radio); [data] for other files.

    Return None if a page of an Ogg file is incomplete or damaged.
    """
    if data[:4] == b"OggS":
        return _split_ogg(data)
    parts = []
    while data[:4] == b"RIFF":
        end = 8 + int.from_bytes(data[4:8], "little")
        end += end % 2
        if data[end : end + 4] != b"RIFF" or not data[8:12] == data[end + 8 : end + 12] == b"WAVE":
            break
        parts.append(data[:end])
        data = data[end:]
    return [*parts, data]


def _split_ogg(data: bytes) -> list[bytes] | None:
    at, end, starts, first, continues = 0, 0, [0], True, False
    while (at := data.find(b"OggS", at)) >= 0:
        header = data[at : at + 27]  # byte 5: flags; bytes 22 to 25: checksum; byte 26: number of segments
        sizes = data[at + 27 : at + 27 + header[-1]]
        end = at + 27 + header[-1] + sum(sizes)
        if end > len(data) or _ogg_checksum(data[at : at + 22] + bytes(4) + data[at + 26 : end]) != header[22:26]:
            return None
        was_first, first = first, bool(header[5] & 2)  # of a stream; streams of one file begin together
        starts += [at] if first and not was_first else []
        continues = sizes[-1:] == b"\xff" and not header[5] & 4  # the last page may lack the mark of the last
        at = end
    return None if continues else [data[a:b] for a, b in pairwise([*starts, end])]


def _ogg_checksum(page: bytes) -> bytes:
    """Return zlib's CRC with the order of all bits reversed, and without its inversions."""
    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(_REVERSED)


def exceeds_header(data: bytes) -> bool | None:
    """Tell whether MPEG audio (MP3, AAC) has frames that its header does not count, as in joined files.

    libsndfile would leave them out. Without a header, it would guess the length. Return None for other files.
    """
    start = 0
    while data[start : start + 3] == b"ID3":  # the size of the tag, seven bits per byte
        sizes = zip(data[start + 6 : start + 10], (21, 14, 7, 0), strict=False)
        start += 10 + sum((byte & 0x7F) << shift for byte, shift in sizes)
    frame = data[start : start + 256]
    if frame[:1] != b"\xff" or frame[1:2] < b"\xe0":
        return None
    header = max(frame.find(b"Xing"), frame.find(b"Info"))
    if header < 0:
        return True
    flags, numbers = frame[header + 7], frame[header + 8 :]  # flag 1: number of frames; flag 2: of bytes
    if not flags & 2:
        return False
    rest = data[start + int.from_bytes(numbers[4 * (flags & 1) :][:4], "big") :]
    rest = (rest[128:] if rest[:3] == b"TAG" else rest).lstrip(b"\0")
    return len(rest) > 3000 and (rest[:3] == b"ID3" or (rest[:1] == b"\xff" and rest[1:2] >= b"\xe0"))
