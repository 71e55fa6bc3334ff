# SPDX-License-Identifier: Apache-2.0
"""The last stage before the report: the rows of all stages joined, and transcripts scored by a protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Verdict
from tts_align.evaluation.protocols import Protocol, Reference
from tts_align.evaluation.stages.hearing import Listeners, silence_of
from tts_align.evaluation.stages.sound import NOTHING_TO_HEAR
from tts_align.evaluation.stages.store import Row
from tts_align.evaluation.utterances import JudgedUtterance

Rows = Mapping[str, Mapping[str, Row]]
"""Stage -> name of the utterance -> its row."""


def with_verdict(candidate: Candidate, rows: Rows) -> Candidate:
    """A candidate with what the judges said of it; the judge of readings, if there is one, decides on the reading."""
    found = {name: rows[name].get(candidate.id) for name in ("transcribe", "readings") if name in rows}
    errors = [str(row["error"]) for row in found.values() if row is not None and row.get("error")]
    if errors or not found or any(row is None for row in found.values()):
        return dataclasses.replace(candidate, verdict=None, error=errors[0] if errors else candidate.error)
    plain = candidate.to_row()
    verdicts = {name: Candidate.from_row({**plain, **(row or {})}).verdict for name, row in found.items()}
    written, read = verdicts.get("transcribe"), verdicts.get("readings")
    verdict = written or read
    if written is not None and read is not None:
        changes = {name: getattr(read, name) for name in ("reading", "margin", "target_share")}
        extra = {one.name for one in dataclasses.fields(Verdict)} & {"abstained", "readings"}
        verdict = dataclasses.replace(written, **changes, **{name: getattr(read, name) for name in extra})
    return dataclasses.replace(candidate, verdict=verdict, error="")


def judged_utterance(
    candidate: Candidate,
    system: str,
    rows: Rows,
    listeners: Listeners,
    protocol: Protocol | None,
    reference: Reference,
    **columns: Any,
) -> JudgedUtterance:
    """One row of ``utterances.jsonl``.

    Args:
        candidate: as it was spoken or recorded.
        system: whose it is.
        rows: of all listening stages.
        listeners: what listened.
        protocol: scores the transcript, if there is one.
        reference: what should have been said.
        columns: what else is known of it.
    """
    judged = with_verdict(candidate, rows)
    sound = rows["sound"].get(candidate.id) or {}
    failure = str(sound.get("failure", ""))
    more: dict[str, Any] = {"failure": failure, **columns}
    if "seconds" in sound:
        more["seconds"] = sound["seconds"]
    if failure in NOTHING_TO_HEAR and judged.verdict is None and listeners.judge is None:
        judged = dataclasses.replace(judged, verdict=silence_of(judged), error="")
    if "readings" in rows and "transcribe" in rows:
        more["spoken_transcript"] = (rows["readings"].get(candidate.id) or {}).get("transcript")
    if protocol is not None and judged.verdict is not None:
        more |= _scored(judged.verdict.transcript, more.get("spoken_transcript"), protocol, reference)
    measures = dict(more.pop("measures", {}))
    errors = {}
    for name, found in rows.items():
        row = found.get(candidate.id) or {}
        measures |= row.get("measures", {})
        if name.startswith(("similarity-", "quality-")) and row.get("error"):
            errors[name] = str(row["error"])
    return JudgedUtterance.of(judged, system, measures=measures, measure_errors=errors, **more)


def _scored(transcript: str, spoken: str | None, protocol: Protocol, reference: Reference) -> dict[str, Any]:
    """What a protocol says of an utterance; one that compares readings takes the judge of readings' transcript."""
    by_sound = protocol.reads == "spoken" and spoken is not None
    score = protocol.score(reference, spoken or "", transcript) if by_sound else protocol.score(reference, transcript)
    return {
        "target_text": score.target_text,
        "normalised_target": score.normalised_target,
        "normalised_transcript": score.normalised_transcript,
        "substitutions": score.counts.substitutions,
        "deletions": score.counts.deletions,
        "insertions": score.counts.insertions,
        "reference_length": score.counts.reference_length,
        "error_rate": score.counts.rate,
        "measures": dict(score.details),
    }
