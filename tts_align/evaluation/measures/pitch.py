# SPDX-License-Identifier: Apache-2.0
"""Pitch by autocorrelation, and how far it spreads: flat prosody is how training for error rates alone fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.evaluation.measures.base import MeasuredSample, UtteranceMeasure

SAMPLE_RATE = 16_000
_HOP, _WINDOW, _FFT = 160, 800, 2048
_OCTAVE_COST = 0.02
"""Of one octave down, in correlation: a tone correlates with itself after two periods as well as after one."""
_QUIET_DECIBELS = 40.0
"""What is further below the loudest frame has no pitch."""


def fundamental_frequency(
    waveform: Float[Tensor, " time"], lowest: float = 60.0, highest: float = 500.0, voiced: float = 0.5
) -> Float[Tensor, " f"]:
    """Fundamental frequency of each frame of 10 ms in hertz; NaN where nothing periodic is heard.

    The autocorrelation of each windowed frame over that of the window (Boersma 1993), with a cost for low octaves.

    Args:
        waveform: at 16 kHz.
        lowest: frequency that is looked for, in Hz.
        highest: frequency that is looked for, in Hz.
        voiced: smallest normalised autocorrelation of a frame that has a pitch.
    """
    if len(waveform) < _WINDOW:
        return waveform.new_zeros(0)
    window = torch.hann_window(_WINDOW, dtype=torch.float64)
    frames = waveform.double().unfold(0, _WINDOW, _HOP)  # :: (time,) -> (f, w)
    frames = (frames - frames.mean(-1, keepdim=True)) * window
    power = frames.square().mean(-1)
    ratio = _autocorrelation(frames) / _autocorrelation(window[None])
    first, last = math.floor(SAMPLE_RATE / highest), min(math.ceil(SAMPLE_RATE / lowest), _WINDOW // 2)
    lags = torch.arange(first, last + 1, dtype=torch.float64)
    heights = ratio[:, first : last + 1]
    is_peak = (heights >= ratio[:, first - 1 : last]) & (heights >= ratio[:, first + 1 : last + 2])
    costs = _OCTAVE_COST * (lags / first).log2()
    best = torch.where(is_peak, heights - costs, -math.inf).argmax(-1, keepdim=True)
    left, top, right = (ratio.gather(1, best + first + step)[:, 0] for step in (-1, 0, 1))
    shift = ((left - right) / (2 * (left - 2 * top + right)).clamp_max(-1e-12)).clamp(-0.5, 0.5)
    loud = power > power.max() * 10 ** (-_QUIET_DECIBELS / 10)
    found = loud & is_peak.any(-1) & (top >= voiced) & (power > 1e-10)
    frequency = SAMPLE_RATE / (lags[best[:, 0]] + shift)
    return torch.where(found, frequency, math.nan).to(waveform.dtype)


def _autocorrelation(frames: Float[Tensor, "f w"]) -> Float[Tensor, "f lags"]:
    """Autocorrelation over that at lag 0; of silence 0."""
    spectrum = torch.fft.rfft(frames, n=_FFT)
    correlation = torch.fft.irfft(torch.view_as_real(spectrum).square().sum(-1), n=_FFT)[:, : _WINDOW // 2 + 2]
    return correlation / correlation[:, :1].clamp_min(1e-12)


def spread_in_semitones(frequency: Float[Tensor, " f"]) -> float:
    """Standard deviation of the logarithm of known frequencies within an octave of their median, in semitones."""
    known = 12 * frequency[frequency.isfinite()].double().log2()
    known = known[(known - known.median()).abs() <= 12] if len(known) else known
    return float(known.std(correction=0)) if len(known) else math.nan


class PitchSpread(UtteranceMeasure):
    """Spread of the fundamental frequency in semitones: read speech has 2 to 4, a monotone less than 1.

    Args:
        voiced_frames: fewest frames of 10 ms that have a pitch; an utterance with fewer gets no number.
    """

    name = "pitch_spread"
    higher_is_better: ClassVar[bool | None] = None

    def __init__(self, voiced_frames: int = 20) -> None:
        super().__init__()
        if voiced_frames < 1:
            raise ValueError(f"PitchSpread: voiced_frames must be at least 1, got {voiced_frames}")
        self.voiced_frames = voiced_frames

    def measure(self, samples: Sequence[MeasuredSample]) -> list[dict[str, float]]:
        """``pitch_spread`` of each utterance with enough voice."""
        frequencies = [fundamental_frequency(one.sound.at(SAMPLE_RATE)) for one in samples]
        enough = [int(one.isfinite().sum()) >= self.voiced_frames for one in frequencies]
        return [
            {self.name: spread_in_semitones(one)} if kept else {} for one, kept in zip(frequencies, enough, strict=True)
        ]
