"""Reading sound files: soundfile for what it knows, PyAV for MP4, Matroska and raw AAC."""

import io

import torch
from torch import Tensor

from . import DecodeError, Source
from ._checks import read_file
from ._containers import count_frames, open_stream

# Samples of all channels together a second: stereo at 192 kHz. Bounds the memory that a compressed file can claim.
MAX_SAMPLES_A_SECOND = 400_000


def read_audio(source: Source, max_seconds: float) -> tuple[Tensor, int]:
    """A sound file as (channels, samples), float32, and its rate.

    Raises:
        DecodeError: not a sound file, cut off, or longer than `max_seconds`.
    """
    data = read_file(source, int(max_seconds * MAX_SAMPLES_A_SECOND * 8) + 2**20)
    cut = "ends before the samples that its header promises"
    if (data[:4] == b"RIFF" and _riff_is_cut(data)) or (data[:4] == b"OggS" and _ogg_is_cut(data)):
        raise DecodeError(source, cut)
    aac = data[0] == 0xFF and data[1:2] and data[1] & 0xF6 == 0xF0  # ADTS: twelve ones, layer 0
    if data[4:8] == b"ftyp" or data[:4] == b"\x1a\x45\xdf\xa3" or aac:
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
        raise DecodeError(source, f"cut off: {len(samples)} of {promised} samples can be read")
    return torch.from_numpy(samples).T.contiguous(), rate


def _read_av(source: Source, max_seconds: float) -> tuple[Tensor, int]:
    import av

    count_frames(source, "audio", max_seconds)
    parts, samples = [], 0
    with open_stream(source, "audio") as (container, stream):
        rate, to_float = stream.rate, av.AudioResampler(format="fltp")
        for frame in container.decode(stream):
            for block in to_float.resample(frame):
                parts.append(torch.from_numpy(block.to_ndarray()))  # (channels, samples)
                samples += parts[-1].shape[1]
                _check_length(source, samples, len(parts[-1]), rate, max_seconds)
    if not parts:
        raise DecodeError(source, "holds no samples")
    return torch.cat(parts, dim=1), rate


def _check_length(source: Source, samples: int, channels: int, rate: int, max_seconds: float) -> None:
    if samples > max_seconds * rate or samples * channels > max_seconds * MAX_SAMPLES_A_SECOND:
        reason = f"{samples} samples of {channels} channels at {rate} Hz are more than --max-seconds {max_seconds:g}"
        raise DecodeError(source, reason)


def _riff_is_cut(data: bytes) -> bool:
    """Whether a WAV's sample chunk is shorter than it says; libsndfile would read what is there without a word."""
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            return at + 8 + size > len(data)
        at += 8 + size + size % 2
    return True


def _ogg_is_cut(data: bytes) -> bool:
    """Whether the last page of an Ogg file does not say that it is the last."""
    page = data.rfind(b"OggS")
    return len(data) < page + 6 or not data[page + 5] & 4
