# SPDX-License-Identifier: Apache-2.0
"""Candidates that stay in their file: checked once from its beginning to its end, and read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from tts_align.evaluation.candidates import Candidate
from tts_align.utils.assets import resolve
from tts_align.utils.lines import line_at, placed_lines, row_of


class CandidateFile(Sequence[Candidate]):
    """What ``sample`` or ``judge`` wrote.

    Args:
        path: the file.

    Raises:
        ValueError: with file and line of the first fault, or of an id that appears twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = resolve(path)
        self.ids: list[str] = []
        offsets, lengths, known = [], [], set[str]()
        for number, offset, line in placed_lines(self.path):
            candidate = _read(line, f"{path}:{number}")
            if candidate.id in known:
                raise ValueError(f"{path}:{number}: utterance {candidate.id!r} appears twice")
            known.add(candidate.id)
            self.ids.append(candidate.id)
            offsets.append(offset)
            lengths.append(len(candidate.speech))
        self._offsets: NDArray[np.int64] = np.asarray(offsets, np.int64)
        self._lengths: NDArray[np.int64] = np.asarray(lengths, np.int64)
        self._silent: NDArray[np.bool_] = np.zeros(len(offsets), bool)
        self._kept: NDArray[np.int64] = np.arange(len(offsets))

    def take(self, numbers: Sequence[int]) -> CandidateFile:
        """Some of them, in this order."""
        some = self._alike()
        some._kept = self._kept[np.asarray(numbers, np.int64)]
        some.ids = [self.ids[number] for number in numbers]
        return some

    def without_recordings(self, numbers: Iterable[int]) -> CandidateFile:
        """The same, but that some have no recordings."""
        some = self._alike()
        some._silent = self._silent.copy()
        some._silent[self._kept[list(numbers)]] = True
        return some

    def _alike(self) -> CandidateFile:
        made = CandidateFile.__new__(CandidateFile)
        made.__dict__.update(self.__dict__)
        return made

    @property
    def lengths(self) -> list[int]:
        """Number of speech tokens of each."""
        return self._lengths[self._kept].tolist()

    def __len__(self) -> int:
        """How many."""
        return len(self._kept)

    @overload
    def __getitem__(self, place: int) -> Candidate: ...
    @overload
    def __getitem__(self, place: slice) -> CandidateFile: ...
    def __getitem__(self, place: int | slice) -> Candidate | CandidateFile:
        """One of them, read anew; or some, in the file."""
        if isinstance(place, slice):
            return self.take(range(*place.indices(len(self))))
        number = int(self._kept[place])
        candidate = _read(line_at(self.path, int(self._offsets[number])), self.path)
        return replace(candidate, audio="") if self._silent[number] else candidate


def _read(line: bytes, where: str | Path) -> Candidate:
    row = row_of(line, where)
    try:
        return Candidate.from_row(row)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
