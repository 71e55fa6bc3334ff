# SPDX-License-Identifier: Apache-2.0
"""What ``test`` writes: one row per utterance, a summary with intervals, and a table to read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tts_align.evaluation.judges.base import Reading
from tts_align.evaluation.metrics.functional import BAD_CER
from tts_align.evaluation.protocols import ErrorCounts, aggregate
from tts_align.evaluation.stages.sound import NOTHING_TO_HEAR
from tts_align.evaluation.statistics.intervals import RESAMPLES, Interval, cluster_bootstrap, paired_difference, wilson
from tts_align.evaluation.table import print_table
from tts_align.evaluation.utterances import SYSTEMS, JudgedUtterance, in_order, read_utterances, system_order, unique
from tts_align.utils.files import write_json, write_json_lines

__all__ = [
    "FURTHER",
    "METRICS",
    "SYSTEMS",
    "JudgedUtterance",
    "print_table",
    "read_utterances",
    "summarise",
    "unique",
    "write_report",
]

Number = Callable[[JudgedUtterance], float]


def _accuracy(one: JudgedUtterance) -> float:
    """Whether the marked word was read right; a sentence without one, or an abstention, has no accuracy."""
    undecided = one.abstained or one.reading == Reading.UNMARKED
    return math.nan if undecided else float(one.reading == Reading.RIGHT)


def _was_spoken(one: JudgedUtterance) -> bool:
    """Whether it was spoken by a policy; of a recording nobody knows how it ended."""
    return bool(one.speech or one.stop_reason)


METRICS: dict[str, Number] = {
    "accuracy": _accuracy,
    "cer": lambda one: one.cer,
    "nearest_cer": lambda one: one.nearest_cer,
    "bad_case_ratio": lambda one: float(one.cer > BAD_CER),
}
"""Name -> number of one utterance with a verdict; NaN where it has none."""

FURTHER: dict[str, Number] = {
    "neither": lambda one: float(one.reading == Reading.NEITHER),
    "finished": lambda one: float(one.finished) if _was_spoken(one) else math.nan,
    "length": lambda one: float(len(one.speech)) if _was_spoken(one) else math.nan,
}
"""What shows whether a system bought its accuracy with something else; length in speech tokens."""

SHARES = ("accuracy", "bad_case_ratio", "neither", "finished")
"""Those that are 0 or 1 for each utterance."""


def summarise(
    utterances: Iterable[JudgedUtterance], resamples: int = RESAMPLES, facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Metrics of all systems with 95 % intervals, and the paired differences of base and aligned.

    Intervals resample sentences, because utterances of one sentence are not independent. An utterance without a verdict
    of one of the systems, or that only one of them has, is no number of either: it is left out of both, and named.

    Args:
        utterances: of one or several systems, in any order; repetitions are dropped.
        resamples: of the bootstrap.
        facts: what the numbers were made with: ``suite``, ``protocol``, ``models``, ``judge_accuracy``.

    Returns:
        For each system the metrics as ``{"value", "low", "high", "n"}``; under ``difference`` aligned minus base, with
        ``p_value``; under ``further`` the same for what is not a metric, the protocol's error rate among them; under
        ``measures`` the same with the model and its digest beside each number; under ``rates`` what the protocol
        aggregates; under ``failures`` the names of missing, silent and otherwise broken utterances by kind; under
        ``failed`` the names of what could not be judged, or is missing.
    """
    facts = facts or {}
    systems = _complete(unique(utterances))
    failed = {system: [one.id for one in rows if one.error] for system, rows in systems.items()}
    left_out = {name for names in failed.values() for name in names}
    judged = {system: [one for one in rows if one.id not in left_out] for system, rows in systems.items()}
    summary: dict[str, Any] = _measure(judged, METRICS, resamples)
    further = dict(FURTHER)
    if any(not math.isnan(one.error_rate) for rows in judged.values() for one in rows):
        further["error_rate"] = lambda one: one.error_rate
        headline = facts.get("protocol", {}).get("headline", "macro")
        summary["rates"] = {system: _rates(rows, headline) for system, rows in judged.items()}
    summary["further"] = _measure(judged, further, resamples)
    names = sorted({name for rows in systems.values() for one in rows for name in one.measures})
    if names:
        numbers: dict[str, Number] = {name: partial(_number, name) for name in names}
        measured = _measure(systems, numbers, resamples)
        summary["measures"] = {part: _named(found, facts.get("models", {})) for part, found in measured.items()}
    summary["failures"] = {system: _failures(rows) for system, rows in systems.items()}
    summary["abstained"] = {system: sum(one.abstained for one in rows) for system, rows in judged.items()}
    return {**summary, "failed": failed, "systems": list(systems), **facts}


def _number(name: str, one: JudgedUtterance) -> float:
    return one.measures.get(name, math.nan)


def _named(numbers: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of measures with the name and digest of the model they come from."""
    found = {}
    for name, number in numbers.items():
        owners = [one for one in models if name == one or name.startswith(f"{one}_")]
        owner = models[max(owners, key=len)] if owners else {}
        found[name] = {**number, "model": owner.get("model", ""), "digest": owner.get("digest", "")}
    return found


def _rates(rows: Sequence[JudgedUtterance], headline: str) -> dict[str, Any]:
    """Macro, corpus and median rates of one system, failures among them."""
    scored = [one for one in rows if one.reference_length is not None]
    counts = [
        ErrorCounts(one.substitutions or 0, one.deletions or 0, one.insertions or 0, one.reference_length or 0)
        for one in scored
    ]
    return dataclasses.asdict(aggregate(counts, [one.failure in NOTHING_TO_HEAR for one in scored], headline))


def _failures(rows: Sequence[JudgedUtterance]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in rows:
        if one.failure:
            found.setdefault(one.failure, []).append(one.id)
    return found


def _measure(
    systems: Mapping[str, list[JudgedUtterance]], numbers: Mapping[str, Number], resamples: int
) -> dict[str, Any]:
    """Each number of each system, and the differences if base and aligned are there."""
    measured: dict[str, Any] = {
        system: {name: _plain(_interval(rows, name, number, resamples)) for name, number in numbers.items()}
        for system, rows in systems.items()
    }
    if set(SYSTEMS) <= set(systems):
        base, aligned = (systems[system] for system in SYSTEMS)
        measured["difference"] = {
            name: _plain(_difference(base, aligned, number, resamples)) for name, number in numbers.items()
        }
    return measured


def _difference(
    base: Sequence[JudgedUtterance], aligned: Sequence[JudgedUtterance], number: Number, resamples: int
) -> Interval:
    """Over the utterances of which both systems have the number."""
    pairs = [(number(one), number(other), one.sentence) for one, other in zip(base, aligned, strict=True)]
    both = [pair for pair in pairs if not (math.isnan(pair[0]) or math.isnan(pair[1]))]
    first, second = [one for one, _, _ in both], [other for _, other, _ in both]
    return paired_difference(first, second, [sentence for _, _, sentence in both], resamples)


def _plain(interval: Interval) -> dict[str, Any]:
    """As JSON has it: no NaN."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in dataclasses.asdict(interval).items()
    }


def _complete(utterances: Sequence[JudgedUtterance]) -> dict[str, list[JudgedUtterance]]:
    """Utterances of each system that spoke, sorted by name; what one of them lacks has an error instead."""
    known = {one.id: one for one in utterances}
    systems: dict[str, list[JudgedUtterance]] = {}
    for system in sorted({one.system for one in utterances}, key=system_order):
        mine = {one.id: one for one in utterances if one.system == system}
        systems[system] = [mine.get(name) or _missing(known[name], system) for name in sorted(known)]
    if not systems:
        raise ValueError("expected at least one utterance to summarise, got none")
    return systems


def _missing(other: JudgedUtterance, system: str) -> JudgedUtterance:
    return JudgedUtterance(other.id, other.sentence, other.text, other.speaker, system, other.seed, error="is missing")


def _interval(rows: Sequence[JudgedUtterance], name: str, number: Number, resamples: int) -> Interval:
    """Cluster bootstrap; Wilson's interval, over sentences, for a share of 0 or 1, where all resamples are the same."""
    pairs = [(value, one.sentence) for one in rows if not math.isnan(value := number(one))]
    values, sentences = [value for value, _ in pairs], [sentence for _, sentence in pairs]
    if name in SHARES and set(values) in ({0.0}, {1.0}):
        count = len(set(sentences))
        return dataclasses.replace(wilson(count * int(values[0]), count), n=len(values))
    return cluster_bootstrap(values, sentences, resamples)


def write_report(
    directory: Path, utterances: Iterable[JudgedUtterance], facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write ``utterances.jsonl`` and ``summary.json``, each whole or not at all; return the summary.

    Args:
        directory: where.
        utterances: of one or several systems.
        facts: see :func:`summarise`.
    """
    rows = in_order(unique(utterances))
    summary = summarise(rows, facts=facts)
    write_json_lines(Path(directory, "utterances.jsonl"), (one.to_row() for one in rows))
    write_json(Path(directory, "summary.json"), summary)
    return summary
