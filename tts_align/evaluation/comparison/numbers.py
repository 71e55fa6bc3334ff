# SPDX-License-Identifier: Apache-2.0
"""The numbers of an utterance that are compared, and which way each of them is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tts_align.evaluation.comparison.scored import ScoredUtterance
from tts_align.evaluation.measures.base import direction
from tts_align.evaluation.metrics.functional import BAD_CER

ACCURACY = "accuracy"


@dataclass(frozen=True)
class ComparedNumber:
    """A number of an utterance.

    Args:
        name: of the number.
        title: in tables.
        of: its value for one utterance; NaN where it is not defined.
        higher_is_better: ``None`` where neither more nor less is better.
        factor: what it is multiplied with in tables.
        decimals: after the point in tables.
    """

    name: str
    title: str
    of: Callable[[ScoredUtterance], float]
    higher_is_better: bool | None
    factor: float = 1.0
    decimals: int = 2


def _accuracy(one: ScoredUtterance) -> float:
    return math.nan if one.right is None else float(one.right)


def _column(name: str) -> Callable[[ScoredUtterance], float]:
    return lambda one: one.number(name) if one.is_judged else math.nan


def _bad(one: ScoredUtterance) -> float:
    rate = one.number("cer")
    return float(rate > BAD_CER) if one.is_judged and math.isfinite(rate) else math.nan


def _finished(one: ScoredUtterance) -> float:
    return float(one.row["finished"]) if isinstance(one.row.get("finished"), bool) and one.is_judged else math.nan


def _length(one: ScoredUtterance) -> float:
    return float(len(one.row["speech"])) if one.row.get("speech") else math.nan


WORDS = (
    ComparedNumber(ACCURACY, "right readings, %", _accuracy, True, 100.0, 1),
    ComparedNumber("error_rate", "error rate, %", _column("error_rate"), False, 100.0),
    ComparedNumber("cer", "CER, %", _column("cer"), False, 100.0),
    ComparedNumber("nearest_cer", "nearest CER, %", _column("nearest_cer"), False, 100.0),
    ComparedNumber("bad_case_ratio", "bad cases, %", _bad, False, 100.0),
    ComparedNumber("failures", "failures, %", lambda one: float(bool(one.at_fault)), False, 100.0),
    ComparedNumber("finished", "came to an end, %", _finished, True, 100.0, 1),
)
"""What was said."""
LENGTHS = (
    ComparedNumber("seconds", "length, s", lambda one: one.number("seconds"), None),
    ComparedNumber("length", "length, speech tokens", _length, None, 1.0, 1),
)
"""What shows that words were bought with something else."""
KNOWN: dict[str, dict[str, Any]] = {
    **{name: {"higher_is_better": True} for name in ("similarity", "dnsmos", "nisqa", "distillmos", "end_of_speech")},
    **{name: {"higher_is_better": False} for name in ("longest_silence", "clipping", "repetition")},
    **{name: {"higher_is_better": None} for name in ("duration_ratio", "pitch_spread")},
}
"""Directions of the package's own measures, for folders whose summary does not say."""


def compared_numbers(
    utterances: Iterable[ScoredUtterance], described: Mapping[str, Mapping[str, Any]]
) -> list[ComparedNumber]:
    """The numbers that utterances have, in the order of tables.

    Args:
        utterances: of all systems.
        described: what the summaries say of each measure; see :func:`tts_align.evaluation.measures.base.describe`.
    """
    names = sorted({name for one in utterances for name in one.row.get("measures") or {}})
    known = KNOWN | dict(described)
    measured = [
        ComparedNumber(name, name.replace("_", " "), _measure(name), direction(name, known), 1.0, 3) for name in names
    ]
    return [*WORDS, *LENGTHS, *measured]


def _measure(name: str) -> Callable[[ScoredUtterance], float]:
    return lambda one: float((one.row.get("measures") or {}).get(name, math.nan))
