# SPDX-License-Identifier: Apache-2.0
"""Scored folders, as ``test`` and ``score`` write them, and the utterances of one system in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tts_align.evaluation.columns import are_numbers, is_number, wrong_types
from tts_align.evaluation.judges.base import Reading
from tts_align.utils.files import read_json_lines
from tts_align.utils.readers import ReadError, read_json_object

UTTERANCES, SUMMARY, TEST = "utterances.jsonl", "summary.json", "test"
NEWEST = "aligned"
"""System of a run that is compared with another run."""
_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("sentence", "text", "reading", "transcript", "audio", "failure", "error"), (str,)),
    **dict.fromkeys(("language", "speaker", "system"), (str,)),
    **dict.fromkeys(("cer", "nearest_cer", "error_rate", "seconds"), (int, float)),
}
"""What the columns hold that are compared or shown."""
_MARKED = (Reading.RIGHT, Reading.WRONG, Reading.NEITHER)


@dataclass(frozen=True)
class ScoredUtterance:
    """One utterance of one system, read from its row; what the row does not have is NaN, empty or ``None``.

    Args:
        row: as it stands in ``utterances.jsonl``.
        folder: that paths in it start from.
    """

    row: Mapping[str, Any]
    folder: Path

    @property
    def id(self) -> str:
        """The same in every system."""
        return str(self.row["id"])

    @property
    def sentence(self) -> str:
        """Name of the sentence."""
        return str(self.row.get("sentence") or self.id)

    def text(self, name: str) -> str:
        """A column of text; empty if it is missing."""
        return str(self.row.get(name) or "")

    def number(self, name: str) -> float:
        """A column, or a measure, as a number; NaN if it is missing."""
        value = self.row.get(name, (self.row.get("measures") or {}).get(name))
        return math.nan if value is None else float(value)

    @property
    def at_fault(self) -> str:
        """Name of the fault of the speech itself, such as ``silent``; empty if there is none."""
        return self.text("failure")

    @property
    def is_judged(self) -> bool:
        """Whether its words are known; speech that nobody can understand is judged: none of its words is there."""
        return bool(self.at_fault) or not self.row.get("error")

    @property
    def right(self) -> bool | None:
        """Whether the marked word was read right; ``None`` without a marked word or a judge who is sure."""
        if self.row.get("abstained") or not self.is_judged:
            return None
        reading = self.text("reading")
        if reading in _MARKED:
            return reading == Reading.RIGHT
        return None

    @property
    def audio(self) -> Path | None:
        """Its recording, if there is one."""
        path = self.folder / self.text("audio")
        return path if self.text("audio") and path.is_file() else None


@dataclass(frozen=True)
class ScoredSystem:
    """All utterances of one system.

    Args:
        name: what tables call it.
        folder: where it was scored.
        utterances: by name.
        summary: of its folder; empty if there is none.
    """

    name: str
    folder: Path
    utterances: Mapping[str, ScoredUtterance]
    summary: Mapping[str, Any]


def scored_folder(path: Path) -> Path:
    """The folder with the utterances: that of a run's test, or the folder itself.

    Raises:
        ValueError: neither holds any.
    """
    for folder in (Path(path) / TEST, Path(path)):
        if (folder / UTTERANCES).is_file():
            return folder
    raise ValueError(
        f"{path} holds no {UTTERANCES} and no {TEST}/{UTTERANCES}: give the directory of a tested run (tts-align test) "
        "or a folder that tts-align score wrote"
    )


def read_systems(path: Path) -> dict[str, ScoredSystem]:
    """The systems of a run or scored folder, by name.

    Raises:
        ValueError: with file and line of the first row that is no utterance, or that appears twice.
    """
    folder = scored_folder(path)
    read = _read_summary(folder / SUMMARY)
    found: dict[str, dict[str, ScoredUtterance]] = {}
    for number, row in read_json_lines(folder / UTTERANCES):
        if not isinstance(row.get("id"), str):
            raise ValueError(f"{folder / UTTERANCES}:{number}: expected an utterance with an id, got {sorted(row)}")
        if faults := list(_wrong_columns(row)):
            raise ValueError(f"{folder / UTTERANCES}:{number}: {'; '.join(faults)}")
        system = found.setdefault(str(row.get("system") or "scored"), {})
        if row["id"] in system:
            raise ValueError(f"{folder / UTTERANCES}:{number}: utterance {row['id']!r} appears twice")
        system[row["id"]] = ScoredUtterance(row, folder)
    if not found:
        raise ValueError(f"{folder / UTTERANCES} holds no utterance")
    return {name: ScoredSystem(name, folder, utterances, read) for name, utterances in found.items()}


def _wrong_columns(row: Mapping[str, Any]) -> Iterator[str]:
    """A phrase for each column that holds something else than it should; ``null`` is as good as a missing column."""
    yield from wrong_types(row, _TYPES, nullable=True)
    measures, speech = row.get("measures"), row.get("speech")
    if measures is not None and not are_numbers(measures, finite=False):
        yield f"measures: expected a number for each name, got {measures!r:.60}"
    if speech is not None and not isinstance(speech, list):
        yield f"speech: expected a list of speech tokens, got {speech!r:.60}"


def _read_summary(path: Path) -> dict[str, Any]:
    """What a folder's summary says; empty if there is none.

    Raises:
        ReadError: it is damaged, or a part of it that is compared or shown holds something else than it should.
    """
    if not path.is_file():
        return {}
    summary = read_json_object(path)
    for name in ("models", "measures"):
        _part(summary, name, str(path))
    forgetting = _part(summary, "forgetting", str(path))
    for language in forgetting:
        entry, where = _part(forgetting, language, f"{path}: forgetting"), f"{path}: forgetting.{language}"
        for side in ("base", "aligned", "difference"):
            for name, value in _part(entry, side, where).items():
                if name in ("value", "p_value") and not (value is None or is_number(value, finite=False)):
                    raise ReadError(f"{where}.{side}.{name}", f"expected a number, got {value!r:.60}")
    return summary


def _part(parent: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Names and values under a name; empty if it is missing."""
    part = parent.get(name) or {}
    if not isinstance(part, dict):
        key = f"{where}{'.' if ': ' in where else ': '}{name}"
        anew = "remove the file, or write it anew with `tts-align test` or `tts-align score`"
        raise ReadError(key, f"expected names and values, got {part!r:.60}; {anew}")
    return part


def system_of(path: Path, name: str = "") -> ScoredSystem:
    """One system of a run or scored folder: the one named, or the trained one, or the only one.

    Raises:
        ValueError: there is none of this name.
    """
    systems = read_systems(path)
    wanted = name or (NEWEST if NEWEST in systems else next(iter(systems)) if len(systems) == 1 else "")
    if wanted not in systems:
        raise ValueError(f"{path} holds the systems {', '.join(systems)}: name one of them, not {wanted!r}")
    return systems[wanted]
