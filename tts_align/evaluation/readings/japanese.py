# SPDX-License-Identifier: Apache-2.0
"""Japanese: kana of readings and sentences. pyopenjtalk-plus proposes them; it never judges."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

from tts_align.evaluation.readings.lexicon import Lexicon

_HIRAGANA, _KATAKANA = ord("ぁ"), ord("ァ")
_LAST = ord("ゖ")
_NOT_KANA = re.compile(r"[^ぁ-ゖァ-ヺー]")
_PATHS = 32
_NEEDED = "pip install 'tts-align[ja]', or give the sentence a transcript in kana (column transcripts)"


def hiragana(text: str) -> str:
    """Katakana as hiragana, in full width.

    >>> hiragana("ｶﾗい")
    'からい'
    """
    text = unicodedata.normalize("NFKC", text)
    shift = _KATAKANA - _HIRAGANA
    return "".join(chr(ord(one) - shift) if _KATAKANA <= ord(one) <= _LAST + shift else one for one in text)


def katakana(text: str) -> str:
    """Hiragana as katakana.

    >>> katakana("からい")
    'カライ'
    """
    shift = _KATAKANA - _HIRAGANA
    return "".join(chr(ord(one) + shift) if _HIRAGANA <= ord(one) <= _LAST else one for one in text)


def variants(reading: str) -> tuple[str, ...]:
    """A reading as Japanese writes it: in hiragana and in katakana."""
    plain = hiragana(reading)
    return tuple(dict.fromkeys((plain, katakana(plain))))


def is_kana(text: str) -> bool:
    """Whether a text holds kana and nothing else, spaces and punctuation apart."""
    kept = "".join(one for one in text if unicodedata.category(one)[0] not in "PZSC")
    return bool(kept) and not _NOT_KANA.search(unicodedata.normalize("NFKC", kept))


def only_kana(text: str) -> str:
    """The kana of a text in hiragana, without punctuation and spaces."""
    return hiragana(_NOT_KANA.sub("", unicodedata.normalize("NFKC", text)))


def readings(word: str) -> tuple[str, ...]:
    """Readings in hiragana that the dictionary of pyopenjtalk-plus has for a word as a whole; none without it."""
    jtalk = _open_jtalk()
    if jtalk is None or not word:
        return ()
    found = []
    for path in jtalk.run_mecab_nbest_features(word, max_paths=_PATHS):
        if len(path["features"]) == 1:
            reading = jtalk.run_njd_from_mecab(path["features"])[0]["read"]
            found.append(only_kana(reading))
    return tuple(dict.fromkeys(filter(None, found)))


def sentence(text: str, lexicon: Lexicon) -> str:
    """A text in hiragana as it is pronounced: the particle は as わ.

    Args:
        text: as written.
        lexicon: of the user; the first reading of a word that it has replaces the word.

    Raises:
        ValueError: the text holds more than kana, and pyopenjtalk-plus is not installed.
    """
    for word in sorted(lexicon.words, key=len, reverse=True):
        text = text.replace(word, lexicon.readings(word)[0])
    if not text.strip():
        return ""
    jtalk = _open_jtalk()
    if jtalk is None:
        if is_kana(text):
            return only_kana(text)
        raise ValueError(f"{text!r} is wanted in kana: {_NEEDED}")
    return only_kana(_spoken(text))


@lru_cache(maxsize=4096)
def _spoken(text: str) -> str:
    jtalk = _open_jtalk()
    return jtalk.g2p(text, kana=True).replace("’", "")


@lru_cache(maxsize=1)
def _open_jtalk() -> Any:
    try:
        import pyopenjtalk
    except ImportError:
        return None
    return pyopenjtalk
