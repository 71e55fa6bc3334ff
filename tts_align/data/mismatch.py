# SPDX-License-Identifier: Apache-2.0
"""Speech of another sentence for every row: what KTO's reference point is estimated on.

The partner of a row is drawn once, from the rows and the seed alone. It therefore survives any batch size, shuffle and
number of ranks, and numbers of the reference model can be cached for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

_WINDOW = 64
"""Rows among which partners are exchanged, of neighbouring length."""


def partners(texts: Sequence[Hashable], lengths: Sequence[int], seed: int) -> NDArray[np.int64]:
    """For each row the row whose speech is put under its text: of similar length, never of an equal text.

    Each row lends its speech once, unless one text has more than half of all rows.

    Args:
        texts: what must differ.
        lengths: of the speech; partners are of similar length, so that little is padded.
        seed: of the draw.

    Raises:
        ValueError: there is only one text.
    """
    if len(set(texts)) < 2:
        raise ValueError(
            "mismatched rows need at least two sentences, but all rows have the same text: "
            "bring more sentences, or choose an objective without mismatched rows"
        )
    generator = np.random.default_rng([seed, 0x3157])
    order = np.lexsort((generator.random(len(texts)), np.asarray(lengths)))
    partner = np.full(len(texts), -1, np.int64)
    for window in _windows(order, texts):
        _rotate(window, texts, partner, generator)
    return partner


def _windows(order: NDArray[np.int64], texts: Sequence[Hashable]) -> list[list[int]]:
    """Runs of neighbours in which no text has more than half of the rows; a run that has is joined to the next."""
    windows: list[list[int]] = []
    current: list[int] = []
    count: Counter[Hashable] = Counter()
    for row in order.tolist():
        current.append(row)
        count[texts[row]] += 1
        if len(current) >= _WINDOW and len(current) % 2 == 0 and 2 * max(count.values()) <= len(current):
            windows.append(current)
            current, count = [], Counter()
    while current and 2 * max(Counter(texts[row] for row in current).values()) > len(current) and windows:
        current = windows.pop() + current
    return [*windows, current] if current else windows


def _rotate(
    rows: list[int], texts: Sequence[Hashable], partner: NDArray[np.int64], generator: np.random.Generator
) -> None:
    """Put equal texts next to each other, and give each row the speech of the row one longest run further on."""
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(texts[row], []).append(row)
    runs = list(groups.values())
    runs = [runs[i] for i in generator.permutation(len(runs))]
    shift = max(map(len, runs))
    ring = [row for run in runs for row in run]
    if 2 * shift <= len(ring):
        # A run is never longer than the shift, and the way back round the ring is not shorter.
        partner[ring] = ring[shift:] + ring[:shift]
        return
    # One text has the majority: its rows share the speech of the others, the others take theirs from it.
    major = max(runs, key=len)
    others = [row for run in runs if run is not major for row in run]
    partner[major] = [others[i % len(others)] for i in range(len(major))]
    partner[others] = major[: len(others)]
