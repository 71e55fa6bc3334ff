# SPDX-License-Identifier: Apache-2.0
"""The sound of utterances, and what is plainly wrong with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.measures.base import Sound
from tts_align.evaluation.speaking import waveforms_of
from tts_align.models.base.vocoder import Vocoder
from tts_align.utils.audio import SILENCE, AudioError, load_audio

Failure = Literal["missing", "unreadable", "empty", "silent", "unfinished", "clipped"]
NOTHING_TO_HEAR: tuple[Failure, ...] = ("missing", "unreadable", "empty", "silent")
"""Failures that are scored as if nothing had been said; the others are heard, and named besides."""
_CLIPPED_SHARE, _CLIPPED_LEVEL, _CLIPPED_RUN = 1e-3, 0.99, 3


@dataclass(frozen=True)
class UtteranceSound:
    """An utterance as it sounds.

    Args:
        sound: of it, or ``None``.
        failure: what is wrong with it, or empty.
    """

    sound: Sound | None
    failure: Failure | Literal[""] = ""

    @property
    def is_speech(self) -> bool:
        """Whether there is anything to listen to."""
        return self.failure not in NOTHING_TO_HEAR


class Sounds(ABC):
    """Gives the sound of utterances, once for all stages that hear it."""

    def __init__(self) -> None:
        self._known: dict[str, UtteranceSound] = {}

    def __call__(self, batch: Sequence[Candidate]) -> list[UtteranceSound]:
        """How each utterance sounds, in their order; raises what a vocoder raises."""
        new = [one for one in batch if one.id not in self._known]
        self._known |= dict(zip((one.id for one in new), self._make(new), strict=True))
        return [self._known[one.id] for one in batch]

    @abstractmethod
    def _make(self, batch: Sequence[Candidate]) -> list[UtteranceSound]:
        """How utterances sound that were not asked for yet."""


class Spoken(Sounds):
    """Sound that a vocoder makes of speech tokens; without a vocoder there is none, only tokens.

    Args:
        vocoder: makes it.
    """

    def __init__(self, vocoder: Vocoder | None) -> None:
        super().__init__()
        self.vocoder = vocoder

    def _make(self, batch: Sequence[Candidate]) -> list[UtteranceSound]:
        if self.vocoder is None:
            return [
                UtteranceSound(None, "empty" if not one.speech else "" if one.finished else "unfinished")
                for one in batch
            ]
        said = [one for one in batch if one.speech]
        waveforms = waveforms_of(self.vocoder, said) if said else []
        sounds = {one.id: Sound(wave, self.vocoder.sample_rate) for one, wave in zip(said, waveforms, strict=True)}
        return [
            heard(sounds[one.id], one.finished) if one.id in sounds else UtteranceSound(None, "empty") for one in batch
        ]


class Recorded(Sounds):
    """Sound of recordings of any system.

    Args:
        files: name of the utterance -> its recording; those that are not named are missing.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        super().__init__()
        self.files = files

    def _make(self, batch: Sequence[Candidate]) -> list[UtteranceSound]:
        return [self._read(one.id) for one in batch]

    def _read(self, name: str) -> UtteranceSound:
        if name not in self.files:
            return UtteranceSound(None, "missing")
        try:
            return heard(read_sound(self.files[name]), True)
        except AudioError as error:
            return UtteranceSound(None, "empty" if error.what == "is empty" else "unreadable")


def read_sound(path: Path) -> Sound:
    """A recording at its own rate, its channels averaged.

    Raises:
        AudioError: it cannot be used.
    """
    import soundfile

    if not path.is_file():
        raise AudioError(str(path), "there is no such recording")
    try:
        rate = int(soundfile.info(str(path)).samplerate)
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError) as error:
        raise AudioError(str(path), f"cannot be read as sound: {getattr(error, 'error_string', error)}") from None
    return Sound(load_audio(path, rate, silent=True), rate)


def heard(sound: Sound, finished: bool) -> UtteranceSound:
    """A sound with its failure, if it is one.

    Args:
        sound: of the utterance.
        finished: whether it came to an end by itself.
    """
    if not len(sound.waveform):
        return UtteranceSound(None, "empty")
    if float(sound.waveform.abs().max()) <= SILENCE:
        return UtteranceSound(sound, "silent")
    if not finished:
        return UtteranceSound(sound, "unfinished")
    return UtteranceSound(sound, "clipped" if is_clipped(sound.waveform) else "")


def is_clipped(waveform: Float[Tensor, " time"]) -> bool:
    """Whether more than a thousandth of the samples lie in flat tops: three or more in a row at the peak, near 1.

    A waveform beyond 1 whose tops are round is loud, not clipped: it is turned down when it is written.
    """
    samples = np.asarray(waveform, np.float32)
    high, low = float(samples.max()), float(samples.min())
    flat = 0
    for top in {high, low}:
        if abs(top) < _CLIPPED_LEVEL:
            continue
        # Lengths of the runs of samples at the top.
        edges = np.flatnonzero(np.diff(np.concatenate([[0], (samples == top).astype(np.int8), [0]])))
        lengths = edges[1::2] - edges[::2]
        flat += int(lengths[lengths >= _CLIPPED_RUN].sum())
    return flat > _CLIPPED_SHARE * len(samples)
