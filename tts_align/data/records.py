# SPDX-License-Identifier: Apache-2.0
"""What a manifest holds: typed rows, and the faults found in them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, overload


@dataclass(frozen=True)
class Sound:
    """One utterance, as speech tokens, as a recording, or both.

    Args:
        speech: speech tokens without end-of-speech; empty when there is only a recording.
        audio: path of a recording, relative to the manifest; empty when there are only speech tokens.
    """

    speech: tuple[int, ...] = ()
    audio: str = ""


@dataclass(frozen=True)
class Span:
    """A marked place in the text and how it may be read.

    Args:
        start: first character.
        end: character after the last.
        right: readings that are right here, in kana.
        wrong: readings that the same characters have elsewhere.
    """

    start: int
    end: int
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two utterances of one sentence, the better one first."""

    chosen: Sound
    rejected: Sound


@dataclass(frozen=True)
class Row:
    """One row of a manifest: an utterance, labelled or not, or a pair of them.

    Args:
        id: unique in the manifest.
        text: what is said.
        language: code of the language, may be empty.
        speaker: name of the voice, may be empty.
        speech: speech tokens of the utterance; empty in a pair or when there is only a recording.
        audio: path of the recording, relative to the manifest; may be empty.
        desirable: the label, ``None`` without one.
        pair: two utterances instead of one.
        spans: marked places in the text.
        scores: numbers that judges gave.
        notes: words that judges gave, such as what was heard.
        instruct: how to speak, in words; may be empty.
        prompt_text: transcript of a recording that the utterance continues; may be empty.
        prompt_speech: speech tokens of that recording: context, never a target.
        prompt_audio: path of that recording, relative to the manifest.
        speaker_vector: numbers that a speaker encoder gave for the voice, as it gave them.
        attributes: what is known about the utterance, in words or numbers, such as its emotion or its quality.
        transcript: what the text ought to sound like, in a recogniser's script; the text itself when empty.
    """

    id: str
    text: str
    language: str = ""
    speaker: str = ""
    speech: tuple[int, ...] = ()
    audio: str = ""
    desirable: bool | None = None
    pair: Pair | None = None
    spans: tuple[Span, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    instruct: str = ""
    prompt_text: str = ""
    prompt_speech: tuple[int, ...] = ()
    prompt_audio: str = ""
    speaker_vector: tuple[float, ...] = ()
    attributes: Mapping[str, str | float] = field(default_factory=dict)
    transcript: str = ""

    @property
    def target_text(self) -> str:
        """What a recogniser should write down."""
        return self.transcript or self.text

    @property
    def sentence(self) -> tuple[object, ...]:
        """Text, language, voice and what stands before the words; rows that share all speak one sentence."""
        before = (self.instruct, self.prompt_text, self.prompt_speech)
        return self.text, self.language, self.speaker, *before

    @property
    def sounds(self) -> tuple[Sound, ...]:
        """The utterance, or chosen and rejected."""
        return (Sound(self.speech, self.audio),) if self.pair is None else (self.pair.chosen, self.pair.rejected)


class Raw(NamedTuple):
    """One row of a file, not checked yet.

    Args:
        where: file and line (JSONL) or file and row (Parquet), counted from 1.
        columns: what it holds.
        fault: why it cannot be read; empty if it can.
    """

    where: str
    columns: Any
    fault: str = ""


@dataclass(frozen=True)
class Fault:
    """Something wrong with a manifest.

    Args:
        where: file and line (JSONL) or file and row (Parquet), counted from 1.
        what: what was expected, what came, what to change.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


FAULTS_SHOWN = 100
"""Faults that are kept and shown; those after them are counted."""


class Faults(Sequence[Fault]):
    """The first faults of a file in the order of its rows, and how many there are; never more than a hundred are kept.

    Args:
        found: faults that are known already.
    """

    def __init__(self, found: Iterable[Fault] = ()) -> None:
        self.total = 0
        self._kept: list[tuple[int, Fault]] = []
        for number, fault in enumerate(found):
            self.add(number, fault.where, fault.what)

    def add(self, row: int, where: str, what: str) -> None:
        """Count a fault, and keep it if it is among the first.

        Args:
            row: its number in the file; faults may come in any order.
            where: file and line.
            what: is wrong.
        """
        self.total += 1
        if len(self._kept) < FAULTS_SHOWN or row < self._kept[-1][0]:
            insort(self._kept, (row, Fault(where, what)), key=itemgetter(0))
            del self._kept[FAULTS_SHOWN:]

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)

    @overload
    def __getitem__(self, place: int) -> Fault: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Fault, ...]: ...
    def __getitem__(self, place: int | slice) -> Fault | tuple[Fault, ...]:
        """The first ones."""
        if isinstance(place, slice):
            return tuple(fault for _, fault in self._kept[place])
        return self._kept[place][1]

    def lines(self) -> Iterator[str]:
        """What a person reads."""
        yield from (f"  {fault}" for fault in self)
        if self.total > len(self):
            yield f"  ... and {self.total - len(self)} more"


class ManifestError(ValueError):
    """A manifest cannot be used; ``faults`` holds the first hundred reasons, ``total`` says how many there are."""

    def __init__(
        self,
        path: Path | str,
        faults: Sequence[Fault],
        hint: str = "mend these rows, or leave them out with on_bad_row: drop",
    ) -> None:
        self.faults = faults if isinstance(faults, Faults) else Faults(faults)
        self.total = self.faults.total
        if self.total == 1 and self.faults[0].where == str(path):  # of the file itself: there are no rows to mend
            super().__init__(str(self.faults[0]))
            return
        count = "1 fault" if self.total == 1 else f"{self.total} faults"
        super().__init__("\n".join([f"{path}: {count}; {hint}", *self.faults.lines()]))


@dataclass(frozen=True)
class Manifest:
    """Rows that were read, and what was wrong with the others.

    Args:
        path: the file or directory; a URL or a pattern is a string.
        rows: the rows without fault, which are made when they are asked for.
        dropped: the first faults of the rows left out; a row may have several.
        dropped_rows: how many rows were left out.
        ignored: columns that are not known and not looked at.
    """

    path: Path | str
    rows: Sequence[Row]
    dropped: Sequence[Fault] = ()
    dropped_rows: int = 0
    ignored: tuple[str, ...] = ()

    def find(self, audio: str) -> Path:
        """Where a recording lies."""
        return folder(self.path) / audio


def folder(path: Path | str) -> Path:
    """The directory that the paths in a manifest start from; where the command runs, if that has no directory here."""
    if isinstance(path, str):
        return Path()
    return path if path.is_dir() else path.parent


def located(name: str, start: Path) -> Path:
    """Where a file of another tool's list lies: beside the list or, if it is not there, where the command runs.

    Args:
        name: what the list says.
        start: the list's folder.
    """
    beside, here = start / name, Path(name)
    return here.absolute() if here.exists() and not beside.exists() else beside
