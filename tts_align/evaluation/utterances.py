# SPDX-License-Identifier: Apache-2.0
"""The rows of ``utterances.jsonl``: one utterance of one system, with all that is known of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tts_align.evaluation.candidates import Candidate
from tts_align.utils.files import read_json_lines

SYSTEMS = ("base", "aligned")
"""Systems of a run: before and after the training. A scored folder of recordings has a name of its own."""


@dataclass(frozen=True)
class JudgedUtterance:
    """One test utterance of one system.

    What is unknown is NaN, empty or ``None``, and left out of the file.

    Args:
        id: the same for both systems: sentence, voice and number; or the name of its recording.
        sentence: name of the sentence.
        text: as written.
        speaker: whose voice.
        system: before or after the training, or the name of another system.
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
        language: BCP 47 code.
        prompt_audio: path of the recording whose voice was asked for.
        target_text: what the protocol compares with, raw.
        normalised_target: the same as it is counted.
        normalised_transcript: the transcript as it is counted.
        spoken_transcript: what a second judge, of readings, heard.
        substitutions: by the protocol.
        deletions: by the protocol.
        insertions: by the protocol.
        reference_length: in the protocol's units.
        error_rate: by the protocol.
        seconds: length of the sound.
        stop_reason: end_of_speech or length_limit, if the utterance was spoken here.
        failure: missing, unreadable, empty, silent, unfinished or clipped; empty for none.
        abstained: whether the judge of readings could not decide.
        measures: further numbers, by name.
        measure_errors: why a measure has no number, by name of its stage.
    """

    id: str
    sentence: str
    text: str
    speaker: str
    system: str
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
    language: str = ""
    prompt_audio: str = ""
    target_text: str = ""
    normalised_target: str | None = None
    normalised_transcript: str | None = None
    spoken_transcript: str | None = None
    substitutions: int | None = None
    deletions: int | None = None
    insertions: int | None = None
    reference_length: int | None = None
    error_rate: float = math.nan
    seconds: float = math.nan
    stop_reason: str = ""
    failure: str = ""
    abstained: bool = False
    measures: Mapping[str, float] = field(default_factory=dict)
    measure_errors: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an utterance with neither a verdict nor a reason."""
        if not self.error and not (self.reading and math.isfinite(self.cer) and math.isfinite(self.nearest_cer)):
            raise ValueError(f"utterance {self.id!r} has neither a verdict nor an error that says why")

    @classmethod
    def of(cls, candidate: Candidate, system: str, audio: str = "", **more: Any) -> JudgedUtterance:
        """A judged candidate as a test utterance.

        Args:
            candidate: with its verdict, or the reason why there is none.
            system: whose it is.
            audio: path of its recording.
            more: columns that the candidate does not know.
        """
        verdict = candidate.verdict
        heard: dict[str, Any] = {"error": candidate.error or "was not judged"}
        if verdict is not None:
            names = ("transcript", "cer", "nearest_cer", "margin")
            heard = {name: getattr(verdict, name) for name in names} | {"reading": str(verdict.reading)}
            heard["abstained"] = str(verdict.reading) == "abstained"
        return cls(
            **{
                "id": candidate.id,
                "sentence": candidate.prompt.id,
                "text": candidate.prompt.text,
                "speaker": candidate.speaker,
                "system": system,
                "seed": candidate.seed,
                "speech": candidate.speech,
                "finished": candidate.finished,
                "audio": audio,
                "language": candidate.prompt.language,
                **heard,
                **more,
            }
        )

    def to_row(self) -> dict[str, Any]:
        """One line of JSON; what is unknown is left out."""
        row = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {name: value for name, value in row.items() if name in _ALWAYS or _is_known(value)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> JudgedUtterance:
        """Read what :meth:`to_row` wrote; columns of later versions are ignored."""
        known = {one.name: row[one.name] for one in dataclasses.fields(cls) if one.name in row}
        return cls(**{**known, "speech": tuple(row["speech"])})


_ALWAYS = frozenset(
    ("id", "sentence", "text", "speaker", "system", "seed", "speech", "finished", "transcript", "reading", "audio")
) | {"error"}
"""Columns that every row has."""


def _is_known(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isnan(value)
    return value is not None and value is not False and value != "" and value != {}


def system_order(system: str) -> tuple[int, str]:
    """Base before aligned, other systems by name behind them."""
    return (SYSTEMS.index(system) if system in SYSTEMS else len(SYSTEMS), system)


def in_order(utterances: Iterable[JudgedUtterance]) -> list[JudgedUtterance]:
    """By name, base before aligned."""
    return sorted(utterances, key=lambda one: (one.id, system_order(one.system)))


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


def read_utterances(path: Path) -> list[JudgedUtterance]:
    """Read ``utterances.jsonl``.

    Raises:
        ValueError: a line is no utterance; the message names file and line.
    """
    found = []
    for number, row in read_json_lines(path):
        try:
            found.append(JudgedUtterance.from_row(row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not an utterance of a test: {error}") from None
    return found
