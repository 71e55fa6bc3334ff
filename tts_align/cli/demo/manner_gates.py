# SPDX-License-Identifier: Apache-2.0
"""What the manner experiment must show before anything trains on it: manners and qualities that can be heard."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.cli.demo.gates import SAMPLING, Gate
from tts_align.data.demo.audio import Clip
from tts_align.data.demo.manner import MANNERS, QUALITIES, Style
from tts_align.data.demo.sentences import SPEAKERS, Sentence
from tts_align.evaluation.measures.pitch import fundamental_frequency
from tts_align.models.base.generation import Context
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.utils.readers import read_json

SAMPLE_RATE = 16_000
LOWEST, QUIET_SHARE = 4000.0, 0.1
"""Noise is heard where speech is not: above this frequency in Hz, in this share of frames, the quietest."""
_FFT = 512

Say = Callable[[Sentence, str, str, Style, random.Random], Clip]


def median_pitch(audio: Float[Tensor, " time"]) -> float:
    """Median fundamental frequency in Hz of sound at 16 kHz; NaN without a voiced frame."""
    frequency = fundamental_frequency(audio)
    known = frequency[frequency.isfinite()]
    return float(known.median()) if len(known) else math.nan


def noise_level(audio: Float[Tensor, " time"]) -> float:
    """Level of what is always there at high frequencies, in dB, of sound at 16 kHz; NaN where there is none.

    The power of each frequency bin in its quietest frames, averaged in dB: speech comes and goes, noise stays.
    """
    if len(audio) < _FFT:
        return math.nan
    power = torch.stft(audio, _FFT, window=torch.hann_window(_FFT), return_complex=True).abs().square()  # :: (q, f)
    quiet = power[round(LOWEST * _FFT / SAMPLE_RATE) :].clamp_min(1e-10).quantile(QUIET_SHARE, dim=1)
    return float(10 * quiet.log10().mean())


@dataclass(frozen=True)
class StyleRule:
    """Tells manner and quality by two numbers of the sound, without anything that is trained.

    Attributes:
        pitches: Of each voice, the median pitch in Hz from which on it is lively.
        levels: Of each quality but the best, worst first, the noise level in dB from which on it is that bad.
    """

    pitches: Mapping[str, float]
    levels: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> StyleRule:
        """From a JSON file of its attributes."""
        found = read_json(path)
        return cls(found["pitches"], tuple(found["levels"]))

    def manner(self, audio: Float[Tensor, " time"], speaker: str) -> str:
        """Key of `MANNERS`; empty where no pitch is heard."""
        pitch = median_pitch(audio)
        return "" if math.isnan(pitch) else "lively" if pitch >= self.pitches[speaker] else "plain"

    def quality(self, audio: Float[Tensor, " time"]) -> int:
        """Key of `QUALITIES`; 0 where there is nothing to hear."""
        level = noise_level(audio)
        *worse, best = sorted(QUALITIES)
        if math.isnan(level):
            return 0
        return next((score for score, least in zip(worse, self.levels, strict=True) if level >= least), best)


def style_rule(clips: Sequence[Clip], styles: Sequence[Style]) -> StyleRule:
    """Borders between sounds whose style is known: half-way between median pitches, and between the ends of levels.

    Args:
        clips: Some in each voice, manner and quality, as they sound after the codec.
        styles: Of each clip.
    """
    pitches = {}
    for speaker in SPEAKERS:
        centres = []
        for manner in MANNERS:
            chosen = [c for c, s in zip(clips, styles, strict=True) if (c.speaker, s.manner) == (speaker, manner)]
            centres.append(_median([median_pitch(clip.audio) for clip in chosen]))
        pitches[speaker] = math.sqrt(math.prod(centres))
    levels = {
        score: torch.tensor([noise_level(c.audio) for c, s in zip(clips, styles, strict=True) if s.quality == score])
        for score in sorted(QUALITIES)
    }
    borders = [(levels[worse].quantile(0.05) + levels[better].quantile(0.95)) / 2 for worse, better in pairwise(levels)]
    return StyleRule(pitches, tuple(map(float, borders)))


def _median(numbers: Sequence[float]) -> float:
    return float(torch.tensor(numbers, dtype=torch.float64).nanmedian())


def measure_styles(rule: StyleRule, clips: Sequence[Clip], styles: Sequence[Style]) -> list[Gate]:
    """Whether the rule tells the style of sound whose style is known, on clips that it was not made from."""
    manners = [rule.manner(clip.audio, clip.speaker) == style.manner for clip, style in zip(clips, styles, strict=True)]
    qualities = [rule.quality(clip.audio) == style.quality for clip, style in zip(clips, styles, strict=True)]
    return [
        Gate("manner told by pitch after the codec", sum(manners) / len(manners), low=0.95),
        Gate("quality told by noise level after the codec", sum(qualities) / len(qualities), low=0.95),
    ]


def beyond_copies(gates: Sequence[Gate], copied: float) -> list[Gate]:
    """The base's gates, its slips counted beyond those of copied recordings.

    Noise and a high voice cost the codec and the recogniser about two points before any model speaks; in the audio
    experiment it is next to nothing, and the gate of three points is the base's alone.

    Args:
        gates: What `measure_base` found.
        copied: Error rate of copy-synthesised recordings in the corpus's own shares of styles.
    """
    name = "base nearest CER"
    beyond = {gate.name: Gate(f"{name} beyond copies", gate.value - copied, -1.0, gate.high) for gate in gates}
    return [beyond[gate.name] if gate.name == name else gate for gate in gates]


def measure_shares(
    policy: Qwen2CodecLM, vocoder: MelVocoder, rule: StyleRule, sentences: Sequence[Sentence], batch_size: int = 128
) -> list[Gate]:
    """How often the base is lively and clean of its own accord: it must have learnt the shares of the corpus."""
    rows = [(sentence, speaker) for sentence in sentences for speaker in SPEAKERS]
    manners: list[str] = []
    qualities: list[int] = []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        encoded = [policy.encode_text(sentence.text, Context(speaker)) for sentence, speaker in some]
        prompts = [text.prompt(start + row) for row, text in enumerate(encoded)]
        speech = [spoken.speech for spoken in policy.generate(prompts, SAMPLING)]
        audio = vocoder.speak(speech, [speaker for _, speaker in some])
        manners += [rule.manner(sound, speaker) for sound, (_, speaker) in zip(audio, some, strict=True)]
        qualities += [rule.quality(sound) for sound in audio]
    lively, clean = MANNERS["lively"].share, QUALITIES[5].share
    return [
        Gate("base speaks lively", manners.count("lively") / len(rows), lively - 0.06, lively + 0.06),
        Gate("base speaks clean", qualities.count(5) / len(rows), clean - 0.1, clean + 0.1),
    ]
