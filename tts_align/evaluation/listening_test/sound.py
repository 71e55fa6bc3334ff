# SPDX-License-Identifier: Apache-2.0
"""Clips that are equally loud, and clips that no listener can take for speech: to see whether somebody listens."""

from __future__ import annotations

import base64
import io
import math

import torch
from jaxtyping import Float
from torch import Tensor

LOUDNESS_LUFS = -23.0
"""Loudness of a clip unless one of them would then be cut (EBU R 128)."""
CEILING_DB = -1.0
"""Highest peak of a clip, in dB of full scale."""
_BLOCK_SECONDS, _OVERLAP = 0.4, 0.75
_SILENCE_LUFS, _RELATIVE_LU, _OFFSET = -70.0, -10.0, -0.691


def k_weighting(sample_rate: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Numerators and denominators, each (3,), of the two filters of ITU-R BS.1770, at any rate.

    The recommendation prints them for 48 kHz only; these are the analogue filters behind those numbers, brought to
    another rate by the bilinear transform.
    """
    high, gain, quality = 1681.974450955533, 3.999843853973347, 0.7071752369554196
    k, most = math.tan(math.pi * high / sample_rate), 10 ** (gain / 20)
    middle, scale = most**0.4996667741545416, 1 + k / quality + k * k
    rise = [most + middle * k / quality + k * k, 2 * (k * k - most), most - middle * k / quality + k * k]
    shelf = (
        [one / scale for one in rise],
        [1.0, 2 * (k * k - 1) / scale, (1 - k / quality + k * k) / scale],
    )
    low, quality = 38.13547087602444, 0.5003270373238773
    k = math.tan(math.pi * low / sample_rate)
    scale = 1 + k / quality + k * k
    highpass = ([1.0, -2.0, 1.0], [1.0, 2 * (k * k - 1) / scale, (1 - k / quality + k * k) / scale])
    first, second = ((torch.tensor(b).double(), torch.tensor(a).double()) for b, a in (shelf, highpass))
    return first, second


def loudness(waveform: Float[Tensor, " time"], sample_rate: int) -> float:
    """Integrated loudness of one channel in LUFS, gated as ITU-R BS.1770-4 says; minus infinity for silence.

    A recording shorter than one block of 0.4 s is one block.

    Args:
        waveform: samples in [-1, 1].
        sample_rate: in Hz.
    """
    from torchaudio.functional import lfilter

    sound = waveform.double()
    for numerator, denominator in k_weighting(sample_rate):
        sound = lfilter(sound, denominator, numerator, clamp=False)
    block = min(len(sound), round(_BLOCK_SECONDS * sample_rate))
    step = max(1, round(block * (1 - _OVERLAP)))
    powers = sound.square().unfold(0, block, step).mean(-1)  # (time) -> (blocks)
    powers = powers[_lufs(powers) > _SILENCE_LUFS]
    if not len(powers):
        return -math.inf
    gate = float(_lufs(powers.mean())) + _RELATIVE_LU
    return float(_lufs(powers[_lufs(powers) > gate].mean()))


def _lufs(power: Tensor) -> Tensor:
    return _OFFSET + 10 * power.log10()


def common_loudness(loudness_lufs: list[float], peaks: list[float], wanted: float = LOUDNESS_LUFS) -> float:
    """The loudness that all clips are brought to: the wanted one, or less if a clip would be cut.

    Args:
        loudness_lufs: of each clip.
        peaks: largest absolute sample of each.
        wanted: in LUFS.
    """
    highest = [
        own + CEILING_DB - 20 * math.log10(peak)
        for own, peak in zip(loudness_lufs, peaks, strict=True)
        if math.isfinite(own) and peak > 0
    ]
    return min([wanted, *highest])


def flac_uri(waveform: Float[Tensor, " time"], sample_rate: int) -> str:
    """A clip as a ``data:`` address that holds 16-bit FLAC."""
    import soundfile

    held = io.BytesIO()
    samples = (waveform.clamp(-1, 1) * 32767).round().to(torch.int16)
    soundfile.write(held, samples.numpy(), sample_rate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(held.getvalue()).decode("ascii")


def degraded(waveform: Float[Tensor, " time"], seed: int) -> Float[Tensor, " time"]:
    """Speech under noise that follows it, as loud as the speech itself (ITU-T P.810 with Q = -3 dB).

    Args:
        waveform: clean.
        seed: of the noise.
    """
    noise = torch.randn(len(waveform), generator=torch.Generator().manual_seed(seed))
    return waveform * (1 + 10 ** (3 / 20) * noise)


def tones(count: int, sample_rate: int) -> Float[Tensor, " time"]:
    """``count`` short tones one after the other, with pauses.

    >>> tones(2, 8000).shape
    torch.Size([6400])
    """
    time = torch.arange(round(0.2 * sample_rate)) / sample_rate
    tone = 0.3 * torch.sin(2 * math.pi * 660 * time) * torch.sin(math.pi * time / 0.2)
    pause = torch.zeros(round(0.2 * sample_rate))
    return torch.cat([tone, pause] * count)
