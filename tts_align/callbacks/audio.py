# SPDX-License-Identifier: Apache-2.0
"""Recordings to hear: the same sentence before and after the training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from tts_align.files import written_atomically


def write_wav(path: Path, waveform: ArrayLike, sample_rate: int) -> Path:
    """Write a 16-bit WAV file, whole or not at all.

    Args:
        path: of the file.
        waveform: mono sound in [-1, 1], shape (samples,); what lies beyond is clipped.
        sample_rate: in Hz.

    Raises:
        ValueError: the waveform is not one-dimensional, or not finite.
    """
    import soundfile

    samples = np.asarray(waveform, np.float64)
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(f"expected finite samples of one channel, got shape {samples.shape}")
    whole = np.rint(np.clip(samples, -1, 1) * 32767).astype(np.int16)
    with written_atomically(path) as scratch:
        soundfile.write(scratch, whole, sample_rate, subtype="PCM_16", format="WAV")
    return Path(path)


def write_pair(folder: Path, name: str, waveforms: Mapping[str, ArrayLike], sample_rate: int) -> dict[str, Path]:
    """Write one utterance of several systems: ``folder/name-system.wav``.

    The same gain for all of them, so that loudness is compared too: what is too loud for 16 bit turns all of them down.

    Args:
        folder: where.
        name: of the utterance.
        waveforms: system -> mono sound, shape (samples,).
        sample_rate: in Hz.
    """
    loudest = max((float(np.abs(np.asarray(sound)).max(initial=0.0)) for sound in waveforms.values()), default=0.0)
    gain = 1 / max(1.0, loudest)
    return {
        system: write_wav(Path(folder, f"{name}-{system}.wav"), gain * np.asarray(sound), sample_rate)
        for system, sound in waveforms.items()
    }
