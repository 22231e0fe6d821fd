"""The sample table of an MP4 or MOV file (ISO/IEC 14496-12): when its frames are shown, without reading them."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

# Sample groups and partial sync samples mark key frames that the table of key frames does not list
MORE_KEY_FRAMES = {b"sbgp", b"stps"}


def sample_table(file: Any, track: int, samples: int) -> np.ndarray | None:
    """Return decoding time, presentation time and whether it is a key frame, (samples, 3), for a track by its ID.

    The samples are in order of decoding. Times are in ticks of the track, before its edit list. Returns None if the
    table alone does not tell what is shown (fragments, several edits, empty samples), or has another number of samples.
    """
    try:
        tracks = [dict(_boxes(box)) for name, box in _boxes(_find_moov(file)) if name == b"trak"]
        boxes = next(boxes for boxes in tracks if _track_id(boxes[b"tkhd"]) == track)
        edits = dict(_boxes(boxes[b"edts"]))[b"elst"] if b"edts" in boxes else bytes(8)
        for name in (b"mdia", b"minf", b"stbl"):
            boxes = dict(_boxes(boxes[name]))
        table = np.zeros((samples, 3), np.int64)
        table[1:, 0] = np.cumsum(_repeat(boxes[b"stts"], samples))[:-1]
        table[:, 1] = table[:, 0] + (_repeat(boxes[b"ctts"], samples) if b"ctts" in boxes else 0)
        table[_rows(boxes[b"stss"], 1)[:, 0] - 1 if b"stss" in boxes else slice(None), 2] = 1
        size = boxes[b"stsz"][4:8]  # 0 if each sample has a size of its own
        empty = not any(size) and not _rows(boxes[b"stsz"][4:], 1).all()
    except (StopIteration, KeyError, ValueError, IndexError):
        return None
    return None if empty or int.from_bytes(edits[4:8]) > 1 or boxes.keys() & MORE_KEY_FRAMES else table


def _find_moov(file: Any) -> bytes:
    while len(head := file.read(16)) == 16:
        size = int.from_bytes(head[:4])
        if head[4:8] == b"moov":
            return head[8:] + file.read(size - 16)
        size = int.from_bytes(head[8:]) if size == 1 else size
        if not 8 <= size < 2**62:
            break
        file.seek(size - 16, os.SEEK_CUR)
    return b""


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    while len(data) >= 8:
        size = max(int.from_bytes(data[:4]), 8)
        yield data[4:8], data[8:size]
        data = data[size:]


def _track_id(header: bytes) -> int:
    return int.from_bytes(header[20:24] if header[0] else header[12:16])  # version 1 states times in 64 bits before it


def _repeat(box: bytes, samples: int) -> np.ndarray:
    """Return the values of a table of runs: rows (number of samples, value)."""
    counts, values = _rows(box, 2).T
    if counts.sum() != samples:  # before a wrong count allocates memory
        raise ValueError(f"the runs have {counts.sum()} samples, expected {samples}")
    return np.repeat(values, counts)


def _rows(box: bytes, columns: int) -> np.ndarray:
    """Return the rows that follow a box's version, flags and number of rows."""
    count = int.from_bytes(box[4:8])
    return np.frombuffer(box, ">i4", count * columns, 8).reshape(count, columns).astype(np.int64)
