# SPDX-License-Identifier: Apache-2.0
"""Mandarin: pinyin with tones, and characters of one sound only. pypinyin proposes them; it never judges."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from itertools import islice, product
from typing import Any

from tts_align.evaluation.readings.lexicon import Lexicon

_MARKS = {"\u0304": "1", "\u0301": "2", "\u030c": "3", "\u0300": "4"}
_COMMON_ROWS = range(0xB0, 0xD8)
"""First bytes of the 3,755 characters of the first level of GB 2312, the common ones."""
_MOST_HOMOPHONES = 8
_NEEDED = "pip install 'tts-align[mandarin]', or give the sentence a transcript in pinyin (column transcripts)"


def numbered(pinyin: str) -> str:
    """Pinyin with the number of each syllable's tone behind it, 5 for the neutral one, and ``v`` for ü.

    >>> numbered("zhǎng dà"), numbered("lv4 de"), numbered("nǚ")
    ('zhang3 da4', 'lv4 de5', 'nv3')
    """
    return " ".join(_syllable(one) for one in pinyin.replace("'", " ").split())


def _syllable(one: str) -> str:
    tone, letters = "", []
    for letter in unicodedata.normalize("NFD", one.lower()).replace("u\u0308", "ü").replace("u:", "ü"):
        if letter in _MARKS:
            tone = _MARKS[letter]
        elif letter.isdigit():
            tone = "5" if letter == "0" else letter
        else:
            letters.append(letter)
    # A tone mark may stand between u and its two dots.
    plain = "".join(letters).replace("u\u0308", "v").replace("ü", "v")
    return f"{plain}{tone or '5'}"


def readings(word: str) -> tuple[str, ...]:
    """Readings that pypinyin knows for a single character, or its one reading of a longer word; none without it."""
    pypinyin = _pypinyin()
    if pypinyin is None or not word:
        return ()
    style = {"style": pypinyin.Style.TONE3, "neutral_tone_with_five": True}
    if len(word) > 1:
        return (" ".join(pypinyin.lazy_pinyin(word, **style)),)
    return tuple(pypinyin.pinyin(word, heteronym=True, **style)[0])


def homophones(word: str, reading: str) -> tuple[str, ...]:
    """Common characters that are read so and in no other way, one for each character of a word.

    Args:
        word: as written; its own characters are left out.
        reading: pinyin with tones, a syllable for each character.
    """
    syllables = numbered(reading).split()
    if len(syllables) != len(word) or _pypinyin() is None:
        return ()
    few = _MOST_HOMOPHONES if len(word) == 1 else 2
    each = [[one for one in _one_sound().get(syllable, ()) if one not in word][:few] for syllable in syllables]
    return tuple("".join(letters) for letters in islice(product(*each), _MOST_HOMOPHONES))


def sentence(text: str, lexicon: Lexicon) -> str:
    """A text as numbered pinyin; what is no hanzi is left out.

    Args:
        text: as written.
        lexicon: of the user; the first reading of a word that it has is taken.

    Raises:
        ValueError: pypinyin is not installed.
    """
    return " ".join(_each(text, lexicon))


def around(text: str, start: int, end: int, lexicon: Lexicon) -> tuple[str, str]:
    """Numbered pinyin of what stands before and after a marked word, each character read in its whole sentence.

    Args:
        text: as written.
        start: first character of the marked word.
        end: character after its last.
        lexicon: of the user.
    """
    syllables = _each(text, lexicon)
    places = [place for place, one in enumerate(text) if _is_hanzi(one)]
    pairs = list(zip(places, syllables, strict=True))
    before = " ".join(one for place, one in pairs if place < start)
    return before, " ".join(one for place, one in pairs if place >= end)


def _each(text: str, lexicon: Lexicon) -> list[str]:
    """One syllable for each hanzi of a text."""
    pypinyin = _pypinyin()
    if pypinyin is None:
        raise ValueError(f"{text!r} is wanted in pinyin: {_NEEDED}")
    found = pypinyin.lazy_pinyin(
        text, style=pypinyin.Style.TONE3, neutral_tone_with_five=True, errors=lambda other: [""] * len(other)
    )
    for word in sorted(lexicon.words, key=len):
        own = numbered(lexicon.readings(word)[0]).split()
        for match in re.finditer(re.escape(word), text):
            if len(own) == len(word):
                found[match.start() : match.end()] = own
    return [one for one, letter in zip(found, text, strict=True) if _is_hanzi(letter)]


def _is_hanzi(letter: str) -> bool:
    return "\u4e00" <= letter <= "\u9fff" or "\u3400" <= letter <= "\u4dbf"


@lru_cache(maxsize=1)
def _one_sound() -> dict[str, list[str]]:
    """Syllable -> common characters that have no other reading."""
    pypinyin = _pypinyin()
    found: dict[str, list[str]] = {}
    for first in _COMMON_ROWS:
        for second in range(0xA1, 0xFF):
            try:
                letter = bytes((first, second)).decode("gb2312")
            except UnicodeDecodeError:  # a row with fewer characters
                continue
            style = {"style": pypinyin.Style.TONE3, "neutral_tone_with_five": True}
            sounds = pypinyin.pinyin(letter, heteronym=True, **style)[0]
            if len(sounds) == 1:
                found.setdefault(sounds[0], []).append(letter)
    return found


@lru_cache(maxsize=1)
def _pypinyin() -> Any:
    try:
        import pypinyin
    except ImportError:
        return None
    return pypinyin
