# SPDX-License-Identifier: Apache-2.0
"""What a comparison says beside its numbers: what fewer errors were bought with, and what makes it unfair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tts_align.evaluation.comparison.numbers import ACCURACY
from tts_align.evaluation.comparison.records import LEVEL, NumberComparison, change
from tts_align.evaluation.comparison.scored import ScoredSystem

WORD_ERRORS = (ACCURACY, "error_rate", "cer", "nearest_cer", "bad_case_ratio")
_PRICES = {"seconds": "shorter", "length": "shorter", "duration_ratio": "hastier", "pitch_spread": "flatter"}
"""What falls when speech becomes so."""


def call_outs(numbers: Sequence[NumberComparison]) -> Iterator[str]:
    """Fewer errors together with a price that somebody pays; before correction, because silence is the costlier error.

    Fewer errors with lower similarity or quality, or with shorter or flatter speech, is how a reward is hacked.
    """
    gains = [one for one in numbers if one.name in WORD_ERRORS and _moved_for_the_better(one)]
    if not gains:
        return
    for one in numbers:
        if one.name in WORD_ERRORS or one.name in ("failures", "finished"):
            continue
        if one.moved < 0 and one.name in _PRICES:
            price = f"the speech became {_PRICES[one.name]}"
        elif one.moved and one.higher_is_better is not None and not _moved_for_the_better(one):
            price = f"{one.title} got worse"
        else:
            continue
        yield (
            f"possible reward hacking: {gains[0].title.removesuffix(', %')} improved ({change(gains[0])}), but "
            f"{price} ({one.title.removesuffix(', %')} {change(one)})"
        )


def _moved_for_the_better(one: NumberComparison) -> bool:
    return bool(one.moved) and (one.moved > 0) == one.higher_is_better


def forgotten(first: ScoredSystem, second: ScoredSystem) -> Iterator[str]:
    """Languages whose general sentences got worse, where both systems are of one test."""
    if first.folder != second.folder or (first.name, second.name) != ("base", "aligned"):
        return
    for language, entry in (second.summary.get("forgetting") or {}).items():
        found = entry.get("difference") or {}
        value, p_value = found.get("value"), found.get("p_value")
        if value is not None and p_value is not None and value > 0 and p_value < LEVEL:
            yield (
                f"possible forgetting: the error rate of general sentences ({language}) rose by {100 * value:.2f} "
                f"points (p = {p_value:.2g})"
            )


def described_measures(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What a summary says of each measure: those among its models that say which way is better."""
    found = {**(summary.get("models") or {}), **(summary.get("measures") or {})}
    return {name: one for name, one in found.items() if isinstance(one, Mapping) and "higher_is_better" in one}


def warnings(first: ScoredSystem, second: ScoredSystem, common: int) -> Iterator[str]:
    """What makes numbers of two folders incomparable."""
    for key in ("protocol", "suite"):
        one, two = first.summary.get(key), second.summary.get(key)
        if first.summary and second.summary and _content(one) != _content(two):
            yield f"the {key} differs: {named(one)} and {named(two)}"
    for name, (one, two) in sorted(_listeners(first.summary, second.summary).items()):
        if one != two:
            yield f"{name} is not the same in both: {one or 'none'} and {two or 'none'}"
    if common < max(len(first.utterances), len(second.utterances)):
        yield (
            f"{common} utterances are in both; {len(first.utterances) - common} only in the first, "
            f"{len(second.utterances) - common} only in the second are left out"
        )


def _content(value: Any) -> Any:
    """A test set wherever it lies; anything else as it is."""
    if isinstance(value, Mapping) and "digest" in value:
        return value.get("name"), value["digest"]
    return value


def named(value: Any) -> str:
    """A protocol, test set or model in a few words."""
    if isinstance(value, Mapping):
        known = (value.get(key) for key in ("name", "class", "model", "version", "digest", "arguments", "weights"))
        return " ".join(str(one) for one in known if one)
    return str(value or "none")


_SPEAKING = ("base", "aligned", "vocoder")
"""Models of a summary that are compared themselves."""


def _listeners(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What listened in both folders, by name; what one of them lacks is no difference."""
    one, two = ({**(s.get("models") or {}), **(s.get("measures") or {})} for s in (first, second))
    return {name: (named(one[name]), named(two[name])) for name in one.keys() & two.keys() if name not in _SPEAKING}
