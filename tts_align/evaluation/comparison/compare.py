# SPDX-License-Identifier: Apache-2.0
"""Compare two systems utterance by utterance: mended and broken readings, differences with intervals, regressions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tts_align.evaluation.comparison.numbers import ComparedNumber, compared_numbers
from tts_align.evaluation.comparison.records import (
    FEWEST_SENTENCES,
    LEVEL,
    Comparison,
    NumberComparison,
    Pair,
    Verdict,
)
from tts_align.evaluation.comparison.remarks import call_outs, described_measures, forgotten, warnings
from tts_align.evaluation.comparison.scored import ScoredSystem, ScoredUtterance
from tts_align.evaluation.statistics.intervals import (
    RESAMPLES,
    Interval,
    cluster_bootstrap,
    paired_difference,
    wilson,
)
from tts_align.evaluation.statistics.significance import holm, mcnemar


def compare_systems(first: ScoredSystem, second: ScoredSystem, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare two systems on the utterances that both spoke.

    Args:
        first: the system before.
        second: the system after.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: they have no utterance in common, or one of the same name has another text.
    """
    names = sorted(first.utterances.keys() & second.utterances.keys())
    if not names:
        raise ValueError(
            f"{first.folder} ({first.name}) and {second.folder} ({second.name}) have no utterance in common: compare "
            "what spoke the same sentences in the same voices"
        )
    both = [(first.utterances[name], second.utterances[name]) for name in names]
    _check_texts(both)
    everything = [one for pair in both for one in pair]
    rate = "error_rate" if any("error_rate" in one.row for one in everything) else "cer"
    pairs = [Pair(*one, rate) for one in both]
    described = described_measures(first.summary) | described_measures(second.summary)
    compared = [_number(one, pairs, resamples, seed) for one in compared_numbers(everything, described)]
    numbers = _with_verdicts([one for one in compared if one.difference.n])
    sure = [pair for pair in pairs if pair.first.right is not None and pair.second.right is not None]
    return Comparison(
        first=first,
        second=second,
        pairs=pairs,
        unmatched=sorted(first.utterances.keys() ^ second.utterances.keys()),
        readings=mcnemar([bool(one.first.right) for one in sure], [bool(one.second.right) for one in sure]),
        numbers=numbers,
        call_outs=[*call_outs(numbers), *forgotten(first, second)],
        warnings=list(warnings(first, second, len(names))),
    )


def _check_texts(pairs: Sequence[tuple[ScoredUtterance, ScoredUtterance]]) -> None:
    for one, two in pairs:
        if one.text("text") != two.text("text"):
            raise ValueError(
                f"utterance {one.id!r} is {one.text('text')!r} in {one.folder} and {two.text('text')!r} in "
                f"{two.folder}: compare systems that spoke the same sentences"
            )


def _number(number: ComparedNumber, pairs: Sequence[Pair], resamples: int, seed: int) -> NumberComparison:
    values = [(number.of(pair.first), number.of(pair.second), pair.first.sentence) for pair in pairs]
    values = [one for one in values if math.isfinite(one[0]) and math.isfinite(one[1])]
    before, after = [one[0] for one in values], [one[1] for one in values]
    sentences = [one[2] for one in values]
    difference = paired_difference(before, after, sentences, resamples, seed)
    few = len(set(sentences)) < FEWEST_SENTENCES
    return NumberComparison(
        name=number.name,
        title=number.title,
        higher_is_better=number.higher_is_better,
        first=_interval(before, sentences, resamples, seed),
        second=_interval(after, sentences, resamples, seed),
        difference=difference,
        adjusted_p_value=math.nan,
        verdict="too few sentences" if few else "not shown",
        factor=number.factor,
        decimals=number.decimals,
    )


def _interval(values: Sequence[float], sentences: Sequence[str], resamples: int, seed: int) -> Interval:
    """Cluster bootstrap; Wilson's interval, over sentences, for a share of 0 or 1, where all resamples are the same."""
    if values and set(values) in ({0.0}, {1.0}):
        count = len(set(sentences))
        return dataclasses.replace(wilson(count * int(values[0]), count), n=len(values))
    return cluster_bootstrap(values, sentences, resamples, seed)


def _with_verdicts(numbers: Sequence[NumberComparison]) -> list[NumberComparison]:
    adjusted = holm(
        {one.name: one.difference.p_value if one.verdict != "too few sentences" else math.nan for one in numbers}
    )
    return [
        dataclasses.replace(one, adjusted_p_value=adjusted[one.name], verdict=_verdict(one, adjusted[one.name]))
        for one in numbers
    ]


def _verdict(number: NumberComparison, p_value: float) -> Verdict:
    if math.isnan(p_value):
        return number.verdict
    if p_value >= LEVEL or number.difference.value == 0:
        return "not shown"
    if number.higher_is_better is None:
        return "changed"
    return "better" if (number.difference.value > 0) == number.higher_is_better else "worse"
