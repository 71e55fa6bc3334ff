# SPDX-License-Identifier: Apache-2.0
"""Numbers of millions of rows, one per token, that stay in their files: looked up by key, merged chunk by chunk.

A file is a safetensors file of three columns: the keys of the rows in rising order, where each row begins, and the
numbers of all rows one behind the other. It is mapped into memory, so that the operating system holds what is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from tts_align.data.keyed import Keyed
from tts_align.utils.files import scratch_beside, written_atomically
from tts_align.utils.readers import parse_json

Numbers = NDArray[np.float32]
Names = NDArray[Any]
"""Keys of rows as bytes, (r,)."""
WIDTH = 16
"""Bytes of a key."""
CHUNK_TOKENS = 2**22
"""About how many numbers are in memory at once while files are merged or sent: 16 MB."""
_BYTES = f"S{WIDTH}"
_SAFETENSORS = {"<i8": "I64", "<f4": "F32", "|u1": "U8"}


def names_of(keys: Iterable[str]) -> Names:
    """Keys as bytes, in their order."""
    if isinstance(keys, Keyed | StoredNumbers):
        return keys.names
    return np.array([bytes.fromhex(key) for key in keys], _BYTES)


def key_of(name: bytes) -> str:
    """A key as text; NumPy leaves out the zeros at its end."""
    return name.ljust(WIDTH, b"\0").hex()


@runtime_checkable
class Part(Protocol):
    """Numbers of some rows; the place of a row is that of its name."""

    @property
    def names(self) -> Names:
        """Keys in rising order, each once, as bytes."""

    def lengths(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many numbers each of these rows has."""

    def __getitem__(self, place: int) -> Numbers:
        """Numbers of a row."""


@dataclass(frozen=True, eq=False)
class Columns:
    """Numbers of some rows as columns, of a file or in memory.

    Args:
        names: keys in rising order, each once.
        starts: where the numbers of each row begin.
        ends: where they end.
        values: of all rows.
    """

    names: Names
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    values: Numbers

    @classmethod
    def of(cls, numbers: Mapping[str, Numbers]) -> Columns:
        """The same of a dictionary."""
        names = names_of(numbers)
        order = np.argsort(names, kind="stable")
        values = [np.asarray(one, np.float32) for one in numbers.values()]
        values = [values[place] for place in order.tolist()]
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
        return cls(names[order], offsets[:-1], offsets[1:], np.concatenate([np.zeros(0, np.float32), *values]))

    @classmethod
    def open(cls, path: Path) -> tuple[Columns, dict[str, str]]:
        """A file that :func:`write_numbers` wrote, and what it says of itself.

        Raises:
            ValueError: it is no such file, or damaged.
            OSError: it cannot be read.
        """
        try:
            with safe_open(path, "pt") as file:  # whose tensors look at the file; those of "numpy" are copies
                found = {name: file.get_tensor(name).numpy() for name in ("keys", "offsets", "values")}
                identity = parse_json((file.metadata() or {}).get("identity", "{}"), "its identity")
        except (SafetensorError, TypeError, RuntimeError) as error:
            raise ValueError(str(error)) from None
        keys, offsets, values = (found[name] for name in ("keys", "offsets", "values"))
        _check(keys, offsets, values)
        if not isinstance(identity, dict):
            raise ValueError(f"expected its identity to be an object, got {identity!r:.60}")
        names = np.ascontiguousarray(keys).view(f"S{keys.shape[1]}").ravel().astype(_BYTES, copy=False)
        starts, ends = offsets[:-1], offsets[1:]
        if not (names[1:] > names[:-1]).all():  # no file of ours
            names, place = np.unique(names, return_index=True)
            starts, ends = starts[place], ends[place]
        return cls(names, starts, ends, values), identity

    def lengths(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many numbers each of these rows has."""
        return self.ends[places] - self.starts[places]

    def __getitem__(self, place: int) -> Numbers:
        """Numbers of a row."""
        return self.values[self.starts[place] : self.ends[place]]


def _check(keys: NDArray[Any], offsets: NDArray[Any], values: NDArray[Any]) -> None:
    kinds = [(one.dtype.str, one.ndim) for one in (keys, offsets, values)]
    if kinds != [("|u1", 2), ("<i8", 1), ("<f4", 1)] or not 0 < keys.shape[1] <= WIDTH:
        raise ValueError(f"expected keys of {WIDTH} bytes, offsets of 64 and numbers of 32 bits, got {kinds}")
    if len(offsets) != len(keys) + 1 or offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise ValueError(f"expected {len(keys) + 1} offsets from 0 up to {len(values)}, got others")


class StoredNumbers(MutableMapping[str, Numbers]):
    """Numbers by key: those of files, and the newest ones in memory.

    Args:
        parts: where a row is in several of them, the first one counts.
    """

    def __init__(self, parts: Sequence[Part] = ()) -> None:
        self._parts = list(parts)
        self._fresh: dict[str, Numbers] = {}
        self.fresh_bytes = 0

    def __getitem__(self, key: str) -> Numbers:
        """Numbers of a row."""
        if key in self._fresh:
            return self._fresh[key]
        name = np.bytes_(bytes.fromhex(key).rstrip(b"\0"))  # as NumPy gives it back
        for part in self._parts:
            place = int(part.names.searchsorted(name))
            if place < len(part.names) and part.names[place] == name:
                return part[place]
        raise KeyError(key)

    def of(self, keys: Sequence[str]) -> list[Numbers]:
        """Numbers of rows, looked up together.

        Raises:
            KeyError: a row is not there.
        """
        which, places = self._located(names_of(keys))
        if (which < 0).any():
            raise KeyError(keys[int(np.argmax(which < 0))])
        parts = self._parts
        return [parts[part][place] for part, place in zip(which.tolist(), places.tolist(), strict=True)]

    def __setitem__(self, key: str, numbers: Numbers) -> None:
        """Numbers of a row, in memory."""
        self._fresh[key] = numbers
        self.fresh_bytes += numbers.nbytes

    def __delitem__(self, key: str) -> None:
        """Nothing is ever taken out."""
        raise TypeError("rows cannot be taken out of stored numbers")

    def __len__(self) -> int:
        """How many rows."""
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        """Keys in rising order."""
        return map(key_of, self.names)

    @property
    def names(self) -> Names:
        """Keys in rising order, each once, as bytes."""
        parts = self.settled()
        if len(parts) == 1:
            return parts[0].names
        return np.unique(np.concatenate([np.zeros(0, _BYTES), *(part.names for part in parts)]))

    def settled(self) -> list[Part]:
        """All parts, those numbers among them that are in memory."""
        if self._fresh:
            self._parts.insert(0, Columns.of(self._fresh))
            self._fresh, self.fresh_bytes = {}, 0
        return self._parts

    def append(self, part: Part) -> None:
        """Numbers that count where there are no others of a row."""
        self.settled().append(part)

    def replace(self, numbers: StoredNumbers) -> None:
        """Take over numbers; where both have a row, the new ones count."""
        self._parts = [*numbers.settled(), *self.settled()]

    def spill(self, path: Path, identity: Mapping[str, str]) -> None:
        """Put the numbers in memory into a file."""
        if self._fresh:
            fresh = StoredNumbers([Columns.of(self._fresh)])
            write_numbers(path, fresh, identity)
            self._parts.insert(0, Columns.open(path)[0])
            self._fresh, self.fresh_bytes = {}, 0

    def spill_nameless(self, folder: Path) -> None:
        """Put the numbers in memory into a file that nobody else sees; they stay where nothing can be written."""
        path = scratch_beside(folder / "numbers.safetensors", ".safetensors")
        with suppress(OSError):
            self.spill(path, {})
            path.unlink(missing_ok=True)

    def holds(self, names: Names) -> NDArray[np.bool_]:
        """Which of these rows are there."""
        return self._located(names)[0] >= 0

    def lengths(self, names: Names) -> NDArray[np.int64]:
        """How many numbers each of these rows has; they must be there."""
        found, places = np.zeros(len(names), np.int64), self._located(names)
        for number, part in enumerate(self._parts):
            mine = places[0] == number
            found[mine] = part.lengths(places[1][mine])
        return found

    def chunks(self) -> Iterator[Columns]:
        """All numbers in the order of their keys, about :data:`CHUNK_TOKENS` at a time."""
        names = self.names
        lengths = self.lengths(names)
        ends = np.cumsum(lengths)
        which, places = self._located(names)
        start = 0
        while start < len(names):
            before = ends[start] - lengths[start]
            stop = max(int(ends.searchsorted(before + CHUNK_TOKENS, "right")), start + 1)
            some = zip(which[start:stop].tolist(), places[start:stop].tolist(), strict=True)
            values = np.concatenate([self._parts[part][place] for part, place in some])
            yield Columns(
                names[start:stop], ends[start:stop] - lengths[start:stop] - before, ends[start:stop] - before, values
            )
            start = stop

    def _located(self, names: Names) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Part of each row, -1 for none, and its place there."""
        which, places = np.full(len(names), -1, np.int16), np.zeros(len(names), np.int64)
        for number, part in reversed(list(enumerate(self.settled()))):
            if len(part.names):
                found = part.names.searchsorted(names)
                hit = part.names[np.minimum(found, len(part.names) - 1)] == names
                which[hit], places[hit] = number, found[hit]
        return which, places


class Difference:
    """Numbers of one model minus those of another, of the rows that both have; computed when they are asked for.

    Args:
        first: numbers of the one.
        second: numbers of the other.
    """

    def __init__(self, first: StoredNumbers, second: StoredNumbers) -> None:
        self.first, self.second = first, second
        self.names = np.intersect1d(first.names, second.names)

    def lengths(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many numbers each of these rows has."""
        return self.first.lengths(self.names[places])

    def __getitem__(self, place: int) -> Numbers:
        """Numbers of a row."""
        key = key_of(self.names[place])
        return self.first[key] - self.second[key]


def write_numbers(path: Path, numbers: Mapping[str, Numbers], identity: Mapping[str, str]) -> None:
    """Write a file of numbers, all of it or nothing, a chunk at a time.

    Args:
        path: of the file.
        numbers: by key.
        identity: what the file says of itself.
    """
    stored = numbers if isinstance(numbers, StoredNumbers) else StoredNumbers([Columns.of(numbers)])
    names = stored.names
    offsets = np.concatenate([[0], np.cumsum(stored.lengths(names))]).astype("<i8")
    shapes = {"offsets": ("<i8", [len(offsets)]), "values": ("<f4", [int(offsets[-1])])}
    shapes["keys"] = ("|u1", [len(names), WIDTH])
    with written_atomically(path) as scratch, scratch.open("wb") as file:
        file.write(_header(shapes, identity))
        file.write(offsets.data)
        for chunk in stored.chunks():
            file.write(chunk.values.astype("<f4", copy=False).data)
        file.write(np.ascontiguousarray(names).view(np.uint8).data)


def _header(shapes: Mapping[str, tuple[str, list[int]]], identity: Mapping[str, str]) -> bytes:
    """What stands before the columns, as the library safetensors writes it."""
    header: dict[str, Any] = {"__metadata__": {"identity": json.dumps(dict(identity))}}
    start = 0
    for name, (kind, shape) in shapes.items():
        end = start + int(np.prod(shape)) * np.dtype(kind).itemsize
        header[name] = {"dtype": _SAFETENSORS[kind], "shape": shape, "data_offsets": [start, end]}
        start = end
    words = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    words += b" " * (-len(words) % 8)
    return len(words).to_bytes(8, "little") + words
