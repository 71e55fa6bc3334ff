# SPDX-License-Identifier: Apache-2.0
"""Millions of rows by their keys, without a dictionary of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value")


def hex_key(key: NDArray[np.uint8]) -> str:
    """A key as :meth:`~tts_align.models.base.layout.Layout.key` gives it."""
    return key.tobytes().hex()


def digest_of(keys: NDArray[np.uint8]) -> str:
    """Name of rows in their order."""
    return hashlib.blake2b(keys.tobytes().hex().encode(), digest_size=16).hexdigest()


class Keyed(Mapping[str, Value], Generic[Value]):
    """What belongs to each key, in the order in which the keys first appear.

    Args:
        parts: keys as bytes, (r, 16), and what belongs to each.
        last: of what has equal keys the last one counts, not the first.
    """

    def __init__(self, parts: Sequence[tuple[NDArray[np.uint8], Sequence[Value]]], last: bool = False) -> None:
        self._values = [values for _, values in parts]
        self._keys = [keys for keys, _ in parts]
        self._starts = np.cumsum([0, *map(len, self._values)])
        self._last = last

    @cached_property
    def _halves(self) -> NDArray[np.uint64]:
        """Keys as two numbers each, (r, 2)."""
        empty = np.zeros((0, 16), np.uint8)
        return np.ascontiguousarray(np.concatenate([empty, *self._keys])).view(">u8").astype(np.uint64)

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
        """Keys that differ, sorted, (k, 2), and the first and the last place of each."""
        halves = self._halves
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        new = np.ones(len(order), bool)
        new[1:] = (halves[order[1:]] != halves[order[:-1]]).any(1)
        starts = np.flatnonzero(new)
        ends = np.append(starts[1:], len(order)) - 1 if len(order) else starts
        return halves[order[starts]], order[starts], order[ends]

    @property
    def names(self) -> NDArray[Any]:
        """Keys as bytes, in the order in which they first appear, (k,)."""
        keys = np.concatenate([np.zeros((0, 16), np.uint8), *self._keys])
        return keys[np.sort(self._sorted[1])].view("S16").ravel()  # :: (k, 16) -> (k)

    def spread(self, count: int) -> dict[str, Value]:
        """Some keys and what belongs to them, spread evenly from the first place on; equal keys count once.

        Args:
            count: most that are wanted.
        """
        step = max(int(self._starts[-1]) // count, 1)
        return dict(self._at(place) for place in range(0, int(self._starts[-1]), step)[:count])

    def _at(self, place: int) -> tuple[str, Value]:
        """Key and value of a place in all parts."""
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        within = place - int(self._starts[part])
        return hex_key(self._keys[part][within]), self._values[part][within]

    def __len__(self) -> int:
        """How many keys differ."""
        return len(self._sorted[0])

    def __iter__(self) -> Iterator[str]:
        """Keys in the order in which they first appear."""
        for place in np.sort(self._sorted[1]):
            yield hex_key(self._halves[place].astype(">u8").view(np.uint8))

    def __getitem__(self, key: str) -> Value:
        """What belongs to a key."""
        keys, first, last = self._sorted
        high, low = int(key[:16], 16), int(key[16:], 16)
        at = int(np.searchsorted(keys[:, 0], np.uint64(high)))
        while at < len(keys) and int(keys[at, 0]) == high:
            if int(keys[at, 1]) == low:
                return self._at(int((last if self._last else first)[at]))[1]
            at += 1
        raise KeyError(key)
