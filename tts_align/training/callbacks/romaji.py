# SPDX-License-Identifier: Apache-2.0
"""Kana in Latin letters (Hepburn), for figures: the fonts that come with matplotlib have no kana."""

from __future__ import annotations

import unicodedata

_VOWELS = "aiueo"
_ROWS = {
    "": "あいうえお",
    "k": "かきくけこ",
    "g": "がぎぐげご",
    "s": "さしすせそ",
    "z": "ざじずぜぞ",
    "t": "たちつてと",
    "d": "だぢづでど",
    "n": "なにぬねの",
    "h": "はひふへほ",
    "b": "ばびぶべぼ",
    "p": "ぱぴぷぺぽ",
    "m": "まみむめも",
    "r": "らりるれろ",
}
_KANA = {kana: row + vowel for row, line in _ROWS.items() for kana, vowel in zip(line, _VOWELS, strict=True)}
_KANA |= dict(zip("やゆよわをんゔ", ("ya", "yu", "yo", "wa", "o", "n", "vu"), strict=True))
_KANA |= {"し": "shi", "ち": "chi", "つ": "tsu", "ふ": "fu", "じ": "ji", "ぢ": "ji", "づ": "zu"}
_SMALL_Y = {"ゃ": "ya", "ゅ": "yu", "ょ": "yo"}
_SMALL_VOWELS = dict(zip("ぁぃぅぇぉ", _VOWELS, strict=True))


def romaji(kana: str) -> str:
    """A word in Latin letters; what is not kana stays.

    Example:
        >>> romaji("つらい"), romaji("らーめん"), romaji("けっこー"), romaji("ざんぎょー")
        ('tsurai', 'rāmen', 'kekkō', 'zangyō')
    """
    return "".join(letters for letters, _ in morae(kana))


def morae(kana: str) -> list[tuple[str, int]]:
    """Pieces in Latin letters, and how many kana each stands for; the long mark and small kana join what precedes them.

    Example:
        >>> morae("しちみわ"), morae("びょーき")
        ([('shi', 1), ('chi', 1), ('mi', 1), ('wa', 1)], [('byō', 3), ('ki', 1)])
    """
    pieces: list[tuple[str, int]] = []
    doubled = 0
    for sound in _hiragana(kana):
        if sound == "っ":
            doubled += 1
        elif pieces and not doubled and sound in _SMALL_Y | _SMALL_VOWELS and pieces[-1][0][-1:] in _VOWELS:
            pieces[-1] = (_contract(pieces[-1][0], sound), pieces[-1][1] + 1)
        elif pieces and not doubled and sound == "ー":
            pieces[-1] = (_long(pieces[-1][0]), pieces[-1][1] + 1)
        else:
            letters = (_KANA | _SMALL_Y | _SMALL_VOWELS).get(sound, sound)
            double = ("t" if letters.startswith("ch") else letters[:1]) if doubled else ""
            pieces.append((double + letters, 1 + doubled))
            doubled = 0
    return [*pieces, ("'", doubled)] if doubled else pieces


def _hiragana(kana: str) -> str:
    folded = unicodedata.normalize("NFKC", kana)
    return "".join(chr(ord(one) - 0x60) if "ァ" <= one <= "ヴ" else one for one in folded)


def _contract(letters: str, small: str) -> str:
    """き + ょ -> kyo, し + ょ -> sho, ふ + ぁ -> fa."""
    stem = letters[:-1]
    if small in _SMALL_VOWELS:
        return stem + _SMALL_VOWELS[small]
    return stem + (_SMALL_Y[small][1:] if stem.endswith(("sh", "ch", "j")) else _SMALL_Y[small])


def _long(letters: str) -> str:
    return unicodedata.normalize("NFC", letters + "\N{COMBINING MACRON}")
