# SPDX-License-Identifier: Apache-2.0
"""Measures of time and loudness that need no model: duration, silence, clipping, end of speech."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.evaluation.measures.base import MeasuredSample, UtteranceMeasure

FRAME_SECONDS = 0.02
SYLLABIC_SECONDS, KANA_SECONDS, KANJI_SECONDS, DIGIT_SECONDS = 0.22, 0.13, 0.26, 0.35
"""Read speech takes so long for a Chinese character or Korean syllable, a kana, a kanji (about two morae), a digit."""
LETTER_SECONDS = 0.07
"""Of an alphabetic letter: 14 a second."""
_SMALL = "ゃゅょぁぃぅぇぉゎャュョァィゥェォヮ"


def expected_seconds(text: str, language: str = "") -> float:
    """How long read speech of a text takes, by its script; punctuation, spaces and pauses count nothing.

    Args:
        text: as written.
        language: BCP 47 code; without one a text with kana is taken for Japanese.

    Example:
        >>> round(expected_seconds("この鍋は辛い。"), 2)  # five kana and two kanji at .13 and .26 s
        1.04
    """
    scripts = [_script(character) for character in unicodedata.normalize("NFKC", text)]
    japanese = language.lower().startswith("ja") or (not language and "kana" in scripts)
    seconds = {
        "kana": KANA_SECONDS,
        "han": KANJI_SECONDS if japanese else SYLLABIC_SECONDS,
        "hangul": SYLLABIC_SECONDS,
        "digit": DIGIT_SECONDS,
        "letter": LETTER_SECONDS,
    }
    return math.fsum(seconds.get(script, 0.0) for script in scripts)


def _script(character: str) -> str:
    if character in _SMALL:
        return "small"  # belongs to the mora before it
    kind = unicodedata.category(character)
    if kind == "Nd":
        return "digit"
    if not kind.startswith("L"):
        return ""
    name = unicodedata.name(character, "").split(" ")[0]
    known = {"HIRAGANA": "kana", "KATAKANA": "kana", "KATAKANA-HIRAGANA": "kana", "CJK": "han", "HANGUL": "hangul"}
    return known.get(name, "letter")


class DurationRatio(UtteranceMeasure):
    """Length over the length that read speech of the text has: 1 is usual, 0.5 is hasty or cut, 2 slow or babbling."""

    name = "duration_ratio"

    def measure(self, samples: Sequence[MeasuredSample]) -> list[dict[str, float]]:
        """``duration_ratio`` of each utterance; none for a text of which nothing is spoken."""
        return [self._of(one) for one in samples]

    def _of(self, sample: MeasuredSample) -> dict[str, float]:
        expected = expected_seconds(sample.text, sample.language)
        seconds = len(sample.sound.waveform) / sample.sample_rate
        return {self.name: seconds / expected} if expected else {}


def frame_levels(waveform: Float[Tensor, " time"], sample_rate: int) -> Float[Tensor, " f"]:
    """Root mean square of each whole frame of 20 ms, in dB of full scale; at least -120."""
    samples = max(1, round(sample_rate * FRAME_SECONDS))
    frames = waveform[: len(waveform) // samples * samples].double().view(-1, samples)  # :: (time,) -> (f, s)
    return 10 * frames.square().mean(-1).clamp_min(1e-12).log10()


class LongestSilence(UtteranceMeasure):
    """The longest stretch without sound, in seconds, at the ends too.

    Args:
        below: distance in dB from the loudest frame beyond which a frame is silent.
    """

    name = "longest_silence"
    higher_is_better: ClassVar[bool | None] = False

    def __init__(self, below: float = 40.0) -> None:
        super().__init__()
        if below <= 0:
            raise ValueError(f"LongestSilence: below must be more than 0 dB, got {below}")
        self.below = below

    def measure(self, samples: Sequence[MeasuredSample]) -> list[dict[str, float]]:
        """``longest_silence`` of each utterance; silence throughout is its whole length."""
        return [{self.name: self._of(one.sound.waveform, one.sample_rate)} for one in samples]

    def _of(self, waveform: Tensor, sample_rate: int) -> float:
        levels = frame_levels(waveform, sample_rate)
        if not len(levels) or levels.max() <= -100:
            return len(waveform) / sample_rate
        loud = torch.nonzero(levels > levels.max() - self.below).flatten()
        edges = torch.cat([loud.new_tensor([-1]), loud, loud.new_tensor([len(levels)])])
        return float((edges.diff() - 1).max()) * FRAME_SECONDS


class Clipping(UtteranceMeasure):
    """Share of samples at full scale.

    Args:
        level: smallest loudness of a clipped sample, of full scale 1.
    """

    name = "clipping"
    higher_is_better: ClassVar[bool | None] = False

    def __init__(self, level: float = 0.999) -> None:
        super().__init__()
        if not 0 < level <= 1:
            raise ValueError(f"Clipping: level must lie in 0..1, got {level}")
        self.level = level

    def measure(self, samples: Sequence[MeasuredSample]) -> list[dict[str, float]]:
        """``clipping`` of each utterance; none of one without samples."""
        shares = [(one.sound.waveform.abs() >= self.level).float().mean() for one in samples]
        return [{self.name: float(share)} if share.isfinite() else {} for share in shares]


class EndOfSpeech(UtteranceMeasure):
    """Whether the utterance came to an end by itself: 1 if the policy drew end-of-speech, 0 if it was cut off."""

    name = "end_of_speech"
    higher_is_better: ClassVar[bool | None] = True
    needs_audio: ClassVar[bool] = False

    def measure(self, samples: Sequence[MeasuredSample]) -> list[dict[str, float]]:
        """``end_of_speech`` of each utterance of which it is known."""
        return [{} if one.finished is None else {self.name: float(one.finished)} for one in samples]
