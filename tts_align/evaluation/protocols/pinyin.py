# SPDX-License-Identifier: Apache-2.0
"""Mandarin by its sound: error rate over syllables in pinyin."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from tts_align.evaluation.protocols.base import MissingExtra, Protocol, Reference, TextScore, primary
from tts_align.evaluation.protocols.counts import count_errors

_HANZI = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff〇]+")
_SYLLABLE = re.compile(r"([a-zü]*[aeiouvü][a-zü]*)[1-5]")


@lru_cache(maxsize=1)
def _pypinyin() -> Any:
    try:
        import pypinyin
    except ImportError:
        raise MissingExtra("pypinyin", "protocol pinyin", "zh") from None
    return pypinyin


def syllables(text: str) -> list[str]:
    """Syllables with tone numbers (5 for the neutral tone); words that are not Chinese in lower case, as they are.

    Args:
        text: in characters, traditional or simplified, or in pinyin with tone numbers.

    Raises:
        MissingExtra: pypinyin is not installed.
    """
    tools = _pypinyin()
    bare = "".join(
        " " if unicodedata.category(one)[0] in "PSZC" and one != "'" else one
        for one in unicodedata.normalize("NFKC", text).lower()
    )
    found: list[str] = []
    start = 0
    for run in [*_HANZI.finditer(bare), None]:
        found += bare[start : len(bare) if run is None else run.start()].split()
        if run is not None:
            found += tools.lazy_pinyin(run[0], style=tools.Style.TONE3, neutral_tone_with_five=True)
            start = run.end()
    return found


@lru_cache(maxsize=4096)
def toneless(syllable: str) -> str:
    """A syllable without its tone.

    >>> [toneless(one) for one in ("chang2", "ma5", "mp3", "42")]
    ['chang', 'ma', 'mp3', '42']
    """
    found = _SYLLABLE.fullmatch(syllable)
    return found[1] if found else syllable


class Pinyin(Protocol):
    """Error rate over syllables with their tones; the mean over utterances. Characters of one sound are equal.

    ``toneless_error_rate``, the same without tones, stands beside it. Characters are read by pypinyin, so which reading
    of a polyphone was spoken shows only where transcript or reference are in pinyin.
    """

    name = "pinyin"
    reads = "spoken"

    def normalise(self, text: str, language: str = "") -> str:
        """Syllables with a space between them."""
        return " ".join(syllables(text))

    def details(self, reference: Reference, score: TextScore, written: str | None = None) -> dict[str, float]:
        """The error rate without tones."""
        del reference, written
        texts = (score.normalised_target, score.normalised_transcript)
        expected, heard = ([toneless(one) for one in text.split()] for text in texts)
        return {"toneless_error_rate": count_errors(expected, heard).rate}

    def check(self, languages: Iterable[str]) -> None:
        """Mandarin only; needs pypinyin."""
        if unknown := sorted({primary(language) for language in languages} - {"zh"}):
            raise ValueError(f"protocol pinyin is for zh, got sentences of language {unknown[0] or '(none given)'}")
        _pypinyin()
