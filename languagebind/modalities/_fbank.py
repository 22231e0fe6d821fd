"""Kaldi's log-mel filter bank (Hann window, no dither, no energy), with cached bands.

Up to the Fourier transform, the operations and their order are those of `torchaudio.compliance.kaldi.fbank`. Other
rounding would show in the logarithm of a quiet band beside a loud band.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

FRAME_MS, SHIFT_MS = 25.0, 10.0
PREEMPHASIS = 0.97
LOWEST = 20.0  # Hz, the start of the first band; the last one ends at half the sample rate
ROWS = 256  # frames computed at a time, few enough to stay in a core's cache


def split_frames(waveform: Tensor, sample_rate: int) -> Tensor:
    """Return a view of overlapping 25 ms frames, one every 10 ms: (..., samples) -> (..., frames, window)."""
    window, shift = (int(sample_rate * length * 0.001) for length in (FRAME_MS, SHIFT_MS))  # rounded down, as in Kaldi
    return waveform.unfold(-1, window, shift)


@torch.no_grad()
def log_mel(frames: Tensor, sample_rate: int, num_mel_bins: int) -> Tensor:
    """Return the log-mel values (N, num_mel_bins) of float32 frames (N, window), without gradients."""
    window = torch.hann_window(frames.shape[1], periodic=False, device=frames.device)
    size = 2 ** (frames.shape[1] - 1).bit_length()
    bands = _mel_bands(num_mel_bins, size, sample_rate, frames.device)
    mel = frames.new_empty(len(frames), num_mel_bins)
    padded = frames.new_zeros(min(ROWS, len(frames)), size)
    for rows, out in zip(frames.split(ROWS), mel.split(ROWS), strict=True):
        rows, x = rows - rows.mean(dim=1, keepdim=True), padded[: len(rows)]
        # The window is 0 at the first sample, so its pre-emphasis, which needs an earlier sample, is left out
        emphasised = x[:, 1 : rows.shape[1]]
        torch.mul(rows[:, :-1], PREEMPHASIS, out=emphasised)
        torch.sub(rows[:, 1:], emphasised, out=emphasised)
        emphasised.mul_(window[1:])
        parts = torch.view_as_real(torch.fft.rfft(x)).square_()  # (rows, size // 2 + 1, 2)
        torch.mm(parts[..., 0] + parts[..., 1], bands, out=out)
    return mel.clamp_(min=torch.finfo(torch.float32).eps).log_()


@functools.cache
def _mel_bands(num_mel_bins: int, size: int, sample_rate: int, device: torch.device) -> Tensor:
    """Return triangles (size // 2 + 1, num_mel_bins) that overlap by half and have equal widths in mel."""
    low, high = (1127.0 * math.log(1.0 + hertz / 700.0) for hertz in (LOWEST, sample_rate / 2))
    width = (high - low) / (num_mel_bins + 1)
    left = low + torch.arange(num_mel_bins) * width
    centre, right = (low + (torch.arange(num_mel_bins) + step) * width for step in (1.0, 2.0))
    hertz = sample_rate / size * torch.arange(size / 2)
    mel = 1127.0 * (1.0 + hertz[:, None] / 700.0).log()
    rising, falling = (mel - left) / (centre - left), (right - mel) / (right - centre)
    # The highest frequency belongs to no band
    return F.pad(torch.minimum(rising, falling).clamp(min=0), (0, 0, 0, 1)).to(device)
