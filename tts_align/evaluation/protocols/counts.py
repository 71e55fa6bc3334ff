# SPDX-License-Identifier: Apache-2.0
"""Error counts of one utterance, and the rates of many: pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

HALF = 0.5
"""An error rate above this is counted apart: most such utterances are broken, not misread."""


@dataclass(frozen=True)
class ErrorCounts:
    """Fewest edits that turn a reference into what was heard.

    Their sum is the edit distance, which is unique. Where several ways are equally short, it divides into the kinds as
    jiwer has it, which counts with the same library.

    Args:
        substitutions: units heard as others.
        deletions: units that were not heard.
        insertions: units that were heard besides.
        reference_length: units of the reference.
    """

    substitutions: int
    deletions: int
    insertions: int
    reference_length: int

    @property
    def errors(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits over the reference's length; may exceed 1. Of an empty reference: their number, as jiwer has it.

        >>> ErrorCounts(1, 0, 1, 4).rate
        0.5
        """
        return self.errors / max(self.reference_length, 1)


def count_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCounts:
    """Fewest edits between two sequences of words or characters.

    Args:
        reference: what should have been said.
        hypothesis: what was heard.

    >>> count_errors("the cat sat".split(), "the cat sat down".split())
    ErrorCounts(substitutions=0, deletions=0, insertions=1, reference_length=3)
    """
    edits = Levenshtein.editops(reference, hypothesis).as_list()
    kinds = [kind for kind, _, _ in edits]
    deleted, inserted = kinds.count("delete"), kinds.count("insert")
    return ErrorCounts(len(kinds) - deleted - inserted, deleted, inserted, len(reference))


@dataclass(frozen=True)
class Rates:
    """Error rates of one system over a test set, the failures among them.

    An utterance that failed (missing, unreadable, empty, silent) counts as if nothing had been heard: every unit of its
    reference is a deletion.

    Args:
        headline: name of the rate that the protocol reports: macro or corpus.
        utterances: how many there are, failures included.
        failures: how many of them failed.
        macro: mean of the utterances' rates.
        corpus: all errors over the length of all references.
        median: of the utterances' rates.
        share_above_half: share of utterances with a rate above 50 %.
        macro_below_half: mean rate of the others; ``None`` if there are none.
        macro_without_failures: mean rate of those that did not fail, which is what the official script of Seed-TTS-Eval
            prints; ``None`` if there are none.
        substitutions: of all utterances.
        deletions: of all utterances.
        insertions: of all utterances.
        reference_length: of all utterances.
    """

    headline: str
    utterances: int
    failures: int
    macro: float
    corpus: float
    median: float
    share_above_half: float
    macro_below_half: float | None
    macro_without_failures: float | None
    substitutions: int
    deletions: int
    insertions: int
    reference_length: int


def aggregate(counts: Sequence[ErrorCounts], failed: Sequence[bool] | None = None, headline: str = "macro") -> Rates:
    """Rates over a test set.

    Args:
        counts: of every utterance.
        failed: which of them are failures; none by default.
        headline: macro or corpus.

    Raises:
        ValueError: there is no utterance.
    """
    if not counts:
        raise ValueError("expected at least one utterance to aggregate, got none")
    failed = [False] * len(counts) if failed is None else failed
    rates = [one.rate for one in counts]
    below = [rate for rate in rates if rate <= HALF]
    heard = [rate for rate, fault in zip(rates, failed, strict=True) if not fault]
    length = sum(one.reference_length for one in counts)
    return Rates(
        headline=headline,
        utterances=len(counts),
        failures=sum(failed),
        macro=statistics.fmean(rates),
        corpus=sum(one.errors for one in counts) / max(length, 1),
        median=statistics.median(rates),
        share_above_half=1 - len(below) / len(rates),
        macro_below_half=statistics.fmean(below) if below else None,
        macro_without_failures=statistics.fmean(heard) if heard else None,
        substitutions=sum(one.substitutions for one in counts),
        deletions=sum(one.deletions for one in counts),
        insertions=sum(one.insertions for one in counts),
        reference_length=length,
    )
