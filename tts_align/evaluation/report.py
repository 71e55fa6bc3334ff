# SPDX-License-Identifier: Apache-2.0
"""What ``test`` writes: one row per utterance, a summary with intervals, and a table to read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Reading
from tts_align.evaluation.metrics.functional import BAD_CER
from tts_align.evaluation.statistics.intervals import (
    RESAMPLES,
    Interval,
    cluster_bootstrap,
    paired_difference,
    wilson,
)
from tts_align.evaluation.table import print_table
from tts_align.utils.files import read_json_lines, write_json, write_json_lines

__all__ = ["JudgedUtterance", "print_table", "read_utterances", "summarise", "unique", "write_report"]

System = Literal["base", "aligned"]
SYSTEMS: tuple[System, ...] = get_args(System)


@dataclass(frozen=True)
class JudgedUtterance:
    """One test utterance of one system.

    Args:
        id: the same for both systems: sentence, voice and number.
        sentence: name of the sentence.
        text: as written.
        speaker: whose voice.
        system: before or after the training.
        seed: what it was drawn with.
        speech: speech tokens.
        finished: whether it came to an end by itself.
        transcript: what the judge heard.
        reading: of the marked word; empty when there is no verdict.
        cer: character error rate against the right reading; NaN without a verdict.
        nearest_cer: against the nearer reading; NaN without a verdict.
        margin: log-likelihood of right minus wrong reading in nats; NaN if the judge gives none.
        audio: path of the recording, or empty.
        error: why there is no verdict, or empty.
    """

    id: str
    sentence: str
    text: str
    speaker: str
    system: System
    seed: int
    speech: tuple[int, ...] = ()
    finished: bool = False
    transcript: str = ""
    reading: str = ""
    cer: float = math.nan
    nearest_cer: float = math.nan
    margin: float = math.nan
    audio: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        """Refuse an utterance with neither a verdict nor a reason."""
        if not self.error and not (self.reading and math.isfinite(self.cer) and math.isfinite(self.nearest_cer)):
            raise ValueError(f"utterance {self.id!r} has neither a verdict nor an error that says why")

    @classmethod
    def of(cls, candidate: Candidate, system: System, audio: str = "") -> JudgedUtterance:
        """A judged candidate as a test utterance."""
        verdict = candidate.verdict
        heard: dict[str, Any] = {"error": candidate.error or "was not judged"}
        if verdict is not None:
            names = ("transcript", "cer", "nearest_cer", "margin")
            heard = {name: getattr(verdict, name) for name in names} | {"reading": str(verdict.reading)}
        return cls(
            id=candidate.id,
            sentence=candidate.prompt.id,
            text=candidate.prompt.text,
            speaker=candidate.speaker,
            system=system,
            seed=candidate.seed,
            speech=candidate.speech,
            finished=candidate.finished,
            audio=audio,
            **heard,
        )

    def to_row(self) -> dict[str, Any]:
        """One line of JSON; numbers that are NaN are left out."""
        row = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {name: value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> JudgedUtterance:
        """Read what :meth:`to_row` wrote."""
        if row["system"] not in SYSTEMS:
            raise ValueError(f"expected system to be one of {', '.join(SYSTEMS)}, got {row['system']!r}")
        return cls(**{**row, "speech": tuple(row["speech"])})


Number = Callable[[JudgedUtterance], float]

METRICS: dict[str, Number] = {
    "accuracy": lambda one: float(one.reading in (Reading.RIGHT, Reading.UNMARKED)),
    "cer": lambda one: one.cer,
    "nearest_cer": lambda one: one.nearest_cer,
    "bad_case_ratio": lambda one: float(one.cer > BAD_CER),
}
"""Name -> number of one utterance with a verdict. Nothing to misread counts as right."""

FURTHER: dict[str, Number] = {
    "neither": lambda one: float(one.reading == Reading.NEITHER),
    "finished": lambda one: float(one.finished),
    "length": lambda one: float(len(one.speech)),
}
"""What shows whether a system bought its accuracy with something else; length in speech tokens."""

SHARES = ("accuracy", "bad_case_ratio", "neither", "finished")
"""Those that are 0 or 1 for each utterance."""


def unique(utterances: Iterable[JudgedUtterance]) -> list[JudgedUtterance]:
    """Utterances without repetitions, as processes may repeat some; the same name must mean the same utterance.

    Raises:
        ValueError: two utterances of one system have the same name but different content.
    """
    found: dict[tuple[str, str], JudgedUtterance] = {}
    for one in utterances:
        other = found.setdefault((one.system, one.id), one)
        if other is one:
            continue
        mine, its = one.to_row(), other.to_row()
        if wrong := sorted(name for name in mine.keys() | its.keys() if mine.get(name) != its.get(name)):
            raise ValueError(f"utterance {one.id!r} of system {one.system} appears twice, with different {wrong[0]}")
    return list(found.values())


def summarise(utterances: Iterable[JudgedUtterance], resamples: int = RESAMPLES) -> dict[str, Any]:
    """Metrics of both systems with 95 % intervals, and their paired differences.

    Intervals resample sentences, because utterances of one sentence are not independent. An utterance without a verdict
    of one of the systems, or that only one of them has, is no number of either: it is left out of both, and named.

    Args:
        utterances: of one or both systems, in any order; repetitions are dropped.
        resamples: of the bootstrap.

    Returns:
        For each system the metrics as ``{"value", "low", "high", "n"}``; under ``difference`` aligned minus base, with
        ``p_value``; under ``further`` the same for what is not a metric; under ``failed`` the names of what could
        not be judged, or is missing.
    """
    systems = _complete(unique(utterances))
    failed = {system: [one.id for one in rows if one.error] for system, rows in systems.items()}
    left_out = {name for names in failed.values() for name in names}
    judged = {system: [one for one in rows if one.id not in left_out] for system, rows in systems.items()}
    summary: dict[str, Any] = _measure(judged, METRICS, resamples)
    summary["further"] = _measure(judged, FURTHER, resamples)
    summary["failed"] = failed
    return summary


def _measure(
    systems: Mapping[System, list[JudgedUtterance]], numbers: Mapping[str, Number], resamples: int
) -> dict[str, Any]:
    """Each number of each system, and the differences if there are two systems."""
    measured: dict[str, Any] = {
        system: {name: _plain(_interval(rows, name, number, resamples)) for name, number in numbers.items()}
        for system, rows in systems.items()
    }
    if len(systems) == len(SYSTEMS):
        base, aligned = (systems[system] for system in SYSTEMS)
        clusters = [one.sentence for one in base]
        measured["difference"] = {
            name: _plain(paired_difference(list(map(number, base)), list(map(number, aligned)), clusters, resamples))
            for name, number in numbers.items()
        }
    return measured


def _plain(interval: Interval) -> dict[str, Any]:
    """As JSON has it: no NaN."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in dataclasses.asdict(interval).items()
    }


def _complete(utterances: Sequence[JudgedUtterance]) -> dict[System, list[JudgedUtterance]]:
    """Utterances of each system that spoke, sorted by name; what one of them lacks has an error instead."""
    known = {one.id: one for one in utterances}
    systems: dict[System, list[JudgedUtterance]] = {}
    for system in SYSTEMS:
        mine = {one.id: one for one in utterances if one.system == system}
        if mine:
            systems[system] = [mine.get(name) or _missing(known[name], system) for name in sorted(known)]
    if not systems:
        raise ValueError("expected at least one utterance to summarise, got none")
    return systems


def _missing(other: JudgedUtterance, system: System) -> JudgedUtterance:
    return JudgedUtterance(other.id, other.sentence, other.text, other.speaker, system, other.seed, error="is missing")


def _interval(rows: Sequence[JudgedUtterance], name: str, number: Number, resamples: int) -> Interval:
    """Cluster bootstrap; Wilson's interval, over sentences, for a share of 0 or 1, where all resamples are the same."""
    values = [number(one) for one in rows]
    if name in SHARES and set(values) in ({0.0}, {1.0}):
        sentences = len({one.sentence for one in rows})
        return dataclasses.replace(wilson(sentences * int(values[0]), sentences), n=len(rows))
    return cluster_bootstrap(values, [one.sentence for one in rows], resamples)


def write_report(directory: Path, utterances: Iterable[JudgedUtterance]) -> dict[str, Any]:
    """Write ``utterances.jsonl`` and ``summary.json``, each whole or not at all; return the summary."""
    rows = sorted(unique(utterances), key=lambda one: (one.id, SYSTEMS.index(one.system)))
    summary = summarise(rows)
    write_json_lines(Path(directory, "utterances.jsonl"), (one.to_row() for one in rows))
    write_json(Path(directory, "summary.json"), summary)
    return summary


def read_utterances(path: Path) -> list[JudgedUtterance]:
    """Read ``utterances.jsonl``."""
    found = []
    for number, row in read_json_lines(path):
        try:
            found.append(JudgedUtterance.from_row(row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not an utterance of a test: {error}") from None
    return found
