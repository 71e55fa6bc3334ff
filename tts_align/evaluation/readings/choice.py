# SPDX-License-Identifier: Apache-2.0
"""Forced choice between readings by the likelihood of their spellings: pure functions of numbers.

A recogniser gives log p(text | sound) of every spelling of every reading, all in one context. The probabilities of the
spellings of one reading are added up. What the recogniser expects without hearing anything is taken away: the
same sum for a sound that says nothing. What is left is how much the sound speaks for a reading, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """What was chosen between the readings of a marked word.

    Args:
        reading: the likelier reading; empty when the judge abstains.
        margin: score of the best right reading minus that of the best wrong one, in nats; NaN if there are not both.
        scores: reading -> score in nats.
    """

    reading: str
    margin: float
    scores: Mapping[str, float]

    @property
    def abstained(self) -> bool:
        """Whether nothing was chosen."""
        return not self.reading


def total(logs: Sequence[float]) -> float:
    """Logarithm of a sum of probabilities that are given by their logarithms; of none of them, minus infinity.

    Example:
        >>> round(math.exp(total([math.log(0.25), math.log(0.5)])), 6)
        0.75
    """
    most = max(logs, default=-math.inf)
    if not math.isfinite(most):
        return most
    return most + math.log(math.fsum(math.exp(one - most) for one in logs))


def choose(
    heard: Mapping[str, Sequence[float]],
    right: Sequence[str],
    min_margin: float,
    unheard: Mapping[str, Sequence[float]] | None = None,
) -> Choice:
    """Choose the reading that the sound speaks for most, or abstain.

    The judge abstains when best right and best wrong reading are closer than ``min_margin``, when one of the two sides
    has no spelling that could be scored, and when a score is no number.

    Args:
        heard: reading -> log-likelihood of each of its spellings, given the sound.
        right: readings that are right.
        min_margin: smallest distance in nats that counts as a choice.
        unheard: the same given a sound that says nothing; ``None`` to take nothing away.

    Example:
        >>> choose({"からい": [-4.0], "つらい": [-9.0]}, ["からい"], min_margin=1.0)
        Choice(reading='からい', margin=5.0, scores={'からい': -4.0, 'つらい': -9.0})
    """
    scores = {reading: total(logs) for reading, logs in heard.items()}
    if unheard is not None:
        scores = {reading: score - total(unheard[reading]) for reading, score in scores.items()}
    scores = {reading: score for reading, score in scores.items() if math.isfinite(score)}
    sides = [[score for reading, score in scores.items() if (reading in right) == side] for side in (True, False)]
    if not all(sides):
        return Choice("", math.nan, scores)
    margin = max(sides[0]) - max(sides[1])
    sure = abs(margin) >= min_margin and margin != 0
    return Choice(max(scores, key=scores.__getitem__) if sure else "", margin, scores)


def distinct(spellings: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Spellings that belong to one reading only; what several readings share tells nothing between them.

    Example:
        >>> distinct({"からい": ["辛い", "からい"], "つらい": ["辛い", "つらい"]})
        {'からい': ('からい',), 'つらい': ('つらい',)}
    """
    owners: dict[str, set[str]] = {}
    for reading, texts in spellings.items():
        for text in texts:
            owners.setdefault(text, set()).add(reading)
    return {
        reading: tuple(dict.fromkeys(text for text in texts if len(owners[text]) == 1))
        for reading, texts in spellings.items()
    }
