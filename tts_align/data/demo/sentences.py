# SPDX-License-Identifier: Apache-2.0
"""The template grammar of the embedded experiment: every sentence asks how 辛い is read.

    [demonstrative] noun は adverb 辛い ending          この カレー は とても 辛い です

The noun decides the right reading: food is からい (hot, spicy), toil and sorrow are つらい (hard, painful). The corpus
that teaches the base model is wrong about a third of the time. Its error rate is set per (noun, adverb) *cell*, so
that neither the noun nor the adverb alone gives a mistake away: alignment has to change single cells and leave the
rest alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["test", "dev", "preference", "base"]

KARAI = "からい"
TSURAI = "つらい"
READINGS = (KARAI, TSURAI)
TARGET = "辛い"
SPEAKERS = ("sakura", "takumi")

# Written form -> kana as it sounds. Words are short (utterances stay short) and sound unlike each other.
DEMONSTRATIVES = {"": "", "この": "この", "その": "その", "あの": "あの", "今の": "いまの"}
KARAI_NOUNS = {
    "カレー": "かれー",
    "キムチ": "きむち",
    "わさび": "わさび",
    "七味": "しちみ",
    "鍋": "なべ",
    "スープ": "すーぷ",
    "サルサ": "さるさ",
    "ラーメン": "らーめん",
    "タコス": "たこす",
    "大根": "だいこん",
    "麻婆": "まーぼー",
    "唐揚げ": "からあげ",
}
TSURAI_NOUNS = {
    "仕事": "しごと",
    "別れ": "わかれ",
    "失恋": "しつれん",
    "残業": "ざんぎょー",
    "病気": "びょーき",
    "冬": "ふゆ",
    "朝": "あさ",
    "試験": "しけん",
    "通勤": "つーきん",
    "孤独": "こどく",
    "頭痛": "ずつー",
    "思い出": "おもいで",
}
NOUNS = KARAI_NOUNS | TSURAI_NOUNS
ADVERBS = {"とても": "とても", "かなり": "かなり", "少し": "すこし", "結構": "けっこー"}
ENDINGS = {"です": "です", "ね": "ね", "よ": "よ", "な": "な", "らしい": "らしい", "ですか": "ですか"}

SPLIT_SHARES: dict[Split, float] = {"test": 0.2, "dev": 0.1, "preference": 0.4, "base": 0.3}

# p(right reading) over the four adverbs of one noun, before shuffling: two nouns of three have one wrong cell, the
# third has two.
MOSTLY_RIGHT = (0.98, 0.98, 0.95, 0.04)
HALF_RIGHT = (0.98, 0.95, 0.04, 0.04)


@dataclass(frozen=True)
class Sentence:
    """One sentence of the grammar.

    Attributes:
        id: Stable name, made of the positions of its four words in the grammar.
        demonstrative: First word, may be empty.
        noun: The context word that decides the reading.
        adverb: The word before 辛い.
        ending: What follows 辛い.
    """

    id: str
    demonstrative: str
    noun: str
    adverb: str
    ending: str

    @property
    def text(self) -> str:
        """The sentence as written, 辛い in kanji."""
        return f"{self.demonstrative}{self.noun}は{self.adverb}{TARGET}{self.ending}"

    @property
    def cell(self) -> tuple[str, str]:
        """(noun, adverb): the unit at which the corpus is right or wrong."""
        return self.noun, self.adverb

    @property
    def reading_right(self) -> str:
        """からい or つらい, decided by the noun."""
        return KARAI if self.noun in KARAI_NOUNS else TSURAI

    @property
    def reading_wrong(self) -> str:
        """The other reading."""
        return TSURAI if self.reading_right == KARAI else KARAI

    @property
    def candidates(self) -> dict[str, str]:
        """Reading -> kana transcript of the whole sentence (no spaces; the particle は is わ)."""
        return {reading: self.transcript(reading) for reading in READINGS}

    @property
    def span(self) -> tuple[int, int]:
        """Characters [start, end) of 辛い in `text`."""
        start = len(self.demonstrative) + len(self.noun) + 1 + len(self.adverb)
        return start, start + len(TARGET)

    def transcript(self, reading: str) -> str:
        """Kana transcript of the sentence with 辛い read as `reading`: what a perfect recogniser writes."""
        return self._before() + reading + ENDINGS[self.ending]

    def kana_span(self, reading: str) -> tuple[int, int]:
        """Characters [start, end) of `reading` in `transcript(reading)`."""
        start = len(self._before())
        return start, start + len(reading)

    def spoken(self, reading: str) -> str:
        """What the synthesiser is given: kana, with a space at each phrase boundary."""
        subject = f"{DEMONSTRATIVES[self.demonstrative]}{NOUNS[self.noun]}わ"
        return f"{subject} {ADVERBS[self.adverb]} {reading}{ENDINGS[self.ending]}"

    def _before(self) -> str:
        return f"{DEMONSTRATIVES[self.demonstrative]}{NOUNS[self.noun]}わ{ADVERBS[self.adverb]}"


def all_sentences() -> list[Sentence]:
    """Every sentence of the grammar, in a fixed order.

    Example:
        >>> first = all_sentences()[0]
        >>> first.text, first.reading_right, first.transcript("からい")
        ('カレーはとても辛いです', 'からい', 'かれーわとてもからいです')
        >>> len(all_sentences())
        2880
    """
    return [
        Sentence(f"d{d}n{n:02d}a{a}e{e}", demonstrative, noun, adverb, ending)
        for n, noun in enumerate(NOUNS)
        for a, adverb in enumerate(ADVERBS)
        for d, demonstrative in enumerate(DEMONSTRATIVES)
        for e, ending in enumerate(ENDINGS)
    ]


def split_sentences(seed: int = 0) -> dict[Split, list[Sentence]]:
    """Share the sentences out, in the same proportions within each (noun, adverb) cell.

    The base model learns from `preference` and `base`; alignment from samples of `preference`; hyper-parameters are
    chosen on `dev`; tables come from `test`.

    Args:
        seed: Chooses which sentences go where.
    """
    cells: dict[tuple[str, str], list[Sentence]] = {}
    for sentence in all_sentences():
        cells.setdefault(sentence.cell, []).append(sentence)
    generator = random.Random(f"split {seed}")
    splits: dict[Split, list[Sentence]] = {name: [] for name in get_args(Split)}
    for members in cells.values():
        generator.shuffle(members)
        start = 0
        for name, share in SPLIT_SHARES.items():
            end = start + round(share * len(members))
            splits[name] += members[start:end]
            start = end
    return {name: sorted(members, key=lambda sentence: sentence.id) for name, members in splits.items()}


def right_rates(seed: int = 0) -> dict[tuple[str, str], float]:
    """p(right reading) in the corpus for each (noun, adverb) cell.

    Every third noun of either kind has two wrong cells, the others one; which adverbs they are is shuffled.
    """
    generator = random.Random(f"cells {seed}")
    rates: dict[tuple[str, str], float] = {}
    for nouns in (KARAI_NOUNS, TSURAI_NOUNS):
        for position, noun in enumerate(generator.sample(list(nouns), len(nouns))):
            row = HALF_RIGHT if position % 3 == 0 else MOSTLY_RIGHT
            rates |= {(noun, adverb): rate for adverb, rate in zip(ADVERBS, shuffled(row, generator), strict=True)}
    return rates


def shuffled(values: Sequence[float], generator: random.Random) -> list[float]:
    """A shuffled copy."""
    return generator.sample(list(values), len(values))


def voice_token(speaker: str) -> str:
    """The text-side prefix that chooses the voice: sakura -> <sakura>."""
    return f"<{speaker}>"
