# SPDX-License-Identifier: Apache-2.0
"""Recordings to hear: the same sentence before and after the training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from tts_align.utils.audio import write_wav
from tts_align.utils.files import file_name


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
        system: write_wav(
            Path(folder, f"{file_name(name)}-{file_name(system)}.wav"), gain * np.asarray(sound), sample_rate
        )
        for system, sound in waveforms.items()
    }


def keep_only(folder: Path, names: Collection[str], systems: Sequence[str]) -> None:
    """Remove recordings that an earlier test has left: those of its systems that are not among today's.

    Args:
        folder: of the recordings; files with other names stay.
        names: of today's recordings.
        systems: with whose names a test's recordings end.
    """
    for system in systems:
        for path in Path(folder).glob(f"*-{system}.wav"):
            if path.name not in names:
                path.unlink()
