"""Audio, as three mel spectrograms from the start, middle and end of a clip."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import UserError
from . import Modality, check_options, spans, to_tensor
from ._audio_files import read_audio
from ._containers import check_seconds
from ._fbank import FRAME_MS, LOWEST, log_mel, split_frames
from ._pictures import coloured, stretched
from ._sources import DecodeError, Source

RATES = range(1_000, 768_001)  # Hz
PICTURE_COLUMNS, PICTURE_ROWS = 240, 112


@dataclass(frozen=True)
class Audio(Modality):
    """Log-mel spectrograms from Kaldi's filter bank, one frame per 10 ms: (3, 1, num_mel_bins, target_length).

    A clip with more than `target_length` frames gives three crops. In evaluation, each starts at the first frame of a
    third of the possible starts. (The original LanguageBind code intended this, but drew at random in evaluation, too.)
    A shorter clip is repeated until it is long enough, and the three channels are equal.

    Raw form: ((channels, samples) float32, rate). In memory: such a pair, where the samples are a 1-D or 2-D array or
    tensor of floats or of 16- or 32-bit integers.
    """

    extensions = ("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac", "aiff", "caf", "wma", "wv", "ac3", "mp2", "mka",
                  "au", "w64", "tta", "dts")  # fmt: skip

    num_mel_bins: int = 112
    """Number of mel bands, the input height: 112 in the published Audio_FT, 126 in the published LoRA model."""
    target_length: int = 1036
    """Number of 10 ms frames, the input width."""
    sample_rate: int = 16_000
    """Sample rate in Hz; other rates are resampled."""
    audio_mean: float = -4.2677393
    """Mean of the log-mel values."""
    audio_std: float = 4.5689974
    """Standard deviation of the log-mel values, which are divided by twice this number."""
    channels: Literal["mix", "first"] = "mix"
    """Waveform to use: the mean of the channels, or the first channel, as in the original code."""
    random_crop: bool = True
    """Crop long clips at random places instead of fixed ones; training only."""
    max_seconds: float = 600.0
    """Maximum length in seconds, checked before decoding."""

    def __post_init__(self):
        check_options(self, "num_mel_bins", "target_length", "audio_std", "max_seconds")
        if self.sample_rate not in RATES:
            raise UserError(f"--sample-rate is {self.sample_rate}; set whole Hz from {RATES[0]} to {RATES[-1]}")

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (3, 1, self.num_mel_bins, self.target_length)

    def decode(self, source: Source) -> tuple[Tensor, int]:
        return self._checked(*read_audio(source, self.max_seconds), source)

    def windows(self, source: Any, seconds: float) -> Iterator[tuple[float | None, float | None, Any]]:
        samples, rate = self.load(source)
        for start, end in spans(samples.shape[1] / rate, seconds):
            yield start, end, (samples if end is None else samples[:, round(start * rate) : round(end * rate)], rate)

    def from_memory(self, value: Any) -> tuple[Tensor, int]:
        waveform, rate = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, None)
        if rate is None or not isinstance(waveform, (np.ndarray, Tensor)) or waveform.ndim not in (1, 2):
            form = "a waveform that is an array or tensor, (samples,) or (channels, samples)"
            raise DecodeError(waveform, f"expected a path, bytes or a (waveform, rate) pair with {form}")
        x = to_tensor(waveform)
        x = x[None] if x.ndim == 1 else x
        if x.shape[0] > x.shape[1]:  # (samples, channels), as from soundfile
            x = x.T
        return self._checked(x, rate, waveform)

    def transform(self, raw: tuple[Tensor, int], rng: torch.Generator | None = None) -> Tensor:
        frames, length = self._frames(raw), self.target_length
        if len(frames) <= length:
            mel = self._normalised(frames)
            x = mel.repeat(1, length // len(frames) + 1)[:, :length].repeat(3, 1, 1)
        else:
            starts = torch.tensor(self._starts(len(frames) - length + 1, rng))
            # Compute each used frame once: crops skip most of a long clip and overlap in a short one
            used = (starts[:, None] + torch.arange(length)).unique()
            mel = self._normalised(frames[used])
            x = torch.stack([mel[:, place : place + length] for place in torch.searchsorted(used, starts)])
        return x[:, None]  # (3, 1, num_mel_bins, length)

    def picture(self, raw: tuple[Tensor, int]) -> tuple[Tensor, str]:
        """Draw the spectrogram of the whole clip, low frequencies at the bottom. Each column is a mean over frames."""
        mel = log_mel(self._frames(raw), self.sample_rate, self.num_mel_bins).T.flip(0)  # (num_mel_bins, frames)
        columns = min(PICTURE_COLUMNS, mel.shape[1])
        mel = F.adaptive_avg_pool2d(mel[None], (min(PICTURE_ROWS, len(mel)), columns))[0]
        shown, low, high = stretched(mel)
        bands = f"{LOWEST:.0f} Hz (bottom) to {self.sample_rate / 2000:g} kHz (top)"
        seconds = raw[0].shape[1] / raw[1]
        return coloured(shown), f"{seconds:.1f} s, {bands}, log energy {low:.1f} (dark) to {high:.1f} (bright)"

    def _normalised(self, frames: Tensor) -> Tensor:
        """Return normalised log-mel values (num_mel_bins, frames) of frames (frames, window)."""
        mel = log_mel(frames, self.sample_rate, self.num_mel_bins)
        return mel.sub_(self.audio_mean).div_(2 * self.audio_std).T.contiguous()

    def _frames(self, raw: tuple[Tensor, int]) -> Tensor:
        """Resample, subtract the mean, reduce to one channel and split into 25 ms frames (frames, window)."""
        waveform = self._resample(*raw)
        # A float32 mean of a long clip would depend on the number of threads, which would show in quiet bands
        waveform = waveform - waveform.mean(dtype=torch.float64)
        waveform = waveform.mean(dim=0) if self.channels == "mix" and len(waveform) > 1 else waveform[0]
        return split_frames(waveform, self.sample_rate)

    def _checked(self, x: Tensor, rate: int, source: Any) -> tuple[Tensor, int]:
        if x.dtype in (torch.int16, torch.int32):
            x = x.float() / (torch.iinfo(x.dtype).max + 1)
        if not x.is_floating_point():
            raise DecodeError(source, f"expected floats or 16- or 32-bit integers, got {x.dtype}")
        if rate not in RATES:
            raise DecodeError(source, f"the rate is {rate} Hz, expected whole Hz from {RATES[0]} to {RATES[-1]}")
        if x.shape[1] < FRAME_MS / 1000 * rate:
            raise DecodeError(source, f"{x.shape[1]} samples at {rate} Hz are shorter than one frame of 25 ms")
        check_seconds(source, x.shape[1] / rate, self.max_seconds)
        if not all(bound.isfinite() for bound in x.aminmax()):  # both are NaN if a sample is
            raise DecodeError(source, "the samples contain NaN or infinity")
        return x.float(), int(rate)

    def _resample(self, waveform: Tensor, rate: int) -> Tensor:
        if rate == self.sample_rate:
            return waveform
        import torchaudio.functional

        # The filter has rate * sample_rate / gcd^2 taps: 3 GB at 44,101 Hz. A rate with a small common divisor is
        # rounded to a multiple of ten, which changes the pitch by at most 0.06 % from 8 kHz up.
        if math.gcd(rate, self.sample_rate) < 10:
            rate = round(rate, -1)
        return torchaudio.functional.resample(waveform, rate, self.sample_rate)

    def _starts(self, count: int, rng: torch.Generator | None) -> list[int]:
        """Return three of `count` possible starts, one in each third; an empty third gives 0."""
        thirds = [part if len(part) else np.zeros(1, int) for part in np.array_split(np.arange(count), 3)]
        if rng is None or not self.random_crop:
            return [int(third[0]) for third in thirds]
        return [int(third[torch.randint(len(third), (), generator=rng)]) for third in thirds]
