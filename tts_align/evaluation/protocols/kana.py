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
_VOWEL = {kana: vowel for vowel, row in _ROWS.items() for kana in row}
_KANA = re.compile(r"[\u3041-\u30ff\u0300-\u036f]*")
_SAME_SOUND = str.maketrans("ヂヅヲヰヱ", "ジズオイエ")
_LONG = {"オウ": "オ", "エイ": "エ"}
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
    plain = unicodedata.normalize("NFKC", text).translate(_PLAIN_AND_TAGS if tags else _PLAIN)
    found: list[str] = []
    before = vowel = "ア"
    for one in plain:
        if one == "ー":
            one = vowel or before
        elif one in "ウイ":
            one = _LONG.get(vowel + one, one)
        found.append(one)
        if one not in "<>":
            before, vowel = one, _VOWEL.get(one, "")
    return "".join(found)


def is_kana(text: str) -> bool:
    """Whether every letter and number of a text is kana.

    >>> is_kana("カレーは、からい。"), is_kana("辛い"), is_kana("3時")
    (True, False, False)
    """
    plain = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    return _KANA.fullmatch(plain) is not None


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
        return canonical_kana(text if is_kana(text) else dictionary_kana(text))

    def units(self, normalised: str) -> Sequence[str]:
        """Characters."""
        return list(normalised)

    def check(self, languages: Iterable[str]) -> None:
        """Japanese only."""
        if unknown := sorted({primary(language) for language in languages} - {"ja"}):
            raise ValueError(f"protocol kana is for ja, got sentences of language {unknown[0] or '(none given)'}")
