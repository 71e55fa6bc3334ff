# SPDX-License-Identifier: Apache-2.0
"""A benchmark of ambiguous words: sentences in which one word has two readings, and the context says which is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tts_align.data.records import Span
from tts_align.utils.files import read_json_lines

LANGUAGES = ("ja", "zh", "en")
SPLITS = ("train", "dev", "test_sentences", "test_words")
"""The words of ``test_words`` occur in no other split; the other three share theirs, and no sentence."""
PREFIX = "words:"
"""Begins the name of a list of sentences: ``words:ja`` is all of them, ``words:ja/dev`` a split."""


@dataclass(frozen=True)
class MarkedSentence:
    """One sentence with one ambiguous word.

    Args:
        id: unique in all languages.
        language: ja, zh or en.
        text: as written.
        word: the word, in small letters; two characters of a text may be it.
        span: where it stands, with its right and wrong readings: hiragana, pinyin with tone numbers, or ARPAbet.
        spoken: the whole sentence as it is said with the right reading: hiragana, pinyin, or ARPAbet with a bar between
            words.
        spoken_span: where the word lies in that, from the first character to that after the last.
        split: one of ``SPLITS``.
    """

    id: str
    language: str
    text: str
    word: str
    span: Span
    spoken: str
    spoken_span: tuple[int, int]
    split: str

    def spoken_as(self, reading: str) -> str:
        """The whole sentence as it is said with a reading, right or wrong."""
        start, end = self.spoken_span
        return self.spoken[:start] + reading + self.spoken[end:]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> MarkedSentence:
        """Read one line of the benchmark's files."""
        mark = row["spans"][0]
        span = Span(mark["start"], mark["end"], tuple(mark["right"]), tuple(mark["wrong"]))
        start, end = row["spoken_span"]
        plain = {name: row[name] for name in ("id", "language", "text", "word", "spoken", "split")}
        return cls(**plain, span=span, spoken_span=(start, end))


def load(language: str, split: str | None = None) -> tuple[MarkedSentence, ...]:
    """The sentences of a language.

    Args:
        language: ja, zh or en.
        split: train, dev, test_sentences or test_words; ``None`` for all.

    Raises:
        ValueError: there is no such language or split.

    Example:
        >>> one = load("ja", "train")[0]
        >>> one.text[one.span.start : one.span.end], one.span.right, one.span.wrong
        ('辛い', ('からい',), ('つらい',))
    """
    return tuple(MarkedSentence.from_row(row) for _, row in rows(language, split))


def rows(language: str, split: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and columns of each sentence of a language; see :func:`load`."""
    path = file_of(language)
    if split not in (None, *SPLITS):
        raise ValueError(f"unknown split {split!r} of the ambiguous words: expected one of {', '.join(SPLITS)}")
    return ((number, row) for number, row in read_json_lines(path) if split in (None, row["split"]))


def named(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same by a name such as ``words:ja/test_words``."""
    language, _, split = name.removeprefix(PREFIX).partition("/")
    return rows(language, split or None)


def file_of(language: str) -> Path:
    """The file of a language.

    Raises:
        ValueError: there is none.
    """
    if language not in LANGUAGES:
        raise ValueError(f"no ambiguous words in the language {language!r}: expected one of {', '.join(LANGUAGES)}")
    return Path(__file__).with_name(f"{language}.jsonl")
