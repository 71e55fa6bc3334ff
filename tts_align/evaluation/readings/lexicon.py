# SPDX-License-Identifier: Apache-2.0
"""A user's own words: how they may be read, and how a recogniser may spell them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_VARIANT = re.compile(r"\(\d+\)$")


@dataclass(frozen=True)
class Lexicon:
    """Words with their readings.

    Args:
        words: word -> reading -> further spellings of that reading.
    """

    words: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    def readings(self, word: str) -> tuple[str, ...]:
        """Readings of a word, those named first first; none if it is not there."""
        return tuple(self._entry(word))

    def spellings(self, word: str, reading: str) -> tuple[str, ...]:
        """Further spellings of a word when it is read so."""
        return self._entry(word).get(reading, ())

    def _entry(self, word: str) -> Mapping[str, tuple[str, ...]]:
        return self.words.get(word) or self.words.get(word.casefold()) or {}


def read_lexicon(path: str | Path | None) -> Lexicon:
    """Read a lexicon: a word a line, in either of two forms.

    With tabs: ``word``, ``reading`` and any number of spellings that a recogniser may write for it, such as
    ``辛い<TAB>からい<TAB>カライ``; a word with several readings has several lines. Without tabs: the form of the CMU
    dictionary, ``READ(1)  R IY1 D``. Blank lines, and lines that begin with ``#`` or ``;;;``, are left out.

    Args:
        path: of the file, in UTF-8; ``None`` for an empty lexicon.

    Raises:
        ValueError: with file and line, for a line without a reading.
    """
    words: dict[str, dict[str, tuple[str, ...]]] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip() or line.startswith(("#", ";;;")):
            continue
        word, *rest = [part.strip() for part in line.split("\t")] if "\t" in line else _cmu(line)
        if not word or not rest or not rest[0]:
            raise ValueError(f"{path}:{number}: expected a word and its reading, with a tab between them, got {line!r}")
        entry = words.setdefault(word, {})
        entry[rest[0]] = (*entry.get(rest[0], ()), *filter(None, rest[1:]))
    return Lexicon(words)


def _lines(path: str | Path | None) -> Sequence[str]:
    if path is None:
        return ()
    try:
        return Path(path).read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"the lexicon {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8 ({error})") from None


def _cmu(line: str) -> list[str]:
    """Word and phonemes of a line of the CMU dictionary; what follows ``#`` there is a remark."""
    word, _, phonemes = line.partition("#")[0].strip().partition(" ")
    return [_VARIANT.sub("", word).casefold(), " ".join(phonemes.split())]
