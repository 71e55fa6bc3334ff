# SPDX-License-Identifier: Apache-2.0
"""What a comparison of two systems holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tts_align.evaluation.comparison.scored import ScoredSystem, ScoredUtterance
from tts_align.evaluation.statistics.intervals import Difference, Interval
from tts_align.evaluation.statistics.significance import McNemar

Verdict = Literal["better", "worse", "changed", "not shown", "too few sentences"]
LEVEL = 0.05
FEWEST_SENTENCES = 6
"""With five, even a change for the better in every one has a chance of 1 in 16 either way."""


@dataclass(frozen=True)
class NumberComparison:
    """One number of both systems.

    Args:
        name: of the number.
        title: in tables.
        higher_is_better: ``None`` where neither more nor less is better.
        first: of the first system, over the utterances that have it in both.
        second: of the second system.
        difference: second minus first, paired, with whole sentences resampled.
        adjusted_p_value: by Holm over all numbers that were compared.
        verdict: ``better`` or ``worse`` where the adjusted p-value is below 0.05, ``changed`` where neither way is
            better, ``not shown`` otherwise.
        factor: what it is multiplied with in tables.
        decimals: after the point in tables.
    """

    name: str
    title: str
    higher_is_better: bool | None
    first: Interval
    second: Interval
    difference: Difference
    adjusted_p_value: float
    verdict: Verdict
    factor: float = 1.0
    decimals: int = 2

    @property
    def moved(self) -> int:
        """1 if it rose and -1 if it fell beyond chance, before any correction; 0 otherwise."""
        if self.verdict == "too few sentences" or not self.difference.p_value < LEVEL:
            return 0
        return 1 if self.difference.value > 0 else -1


@dataclass(frozen=True)
class Pair:
    """One utterance of both systems.

    Args:
        first: of the first system.
        second: of the second system.
        rate: name of the error rate that ``worse_by`` is of.
    """

    first: ScoredUtterance
    second: ScoredUtterance
    rate: str = "cer"

    @property
    def mended(self) -> bool:
        """Whether the reading was wrong and is right."""
        return self.first.right is False and self.second.right is True

    @property
    def broken(self) -> bool:
        """Whether the reading was right and is wrong."""
        return self.first.right is True and self.second.right is False

    @property
    def worse_by(self) -> float:
        """How much the error rate rose; 0 if it is not known of both."""
        rise = self.second.number(self.rate) - self.first.number(self.rate)
        return rise if math.isfinite(rise) else 0.0

    @property
    def fails_anew(self) -> bool:
        """Whether the speech has a fault that it did not have."""
        return bool(self.second.at_fault) and not self.first.at_fault

    @property
    def is_regression(self) -> bool:
        """Whether a reading broke, the speech has a new fault, or more of it is wrong."""
        return self.broken or self.fails_anew or self.worse_by > 1e-9

    def to_row(self) -> dict[str, Any]:
        """For ``comparison.json``: what was said before and after, and where to hear it."""
        names = ("reading", "transcript", "failure", "audio", self.rate)
        sides = {
            side: {name: one.row[name] for name in names if one.row.get(name) not in (None, "")}
            for side, one in (("first", self.first), ("second", self.second))
        }
        return {"id": self.first.id, "text": self.first.text("text"), "worse_by": self.worse_by, **sides}


@dataclass(frozen=True)
class Comparison:
    """What became of the utterances that both systems spoke.

    Args:
        first: the system before.
        second: the system after.
        pairs: of all utterances that both have, by name.
        unmatched: utterances that only one of them has.
        readings: mended and broken readings, over the utterances that a judge was sure of in both.
        numbers: what was compared.
        call_outs: fewer errors that may have been bought with something else, in words.
        warnings: why the comparison may not be fair, in words.
    """

    first: ScoredSystem
    second: ScoredSystem
    pairs: Sequence[Pair]
    unmatched: Sequence[str]
    readings: McNemar
    numbers: Sequence[NumberComparison]
    call_outs: Sequence[str]
    warnings: Sequence[str]

    @property
    def mended(self) -> list[Pair]:
        """Utterances whose reading was wrong and is right."""
        return [pair for pair in self.pairs if pair.mended]

    @property
    def regressions(self) -> list[Pair]:
        """What got worse, worst first: broken readings, then new faults, then rising error rates."""
        worse = [pair for pair in self.pairs if pair.is_regression]
        return sorted(worse, key=lambda pair: (-pair.broken, -pair.fails_anew, -pair.worse_by, pair.first.id))

    @property
    def worse(self) -> list[str]:
        """Names of what got worse beyond chance, after correction."""
        return [number.name for number in self.numbers if number.verdict == "worse"]

    def to_json(self) -> dict[str, Any]:
        """What ``comparison.json`` holds."""
        return {
            "first": {"system": self.first.name, "folder": str(self.first.folder)},
            "second": {"system": self.second.name, "folder": str(self.second.folder)},
            "utterances": len(self.pairs),
            "unmatched": list(self.unmatched),
            "readings": dataclasses.asdict(self.readings),
            "numbers": {number.name: _plain(number) for number in self.numbers},
            "call_outs": list(self.call_outs),
            "warnings": list(self.warnings),
            "mended": [pair.to_row() for pair in self.mended],
            "regressions": [pair.to_row() for pair in self.regressions],
        }


def change(one: NumberComparison) -> str:
    """A difference as tables show it.

    >>> from tts_align.evaluation.statistics.intervals import Difference, Interval
    >>> nothing = Interval(0.0, 0.0, 0.0, 1)
    >>> fall = Difference(-0.021, -0.03, -0.01, 90, 0.01)
    >>> change(NumberComparison("cer", "CER, %", False, nothing, nothing, fall, 0.01, "better", 100.0))
    '-2.10 (-3.00 to -1.00)'
    """
    value, low, high = (
        f"{getattr(one.difference, end) * one.factor:+.{one.decimals}f}" for end in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})"


def _plain(number: NumberComparison) -> dict[str, Any]:
    return _without_nan(dataclasses.asdict(number))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
