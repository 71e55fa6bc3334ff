# SPDX-License-Identifier: Apache-2.0
"""Scored folders, as ``test`` and ``score`` write them, and the utterances of one system in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tts_align.evaluation.judges.base import Reading
from tts_align.utils.files import read_json_lines

UTTERANCES, SUMMARY, TEST = "utterances.jsonl", "summary.json", "test"
NEWEST = "aligned"
"""System of a run that is compared with another run."""
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
    summary = folder / SUMMARY
    read = json.loads(summary.read_text("utf-8")) if summary.is_file() else {}
    found: dict[str, dict[str, ScoredUtterance]] = {}
    for number, row in read_json_lines(folder / UTTERANCES):
        if not isinstance(row.get("id"), str):
            raise ValueError(f"{folder / UTTERANCES}:{number}: expected an utterance with an id, got {sorted(row)}")
        system = found.setdefault(str(row.get("system") or "scored"), {})
        if row["id"] in system:
            raise ValueError(f"{folder / UTTERANCES}:{number}: utterance {row['id']!r} appears twice")
        system[row["id"]] = ScoredUtterance(row, folder)
    if not found:
        raise ValueError(f"{folder / UTTERANCES} holds no utterance")
    return {name: ScoredSystem(name, folder, utterances, read) for name, utterances in found.items()}


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
