# SPDX-License-Identifier: Apache-2.0
"""Sequences that are longer than memory: their members are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

Made = TypeVar("Made")


class Lazy(Sequence[Made], Generic[Made]):
    """A sequence whose members are made when they are asked for.

    Args:
        count: how many.
        make: one, by its number.
    """

    def __init__(self, count: int, make: Callable[[int], Made]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Made: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Made, ...]: ...
    def __getitem__(self, place: int | slice) -> Made | tuple[Made, ...]:
        """One or some of them."""
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(self._count)))
        if not -self._count <= place < self._count:
            raise IndexError(f"expected a number below {self._count}, got {place}")
        return self._make(int(place) % self._count)

    def __eq__(self, other: object) -> bool:
        """Whether another sequence holds equal members."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]
