"""Read audio files with soundfile, or with PyAV for MP4, Matroska, AAC, and MP3 without a length in the header."""

import io
from typing import Literal

import torch
from torch import Tensor

from ._containers import count_frames, open_stream
from ._sources import DecodeError, Source, read

# Samples per second over all channels, enough for stereo at 192 kHz. Limits the memory that a file can claim.
MAX_SAMPLES_A_SECOND = 400_000


def read_audio(source: Source, max_seconds: float) -> tuple[Tensor, int]:
    """Return the samples of an audio file, (channels, samples) in float32, and the sample rate.

    Raises:
        DecodeError: the file is not audio, is truncated, or is longer than `max_seconds`.
    """
    data = read(source, int(max_seconds * MAX_SAMPLES_A_SECOND * 8) + 2**20)
    if _is_cut(data):
        raise DecodeError(source, "the file is truncated: it ends before the samples that its header promises")
    if data[4:8] == b"ftyp" or data[:4] == b"\x1a\x45\xdf\xa3" or _has_no_length(data):  # MP4, Matroska
        return _read_av(source, max_seconds)
    return _read_soundfile(source, data, max_seconds)


def _read_soundfile(source: Source, data: bytes, max_seconds: float) -> tuple[Tensor, int]:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_length(source, file.frames, file.channels, file.samplerate, max_seconds)
            promised, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)  # (samples, channels)
    except soundfile.LibsndfileError as error:
        raise DecodeError(source, error.error_string) from error
    if len(samples) < promised:
        raise DecodeError(source, f"the file is truncated: only {len(samples)} of {promised} samples can be read")
    return torch.from_numpy(samples).T.contiguous(), rate


def _read_av(source: Source, max_seconds: float) -> tuple[Tensor, int]:
    import av

    count_frames(source, "audio", max_seconds)
    parts: list[Tensor] = []
    samples, kinds = 0, set()
    with open_stream(source, "audio") as (container, stream):
        to_float = av.AudioResampler(format="fltp")
        for frame in container.decode(stream):
            kinds.add((frame.sample_rate, frame.layout.name, frame.format.name))
            if len(kinds) > 1:
                raise DecodeError(source, "the sample rate, the channels or the format change within the file")
            for block in to_float.resample(frame):
                parts.append(torch.from_numpy(block.to_ndarray()))  # (channels, samples)
                samples += parts[-1].shape[1]
                _check_length(source, samples, len(parts[-1]), frame.sample_rate, max_seconds)
    if not parts:
        raise DecodeError(source, "the file has no samples")
    return torch.cat(parts, dim=1), kinds.pop()[0]


def _check_length(source: Source, samples: int, channels: int, rate: int, max_seconds: float) -> None:
    if samples > max_seconds * rate or samples * channels > max_seconds * MAX_SAMPLES_A_SECOND:
        reason = f"{samples} samples of {channels} channels at {rate} Hz exceed --max-seconds {max_seconds:g}"
        raise DecodeError(source, reason)


def _has_no_length(data: bytes) -> bool:
    """Tell whether MPEG audio (MP3, AAC) lacks a length in its header. libsndfile would guess and truncate it."""
    start = 0
    if data[:3] == b"ID3":  # the size of the tag, seven bits per byte
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=False))
    frame = data[start : start + 256]
    return frame[:1] == b"\xff" and frame[1:2] >= b"\xe0" and b"Xing" not in frame and b"Info" not in frame


def _is_cut(data: bytes) -> bool:
    """Tell whether a WAV, AIFF or Ogg file is shorter than its header says. libsndfile does not check this."""
    magic = data[:4]
    if magic in (b"RIFF", b"RF64"):
        return _chunk_is_cut(data, b"data", "little")
    if magic == b"FORM":
        return _chunk_is_cut(data, b"SSND", "big")
    return magic == b"OggS" and _ogg_is_cut(data)


def _chunk_is_cut(data: bytes, wanted: bytes, order: Literal["little", "big"]) -> bool:
    at, long_size = 12, 0
    while at + 8 <= len(data):
        chunk, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], order)
        if chunk == b"ds64":  # RF64: the second number here is the sample chunk's size in 64 bits
            long_size = int.from_bytes(data[at + 16 : at + 24], order)
        if chunk == wanted:
            return at + 8 + (long_size or size) > len(data)
        at += 8 + size + size % 2
    return True


def _ogg_is_cut(data: bytes) -> bool:
    """Tell whether the last page of an Ogg file is incomplete, or is not marked as the last."""
    page = data.rfind(b"OggS")
    header = data[page : page + 27]  # byte 5 holds the flags, byte 26 the number of segments
    if len(header) < 27 or not header[5] & 4:
        return True
    sizes = data[page + 27 : page + 27 + header[26]]
    return page + 27 + header[26] + sum(sizes) > len(data)
