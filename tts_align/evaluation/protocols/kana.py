# SPDX-License-Identifier: Apache-2.0
"""Japanese by its sound: character error rate between two readings in katakana."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from tts_align.evaluation.protocols.base import MissingExtra, Protocol, primary

_ROWS = {
    "ア": "アカサタナハマヤラワガザダバパァャヮ",
    "イ": "イキシチニヒミリギジビピィ",
    "ウ": "ウクスツヌフムユルグズブプゥュヴ",
    "エ": "エケセテネヘメレゲゼデベペェ",
    "オ": "オコソトノホモヨロゴゾドボポォョ",
}
_KANA = re.compile(r"[\u3041-\u30ff\u0300-\u036f]*")
_SAME_SOUND = str.maketrans("ヂヅヲヰヱ", "ジズオイエ")
_LENGTHENS = {"ア": "ー", "イ": "ー", "ウ": "ー", "エ": "ーイ", "オ": "ーウ"}
_LONG = re.compile(
    "|".join(f"(?<=[{row}])(?P<{vowel}>[{_LENGTHENS[vowel]}]+)" for vowel, row in _ROWS.items()) + "|(?P<other>ー+)"
)
_HIRAGANA_TO_KATAKANA = {code: code + 0x60 for code in (*range(0x3041, 0x3097), 0x309D, 0x309E)}


class _Plain(dict[int, str]):
    """Each character as it is compared, found once: nothing for punctuation, symbols and spaces.

    Args:
        kept: characters that stay as they are.
    """

    def __init__(self, kept: str = "") -> None:
        super().__init__({ord(one): one for one in kept})

    def __missing__(self, code: int) -> str:
        one = chr(code)
        plain = "" if unicodedata.category(one)[0] in "PSZC" else one.translate(_HIRAGANA_TO_KATAKANA)
        self[code] = plain = plain.translate(_SAME_SOUND)
        return plain


_PLAIN, _PLAIN_AND_TAGS = _Plain(), _Plain("<>")
_WITHOUT_TAGS = {ord(one): None for one in "<>"}


def canonical_kana(text: str, tags: bool = False) -> str:
    """A reading with one spelling for each sound.

    NFKC; punctuation, symbols and spaces removed; hiragana as katakana; ヂヅヲヰヱ as ジズオイエ; a long vowel as the
    vowel twice, whether it was written ー, ウ after an o-sound or イ after an e-sound. Particles must be written as
    they sound: ハ and ワ stay apart.

    Args:
        text: kana, and anything else, which stays.
        tags: whether ``<`` and ``>`` stay as well, seen through by the long vowels.

    >>> canonical_kana("がっこう、 ケーエー")
    'ガッコオケエエエ'
    """
    plain = plain_kana(text, tags)
    if not tags:
        return lengthened(plain)
    letters = lengthened(plain.translate(_WITHOUT_TAGS))
    for place, one in enumerate(plain):
        if one in "<>":
            letters = letters[:place] + one + letters[place:]
    return letters


def plain_kana(text: str, tags: bool = False) -> str:
    """The first part of :func:`canonical_kana`: everything but the long vowels.

    Args:
        text: see there.
        tags: see there.
    """
    return unicodedata.normalize("NFKC", text).translate(_PLAIN_AND_TAGS if tags else _PLAIN)


def lengthened(plain: str) -> str:
    """The second part of :func:`canonical_kana`, which keeps every letter's place: each long vowel as the vowel twice.

    Args:
        plain: see :func:`plain_kana`; without tags.

    >>> lengthened("コウイー")
    'コオイイ'
    """
    return _LONG.sub(_vowels, plain) if "ー" in plain or "ウ" in plain or "イ" in plain else plain


def _vowels(found: re.Match[str]) -> str:
    """As many vowels as there are marks; behind what is no vowel, that again; at the beginning, ア."""
    vowel = found.lastgroup
    if vowel == "other":
        start = found.start()
        vowel = found.string[start - 1] if start else "ア"
    return str(vowel) * (found.end() - found.start())


def is_kana(text: str) -> bool:
    """Whether every letter and number of a text is kana.

    >>> is_kana("カレーは、からい。"), is_kana("辛い"), is_kana("3時")
    (True, False, False)
    """
    return _KANA.fullmatch(plain_kana(text)) is not None


def dictionary_kana(text: str) -> str:
    """Reading of a text by pyopenjtalk's dictionary, in kana as pronounced; knows nothing of what was heard.

    Raises:
        MissingExtra: pyopenjtalk is not installed.
    """
    return str(_pyopenjtalk().g2p(text, kana=True)) if text.strip() else ""


@lru_cache(maxsize=1)
def _pyopenjtalk() -> Any:
    try:
        import pyopenjtalk
    except ImportError:
        raise MissingExtra(
            "pyopenjtalk-plus", "protocol kana with text that is not all kana: reading it", "ja"
        ) from None
    return pyopenjtalk


class Kana(Protocol):
    """Character error rate over canonical katakana; the mean over utterances.

    Kana, as a recogniser that writes kana hears it, is compared as it is. Anything with kanji, letters or numbers is
    read by a dictionary first (pyopenjtalk-plus): that forgives spelling, but cannot tell which reading was spoken.
    """

    name = "kana"
    reads = "spoken"

    def normalise(self, text: str, language: str = "") -> str:
        """See :func:`canonical_kana`."""
        plain = plain_kana(text)
        return lengthened(plain) if _KANA.fullmatch(plain) else canonical_kana(dictionary_kana(text))

    def units(self, normalised: str) -> Sequence[str]:
        """Characters."""
        return normalised

    def check(self, languages: Iterable[str]) -> None:
        """Japanese only."""
        if unknown := sorted({primary(language) for language in languages} - {"ja"}):
            raise ValueError(f"protocol kana is for ja, got sentences of language {unknown[0] or '(none given)'}")
