# SPDX-License-Identifier: Apache-2.0
"""Speech for the embedded experiment, from eSpeak NG: sentences of the grammar, and free speech that is not.

A sentence is three phrases (subject, adverb, predicate), each synthesised by itself in a few variants and padded to
a whole number of speech tokens. So a phrase has nearly the same tokens wherever it stands, and a model small enough
for a CPU can learn to speak it. Free speech (words of the grammar in any order, between words that do not exist) is
synthesised in one go.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio
from torch import Tensor

from tts_align.data.demo import espeak
from tts_align.data.demo.espeak import EspeakPhrase
from tts_align.data.demo.sentences import ADVERBS, DEMONSTRATIVES, ENDINGS, NOUNS, READINGS, SPEAKERS, Sentence
from tts_align.utils.progress import Bar

SAMPLE_RATE = 16000
VOICES = dict(zip(SPEAKERS, ("ja+f2", "ja+m3"), strict=True))
# Other people, for recognisers that should know more than two voices.
STRANGERS = ("ja+f3", "ja+m7", "ja+f4", "ja+m1")
RATES = (335, 350, 365)
"""Speaking rates of the variants of a phrase: fast, to keep token sequences short."""

# Morae of the made-up words; long vowels and the syllabic ん come after these.
_SYLLABARY = (
    "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわ",
    "がぎぐげござじずぜぞだでどばびぶべぼぱぴぷぺぽ",
)
_MORAE = (*"".join(_SYLLABARY), "きょ", "しょ", "しゅ", "ちょ", "ぎょ", "びょ", "りょ", "じゃ")

ALPHABET = "".join(sorted({kana for mora in _MORAE for kana in mora} | set("んっー")))
"""Every kana a recogniser of this speech writes."""


@dataclass(frozen=True)
class Clip:
    """Speech and what was said.

    Attributes:
        audio: Waveform (s,) at `SAMPLE_RATE`, in [-1, 1].
        kana: Transcript without spaces.
        speaker: Speaker name, or the eSpeak voice of a stranger.
    """

    audio: Tensor
    kana: str
    speaker: str


def synthesise(utterances: Sequence[EspeakPhrase]) -> list[Tensor]:
    """Waveforms at `SAMPLE_RATE`, trimmed of silence and scaled to one peak."""
    resample = torchaudio.transforms.Resample(espeak.SAMPLE_RATE, SAMPLE_RATE)
    return [_trim(resample(torch.from_numpy(clip.astype(np.float32)))) for clip in espeak.synthesise(utterances)]


def _trim(audio: Tensor, margin_samples: int = 80) -> Tensor:
    """Cut what is quieter than 1 % of the peak off both ends, but for a margin, and scale the peak to 0.7."""
    audio = audio / audio.abs().max().clamp_min(1e-6) * 0.7
    loud = (audio.abs() > 0.007).nonzero()
    return audio[max(0, int(loud[0]) - margin_samples) : int(loud[-1]) + margin_samples]


def phrases(sentence: Sentence, reading: str) -> tuple[str, ...]:
    """Kana of the three phrases of a sentence."""
    return tuple(sentence.spoken(reading).split())


class PhraseBank:
    """Every phrase of the grammar by every speaker, in `len(RATES)` variants, each a whole number of tokens long.

    Args:
        token_samples: Samples per speech token.
    """

    def __init__(self, token_samples: int) -> None:
        subjects = [f"{first}{noun}わ" for first in DEMONSTRATIVES.values() for noun in NOUNS.values()]
        predicates = [reading + ending for reading in READINGS for ending in ENDINGS.values()]
        self._keys = [
            (phrase, speaker, rate)
            for speaker in SPEAKERS
            for rate in RATES
            for phrase in (*subjects, *ADVERBS.values(), *predicates)
        ]
        clips = synthesise([EspeakPhrase(phrase, VOICES[speaker], rate) for phrase, speaker, rate in self._keys])
        padded = [torch.nn.functional.pad(clip, (0, -len(clip) % token_samples)) for clip in clips]
        self._clips = dict(zip(self._keys, padded, strict=True))
        self.digest = hashlib.blake2b(torch.cat(clips).numpy().tobytes(), digest_size=16).hexdigest()
        """Digest of all sound in the bank."""

    def say(self, sentence: Sentence, reading: str, speaker: str, generator: random.Random) -> Clip:
        """One rendering of a sentence; the variant of each phrase is drawn."""
        parts = [self._clips[phrase, speaker, generator.choice(RATES)] for phrase in phrases(sentence, reading)]
        return Clip(torch.cat(parts), sentence.transcript(reading), speaker)


def free_speech(count: int, seed: str, voices: Iterable[str]) -> list[Clip]:
    """Clips whose words come in any order, between made-up ones: speech that is no sentence of the grammar.

    Args:
        count: How many clips.
        seed: Chooses words, voices, rates and pitches.
        voices: Names out of `SPEAKERS` or `STRANGERS`.
    """
    generator, names = random.Random(f"free {seed}"), list(voices)
    spoken, speakers, utterances = [], [], []
    for _ in range(count):
        text = " ".join(_free_phrase(generator) for _ in range(generator.choice((1, 2, 2, 3, 3, 4))))
        name = generator.choice(names)
        rate, pitch = generator.randint(300, 380), generator.randint(42, 58)
        spoken.append(text.replace(" ", ""))
        speakers.append(name)
        utterances.append(EspeakPhrase(text, VOICES.get(name, name), rate, 50 if name in VOICES else pitch))
    return [Clip(*each) for each in zip(synthesise(utterances), spoken, speakers, strict=True)]


def _free_phrase(generator: random.Random) -> str:
    """A made-up word, or words of the grammar where they need not belong."""
    kind = generator.random()
    if kind < 0.5:
        word = "".join(_mora(generator) for _ in range(generator.randint(2, 5)))
    elif kind < 0.65:
        word = generator.choice(list(NOUNS.values())) + generator.choice(("", "わ", "も", "が"))
    elif kind < 0.75:
        word = generator.choice(list(ADVERBS.values()))
    else:
        before = generator.choice(("", "", _mora(generator)))
        word = before + generator.choice(READINGS) + generator.choice(("", *ENDINGS.values()))
    return word


def _mora(generator: random.Random) -> str:
    after = generator.choices(("", "ー", "ん"), (0.84, 0.08, 0.08))[0]
    return generator.choice(_MORAE) + after


def speed_jitter(clips: Sequence[Clip], seed: str, share: float = 0.04) -> list[Clip]:
    """The same clips a little faster or slower (and so higher or lower), louder or softer, with a little noise."""
    generator = random.Random(f"jitter {seed}")
    noise = torch.Generator().manual_seed(generator.getrandbits(32))
    jittered = []
    for clip in Bar(clips, desc="jitter", unit="clip", leave=False):
        length = max(1, round(len(clip.audio) * generator.uniform(1 - share, 1 + share)))
        audio = torch.nn.functional.interpolate(clip.audio[None, None], size=length, mode="linear")[0, 0]
        audio = audio * generator.uniform(0.6, 1.2) + torch.randn(length, generator=noise) * generator.uniform(0, 0.003)
        jittered.append(Clip(audio, clip.kana, clip.speaker))
    return jittered
