# SPDX-License-Identifier: Apache-2.0
"""Repetition: how much of an utterance goes round in circles, in its speech tokens and in what was heard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tts_align.evaluation.measures.base import MeasuredSample, UtteranceMeasure
from tts_align.evaluation.metrics.functional import normalise


def looped_share(items: Sequence[Any], longest: int, shortest: int = 1, times: int = 3) -> float:
    """Share of a sequence that lies in loops: stretches in which one pattern comes again and again.

    Args:
        items: of the sequence.
        longest: items in the longest pattern that is looked for.
        shortest: items in the shortest one.
        times: how often a pattern has to come in a row to be a loop.

    Example:
        >>> looped_share("かれーかれーかれーだ", 5)  # かれー three times, 9 of 10 characters
        0.9
    """
    values = np.array([hash(one) for one in items], np.int64)
    looped = np.zeros(len(values), bool)
    for period in range(shortest, min(longest, len(values) // times) + 1):
        for start, end in _stretches(values[period:] == values[:-period]):
            if end - start >= period * (times - 1):
                looped[start : end + period] = True
    return float(looped.mean()) if len(looped) else 0.0


def _stretches(same: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where something holds without a break: first place, and the place after the last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


class Repetition(UtteranceMeasure):
    """Share of speech tokens, and of what the judge heard, in loops of at least three rounds.

    One speech token that comes again and again is how codecs write silence and long vowels: patterns of speech tokens
    begin with two. What the text itself repeats is no fault of the speech and is subtracted.

    Args:
        longest: speech tokens in the longest pattern that is looked for.
        times: rounds that make a loop.
    """

    name = "repetition"
    higher_is_better: ClassVar[bool | None] = False
    needs_audio: ClassVar[bool] = False

    def __init__(self, longest: int = 50, times: int = 3) -> None:
        super().__init__()
        if longest < 2 or times < 2:
            raise ValueError(f"Repetition: longest and times must be at least 2, got {longest} and {times}")
        self.longest, self.times = longest, times

    def measure(self, samples: Sequence[MeasuredSample]) -> list[dict[str, float]]:
        """``repetition_tokens`` where there are speech tokens, ``repetition_transcript`` where somebody listened."""
        return [self._of(one) for one in samples]

    def _of(self, sample: MeasuredSample) -> dict[str, float]:
        found = {}
        if len(sample.speech):
            speech = _without_runs(sample.speech.tolist())
            found[f"{self.name}_tokens"] = looped_share(speech, self.longest, 2, self.times)
        if heard := normalise(sample.transcript):
            meant = looped_share(normalise(sample.text), 20, 1, self.times)
            found[f"{self.name}_transcript"] = max(0.0, looped_share(heard, 20, 1, self.times) - meant)
        return found


def _without_runs(speech: Sequence[int]) -> list[int]:
    """Speech tokens, each run of one and the same reduced to one."""
    return [one for place, one in enumerate(speech) if place == 0 or one != speech[place - 1]]
