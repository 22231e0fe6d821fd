"""Read audio files with soundfile, or with PyAV if libsndfile refuses a file or would cut it short."""

import io

import torch
from torch import Tensor

from ._audio_headers import close_header, exceeds_header, split_joined
from ._containers import IN_PYTHON, open_stream, read_packets, ticks_of
from ._sources import DecodeError, Source, read

# Samples per second over all channels, enough for stereo at 192 kHz. Limits the memory that a file can claim.
MAX_SAMPLES_A_SECOND = 400_000
# First bytes of files for PyAV: Matroska, FLAC (of which libsndfile reads what the header counts), and VOC
AV_MAGIC = (b"\x1a\x45\xdf\xa3", b"fLaC", b"Creative Voice File")
TRIMMED = 0.2  # seconds that a decoder may remove of the last packet
GAP = 0.02  # seconds; times of frames are rounded, and more than this is missing sound


def read_audio(source: Source, max_seconds: float) -> tuple[Tensor, int]:
    """Return an audio file's samples, (channels, samples) in float32, and sample rate, or raise `DecodeError`."""
    file = data = read(source, int(max_seconds * MAX_SAMPLES_A_SECOND * 8) + 2**20)
    if file[:4] == bytes(4):
        data = file.lstrip(b"\0") or file
    parts: list[Tensor] = []
    rate = samples = 0
    for joined in split_joined(data) or [b""]:
        if not joined or (part := close_header(joined)) is None:
            raise DecodeError(source, "the file is truncated: it ends before the samples that its header promises")
        try:
            more, found = _read_part(source if part is file else part, part, max_seconds)
        except DecodeError as error:  # perhaps of bytes, without the name of the file
            raise DecodeError(source, error.reason) from error
        if parts and (len(more), found) != (len(parts[0]), rate):
            raise DecodeError(source, "the sample rate or the channels change within the file")
        rate, samples = found, samples + more.shape[1]
        _check_length(source, samples, len(more), rate, max_seconds)
        parts.append(more)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), rate


def _read_part(source: Source, data: bytes, max_seconds: float) -> tuple[Tensor, int]:
    """Return the samples and the rate of a file with the content `data`."""
    exceeds = exceeds_header(data)
    if data[4:8] != b"ftyp" and not data.startswith(AV_MAGIC) and not exceeds:
        if (found := _read_soundfile(source, data, max_seconds)) is not None:
            return found
        if exceeds is False:
            raise DecodeError(source, "the file is damaged: it lacks samples that its header promises")
    return _read_av(source, max_seconds)


def _read_soundfile(source: Source, data: bytes, max_seconds: float) -> tuple[Tensor, int] | None:
    """Return the samples and the rate, or None if libsndfile does not read the whole file."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            promised, rate = file.frames, file.samplerate
            if not file.seekable() or (data[:4] == b"OggS" and _packet_seconds(data) > promised / rate + TRIMMED):
                return None  # GSM, or a part of a stream, which does not begin at 0
            _check_length(source, promised, file.channels, rate, max_seconds)
            samples = file.read(dtype="float32", always_2d=True)  # (samples, channels)
    except soundfile.LibsndfileError:
        return None
    if len(samples) < promised:
        if data[:4] == b"RIFF":  # libsndfile guesses the length of MP3 within WAV
            return None
        raise DecodeError(source, f"the file is truncated: only {len(samples)} of {promised} samples can be read")
    return torch.from_numpy(samples).T.contiguous(), rate


def _packet_seconds(data: bytes) -> float:
    with open_stream(data, "audio") as (container, stream):
        return float(sum(ticks_of(packet) for packet in container.demux(stream) if packet.size) * stream.time_base)


def _read_av(source: Source, max_seconds: float) -> tuple[Tensor, int]:
    import av

    read_packets(source, "audio", max_seconds)  # raises if the file is too long or truncated
    parts: list[Tensor] = []
    samples, kinds, start = 0, set(), None
    with open_stream(source, "audio") as (container, stream):
        form, stated = container.format.name, (container.duration or 0) / 1e6
        if form in ("flac", "wv", "tta"):
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
        to_float = av.AudioResampler(format="fltp")
        for packet in container.demux(stream):
            if form == "mp3" and packet.size and bytes(packet)[0] != 0xFF:
                continue  # a tag or zeros, between joined files or at the end
            for frame in packet.decode():
                kinds.add((frame.sample_rate, frame.layout.name, frame.format.name))
                if len(kinds) > 1:
                    raise DecodeError(source, "the sample rate, the channels or the format change within the file")
                time = frame.time or 0.0
                start = time if start is None else start
                if form in ("flac", "ogg") and time - start > samples / frame.sample_rate + GAP:
                    raise DecodeError(source, "the file is damaged: samples are missing within it")
                for block in to_float.resample(frame):
                    parts.append(torch.from_numpy(block.to_ndarray()))  # (channels, samples)
                    samples += parts[-1].shape[1]
                    _check_length(source, samples, len(parts[-1]), frame.sample_rate, max_seconds)
    if not parts:
        raise DecodeError(source, "the file has no samples")
    rate = kinds.pop()[0]
    if form in ("asf", "flv", "wv", "tta") and samples / rate < 0.9 * stated - 0.5:
        raise DecodeError(source, f"the file is truncated after {samples / rate:.1f} of {stated:.1f} s")
    return torch.cat(parts, dim=1), rate


def _check_length(source: Source, samples: int, channels: int, rate: int, max_seconds: float) -> None:
    if samples > max_seconds * rate or samples * channels > max_seconds * MAX_SAMPLES_A_SECOND:
        length = f"{samples} samples of {channels} channels at {rate} Hz"
        raise DecodeError(source, f"{length} exceed --max-seconds {max_seconds:g}{IN_PYTHON}")
