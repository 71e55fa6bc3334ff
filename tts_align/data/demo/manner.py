# SPDX-License-Identifier: Apache-2.0
"""Speech in two manners and three qualities, which the text does not tell: what a reward may then choose between.

Each voice speaks most sentences plainly and some in a lively manner, apart in pitch, pitch range and rate by eSpeak's
own settings; and a share of the recordings is noisy, as a share of every found corpus is. Both hold for a whole
utterance and are drawn independently of the sentence, so that a model that has learnt the corpus gives each manner
and each quality a probability under one and the same prompt.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import torch

from tts_align.data.demo.audio import VOICES, Clip, phrases, synthesise
from tts_align.data.demo.espeak import EspeakPhrase
from tts_align.data.demo.sentences import ADVERBS, DEMONSTRATIVES, ENDINGS, NOUNS, READINGS, SPEAKERS, Sentence


@dataclass(frozen=True)
class Manner:
    """How a whole utterance is spoken, in eSpeak's settings.

    Attributes:
        pitch: Base pitch, 0 to 99.
        pitch_range: How lively the pitch moves, 0 to 99.
        rates: Speaking rates of the variants of a phrase, in words per minute.
        share: Of the utterances of the corpus.
    """

    pitch: int
    pitch_range: int
    rates: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class Quality:
    """How noisy a whole recording is.

    Attributes:
        score: Its mean opinion score, 1 to 5, in the label.
        noise: Standard deviation of the white noise, where the loudest sample of speech has 0.7.
        share: Of the utterances of the corpus.
    """

    score: int
    noise: float
    share: float


MANNERS = {"plain": Manner(55, 30, (355, 370), 0.8), "lively": Manner(73, 75, (325, 340), 0.2)}
QUALITIES = {one.score: one for one in (Quality(5, 0.0, 0.5), Quality(3, 0.003, 0.25), Quality(1, 0.006, 0.25))}


@dataclass(frozen=True)
class Style:
    """Manner and quality of one utterance.

    Attributes:
        manner: Key of `MANNERS`.
        quality: Key of `QUALITIES`.
    """

    manner: str
    quality: int


def draw_style(generator: random.Random) -> Style:
    """A manner and a quality, each by its share."""
    (manner,) = generator.choices(list(MANNERS), [one.share for one in MANNERS.values()])
    (quality,) = generator.choices(list(QUALITIES), [one.share for one in QUALITIES.values()])
    return Style(manner, quality)


class MannerBank:
    """Every phrase of the grammar by every speaker in every manner, each a whole number of tokens long.

    Args:
        token_samples: Samples per speech token.
    """

    def __init__(self, token_samples: int) -> None:
        subjects = [f"{first}{noun}わ" for first in DEMONSTRATIVES.values() for noun in NOUNS.values()]
        predicates = [reading + ending for reading in READINGS for ending in ENDINGS.values()]
        keys = [
            (phrase, speaker, name, rate)
            for speaker in SPEAKERS
            for name, manner in MANNERS.items()
            for rate in manner.rates
            for phrase in (*subjects, *ADVERBS.values(), *predicates)
        ]
        clips = synthesise(
            [
                EspeakPhrase(phrase, VOICES[speaker], rate, MANNERS[name].pitch, MANNERS[name].pitch_range)
                for phrase, speaker, name, rate in keys
            ]
        )
        padded = [torch.nn.functional.pad(clip, (0, -len(clip) % token_samples)) for clip in clips]
        self._clips = dict(zip(keys, padded, strict=True))
        self.digest = hashlib.blake2b(torch.cat(clips).numpy().tobytes(), digest_size=16).hexdigest()
        """Digest of all sound in the bank, but for the noise."""

    def say(self, sentence: Sentence, reading: str, speaker: str, style: Style, generator: random.Random) -> Clip:
        """One rendering of a sentence in one manner and quality; the rate of each phrase is drawn, and the noise."""
        rates = MANNERS[style.manner].rates
        parts = [
            self._clips[phrase, speaker, style.manner, generator.choice(rates)] for phrase in phrases(sentence, reading)
        ]
        noise = torch.Generator().manual_seed(generator.getrandbits(32))
        speech = torch.cat(parts)
        speech = speech + QUALITIES[style.quality].noise * torch.randn(len(speech), generator=noise)
        return Clip(speech, sentence.transcript(reading), speaker)
