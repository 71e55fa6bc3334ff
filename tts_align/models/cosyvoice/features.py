# SPDX-License-Identifier: Apache-2.0
"""What the parts of CosyVoice hear: the flow's and vocoder's log-mel, the tokenizer's, and the speaker encoder's.

Processors sum single precision in orders of their own, and the logarithm of a quiet channel makes much of that: what
tokenizer and speaker encoder read is computed in double precision, so that one recording has the same speech tokens and
speaker vector everywhere.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Added to the power before the root, and the smallest magnitude and power whose logarithm is taken.
_POWER_EPSILON, _MAGNITUDE_FLOOR, _POWER_FLOOR = 1e-9, 1e-5, 1e-10
# In decades below the loudest point of the utterance, and the shift and scale that follow.
_RANGE, _SHIFT, _SCALE = 8.0, 4.0, 4.0


def acoustic_mel(
    wav: Float[Tensor, "b time"],
    fmax: float | None = None,
    sample_rate: int = 24000,
    fft_samples: int = 1920,
    hop_samples: int = 480,
    mel_channels: int = 80,
    fmin: float = 0.0,
) -> Float[Tensor, "b f m"]:
    """Log-mel that the flow makes and the vocoder reads: natural logarithm of mel magnitudes.

    Args:
        wav: waveforms of one length.
        fmax: upper edge of the highest channel in hertz: 8000 for CosyVoice2, ``None`` (half the sample rate) for
            Fun-CosyVoice3.
        sample_rate: samples per second.
        fft_samples: length of the transform and of its window.
        hop_samples: samples per frame.
        mel_channels: mel channels m.
        fmin: lower edge of the lowest channel in hertz.

    Returns:
        ``time // hop_samples`` frames; frame i is centred on the middle of its own ``hop_samples`` samples.
    """
    _check_length(wav.shape[-1], (fft_samples - hop_samples) // 2 + 1)
    wav = F.pad(wav, ((fft_samples - hop_samples) // 2,) * 2, mode="reflect")
    window = _window(fft_samples, wav.device).to(wav.dtype)
    bins = torch.stft(wav, fft_samples, hop_samples, window=window, center=False, return_complex=True)
    magnitude = torch.view_as_real(bins).square().sum(-1).add(_POWER_EPSILON).sqrt()
    filters = mel_filters(sample_rate, fft_samples, mel_channels, fmin, fmax, wav.device).to(wav.dtype)
    # :: (b, q, f) -> (b, f, q) -> (b, f, m)
    return (magnitude.transpose(1, 2) @ filters).clamp_min(_MAGNITUDE_FLOOR).log()


def whisper_mel(
    wav: Float[Tensor, " time"],
    sample_rate: int = 16000,
    fft_samples: int = 400,
    hop_samples: int = 160,
    mel_channels: int = 128,
) -> Float[Tensor, "m f"]:
    """Log-mel that the speech tokenizer reads, as Whisper's: decades of mel power, the loudest point in them near 1.

    Computed in double precision and given in that of the waveform.

    Args:
        wav: one waveform; the loudest point of an utterance shifts all of it, so there are no batches.
        sample_rate: samples per second.
        fft_samples: length of the transform and of its window.
        hop_samples: samples per frame.
        mel_channels: mel channels m.

    Returns:
        ``time // hop_samples`` frames.
    """
    _check_length(len(wav), max(fft_samples // 2 + 1, hop_samples))
    window = _window(fft_samples, wav.device)
    bins = torch.stft(wav.double(), fft_samples, hop_samples, window=window, return_complex=True)[:, :-1]
    filters = mel_filters(sample_rate, fft_samples, mel_channels, 0.0, None, wav.device).double()
    # :: (m, q) @ (q, f) -> (m, f)
    decades = (filters.T @ torch.view_as_real(bins).square().sum(-1)).clamp_min(_POWER_FLOOR).log10()
    return ((decades.maximum(decades.max() - _RANGE) + _SHIFT) / _SCALE).to(wav.dtype)


def kaldi_fbank(
    wav: Float[Tensor, " time"],
    sample_rate: int = 16000,
    mel_channels: int = 80,
    window_milliseconds: float = 25.0,
    hop_milliseconds: float = 10.0,
) -> Float[Tensor, "f m"]:
    """Kaldi's log-mel energies less their mean over time, which the speaker encoder CAM++ reads.

    Computed in double precision and given in that of the waveform.

    Args:
        wav: one waveform within [-1, 1].
        sample_rate: samples per second.
        mel_channels: mel channels m.
        window_milliseconds: length of a window.
        hop_milliseconds: time between two windows; only whole windows count.
    """
    from torchaudio.compliance import kaldi

    _check_length(len(wav), int(sample_rate * window_milliseconds / 1000))
    energies: Tensor = kaldi.fbank(
        wav[None].double(),
        num_mel_bins=mel_channels,
        sample_frequency=sample_rate,
        frame_length=window_milliseconds,
        frame_shift=hop_milliseconds,
        dither=0.0,
    )
    return (energies - energies.mean(dim=0)).to(wav.dtype)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept serves trainings, too
def mel_filters(
    sample_rate: int, fft_samples: int, mel_channels: int, fmin: float, fmax: float | None, device: torch.device
) -> Float[Tensor, "q m"]:
    """Triangles of equal area on Slaney's mel scale, one column per channel; built once per set of sizes.

    In double precision: single precision, as torchaudio's, moves the tokenizer's features a hundred times as far from
    the published ones.
    """
    top = sample_rate / 2 if fmax is None else fmax
    if not 0 <= fmin < top <= sample_rate / 2:
        raise ValueError(f"expected 0 <= fmin < fmax <= {sample_rate / 2} (half the sample rate), got {fmin} and {top}")
    corners = _hertz(torch.linspace(_mel(fmin), _mel(top), mel_channels + 2, dtype=torch.float64))
    bins = torch.arange(fft_samples // 2 + 1, dtype=torch.float64)[:, None] * (sample_rate / fft_samples)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    triangles = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp_min(0)
    return (triangles * 2 / (right - left)).to(device, torch.float32)


# Slaney's scale: straight up to a knee, then logarithmic.
_HERTZ_PER_MEL, _KNEE_HERTZ, _KNEE_MEL, _LOG_STEP = 200 / 3, 1000.0, 15.0, math.log(6.4) / 27


def _mel(hertz: float) -> float:
    if hertz < _KNEE_HERTZ:
        return hertz / _HERTZ_PER_MEL
    return _KNEE_MEL + math.log(hertz / _KNEE_HERTZ) / _LOG_STEP


def _hertz(mel: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    above = _KNEE_HERTZ * ((mel - _KNEE_MEL) * _LOG_STEP).exp()
    return torch.where(mel < _KNEE_MEL, mel * _HERTZ_PER_MEL, above)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept serves trainings, too
def _window(samples: int, device: torch.device) -> Float[Tensor, " {samples}"]:
    return torch.hann_window(samples, device=device, dtype=torch.float64)


def _check_length(samples: int, least: int) -> None:
    if samples < least:
        raise ValueError(f"expected at least {least} samples to take features from, got {samples}: leave it out")
