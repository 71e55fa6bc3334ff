# SPDX-License-Identifier: Apache-2.0
"""The normalisers of Whisper (arXiv 2212.04356, appendix C), and the error rate of the whole corpus."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from tts_align.evaluation.protocols.base import Protocol, primary
from tts_align.utils.readers import read_json
from tts_align.utils.shards import digest

_WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
"""Languages written without spaces between words: their characters are counted."""
_CACHED = 1 << 16


class Whisper(Protocol):
    """Word error rate after Whisper's normalisers; character error rate where words are not separated by spaces.

    Args:
        spelling: ``normalizer.json`` of a Whisper model's folder, which maps British to American spelling; without it
            spellings are not folded.

    Raises:
        ValueError: the file is not a JSON object of words.
    """

    name = "whisper"
    headline = "corpus"

    def __init__(self, spelling: str | Path | None = None) -> None:
        self._spelling = {} if spelling is None else _read_spelling(Path(spelling))
        self._known: dict[tuple[bool, str], str] = {}

    @cached_property
    def _english(self) -> Callable[[str], str]:
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

        return EnglishTextNormalizer(self._spelling)

    @cached_property
    def _basic(self) -> Callable[[str], str]:
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer

        # Diacritics stay: removing them turns が into か.
        return BasicTextNormalizer(remove_diacritics=False, split_letters=False)

    def normalise(self, text: str, language: str = "") -> str:
        """Whisper's English rules for English, its basic ones for everything else."""
        english = primary(language) == "en"
        key = (english, text)
        if key not in self._known:
            if len(self._known) >= _CACHED:
                self._known.clear()
            self._known[key] = (self._english if english else self._basic)(text).strip()
        found = self._known[key]
        return " ".join(found.replace(" ", "")) if primary(language) in _WITHOUT_SPACES else found

    def identity(self) -> dict[str, str]:
        """The spelling map belongs to it."""
        spelling = digest(sorted(self._spelling.items())) if self._spelling else "none"
        return {**super().identity(), "spelling": spelling}


def _read_spelling(path: Path) -> dict[str, str]:
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(word, str) for word in found.values()):
        raise ValueError(f"{path}: expected an object of words and their spellings, as in a Whisper model's folder")
    return found
