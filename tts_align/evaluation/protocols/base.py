# SPDX-License-Identifier: Apache-2.0
"""A protocol: everything between a transcript and a number, under a name that stands beside the number."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal

from tts_align.evaluation.protocols.counts import ErrorCounts, Rates, aggregate, count_errors

_SPACES = re.compile(r"\s\s+")


@dataclass(frozen=True)
class Reference:
    """What should have been said, as a test set gives it.

    Args:
        text: as written.
        language: BCP 47 code; empty if unknown.
        spoken: how it is read, in the script of the readings (kana, pinyin); empty if unknown.
        tagged: the same with the word that is tested between ``<`` and ``>``; empty if none is.
        natural: readings of that word which are right.
        marginal: readings which are acceptable.
    """

    text: str
    language: str = ""
    spoken: str = ""
    tagged: str = ""
    natural: tuple[str, ...] = ()
    marginal: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextScore:
    """One utterance's transcript against its reference.

    Args:
        target_text: the reference, raw.
        transcript: what was heard, raw.
        normalised_target: the reference as it is counted.
        normalised_transcript: the transcript as it is counted.
        counts: errors.
        details: further numbers of this protocol, by name.
    """

    target_text: str
    transcript: str
    normalised_target: str
    normalised_transcript: str
    counts: ErrorCounts
    details: Mapping[str, float] = field(default_factory=dict)


class Protocol(ABC):
    """Rules that turn a reference and a transcript into error counts; pure, and the same for every system."""

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    """Of the rules: change it when a number may change."""
    headline: ClassVar[Literal["macro", "corpus"]] = "macro"
    """Which of the rates is reported."""
    reads: ClassVar[Literal["text", "spoken"]] = "text"
    """What a transcript is compared with: the text as written, or its reading where the test set gives one."""

    @abstractmethod
    def normalise(self, text: str, language: str = "") -> str:
        """A reference as it is counted."""

    def normalise_transcript(self, text: str, language: str = "") -> str:
        """A transcript as it is counted: as a reference, unless the protocol says otherwise."""
        return self.normalise(text, language)

    def units(self, normalised: str) -> Sequence[str]:
        """What is counted: words between spaces, as jiwer finds them."""
        return [word for word in _SPACES.sub(" ", normalised).strip().split(" ") if word]

    def count(self, reference: str, hypothesis: str) -> ErrorCounts:
        """Errors between two normalised texts."""
        return count_errors(self.units(reference), self.units(hypothesis))

    def target(self, reference: Reference) -> str:
        """Which form of the reference is compared with."""
        return reference.spoken or reference.text if self.reads == "spoken" else reference.text

    def score(self, reference: Reference, transcript: str, written: str | None = None) -> TextScore:
        """Errors of one utterance; an empty transcript is what a failure counts as.

        Args:
            reference: what should have been said.
            transcript: what was heard.
            written: what another recogniser heard, if one listened besides.
        """
        target = self.target(reference)
        expected = self.normalise(target, reference.language)
        heard = self.normalise_transcript(transcript, reference.language)
        details: dict[str, float] = {}
        score = TextScore(target, transcript, expected, heard, self.count(expected, heard), details)
        details |= self.details(reference, score, written)
        return score

    def details(self, reference: Reference, score: TextScore, written: str | None = None) -> dict[str, float]:
        """Further numbers of one utterance; none by default.

        Args:
            reference: see :meth:`score`.
            score: of the utterance so far: its texts as they are counted, and its errors.
            written: see :meth:`score`.
        """
        del reference, score, written
        return {}

    def aggregate(self, counts: Sequence[ErrorCounts], failed: Sequence[bool] | None = None) -> Rates:
        """Rates over a test set; see :func:`tts_align.evaluation.protocols.counts.aggregate`."""
        return aggregate(counts, failed, self.headline)

    def check(self, languages: Iterable[str]) -> None:
        """Raise for languages without rules, and for packages that are missing; before anything is spoken or heard.

        Args:
            languages: of the test set.

        Raises:
            ValueError: there are no rules for one of them.
            MissingExtra: a package is not installed.
        """
        del languages  # every language has rules, unless a subclass says otherwise

    def identity(self) -> dict[str, str]:
        """What a number depends on besides the two texts."""
        return {"name": self.name, "version": self.version, "headline": self.headline}


@lru_cache(maxsize=1024)
def primary(language: str) -> str:
    """The language of a BCP 47 code, Mandarin as ``zh``.

    >>> [primary(code) for code in ("ja-JP", "cmn-Hans", "EN_us", "")]
    ['ja', 'zh', 'en', '']
    """
    first = re.split(r"[-_]", language.lower(), maxsplit=1)[0]
    return {"cmn": "zh"}.get(first, first)


class MissingExtra(ValueError, ImportError):
    """An optional package is not installed.

    Args:
        package: its name.
        purpose: what needs it.
        extra: of tts-align that brings it.
    """

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'tts-align[{extra}]'")
