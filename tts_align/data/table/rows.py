# SPDX-License-Identifier: Apache-2.0
"""Rows of a manifest that lie on the disk: records are made of those that are asked for, arrays of whole columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tts_align.data.records import Row
from tts_align.data.table.columns import ROWS_PER_BATCH, schema, to_batch, to_row

_ROWS_AT_HAND = 4096
"""Records that a table keeps, so that batches of a small manifest cost no more than a look."""


class Lists:
    """A column of lists of numbers, row by row, in the memory that the operating system lends.

    Args:
        columns: the column of each batch; all but the last one have as many rows.
    """

    def __init__(self, columns: Sequence[pa.ListArray]) -> None:
        self._offsets = [np.asarray(one.offsets) for one in columns]
        self._values = [np.asarray(one.values) for one in columns]

    def __getitem__(self, row: int) -> NDArray[Any]:
        """The numbers of a row."""
        batch, place = divmod(row, ROWS_PER_BATCH)
        start, stop = self._offsets[batch][place : place + 2]
        return self._values[batch][start:stop]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many numbers each row has."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(one).astype(np.int64) for one in self._offsets)])


class RowTable(Sequence[Row]):
    """Checked rows of a manifest, as a sequence of records.

    Args:
        batches: of the columns of :func:`~tts_align.data.table.columns.schema`.
        file: in which they lie; none if they are in memory.
        kept: numbers of the rows that are meant; all by default.
    """

    def __init__(
        self, batches: Sequence[pa.RecordBatch], file: Path | None = None, kept: NDArray[np.int64] | None = None
    ) -> None:
        self.batches, self.file, self._kept = batches, file, kept
        self._count = sum(batch.num_rows for batch in batches)
        self._lists: dict[str, Lists] = {}
        self._made: dict[int, Row] = {}

    @classmethod
    def of(cls, rows: Iterable[Row], token: pa.DataType | None = None) -> RowTable:
        """A table in memory.

        Args:
            rows: of a manifest.
            token: type of speech tokens.
        """
        token, rest, batches = token or pa.int32(), iter(rows), []
        while some := list(islice(rest, ROWS_PER_BATCH)):
            batches.append(to_batch(some, token))
        return cls(batches)

    @classmethod
    def open(cls, path: Path) -> RowTable:
        """A table that was written; nothing is read before it is asked for."""
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return cls([reader.get_batch(number) for number in range(reader.num_record_batches)], path)

    def reopened(self) -> RowTable:
        """The same rows, nothing of them in memory: what a pass over all columns has read is given back."""
        return self if self.file is None else _opened(self.file, self._kept)

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers that are not forked open the file themselves."""
        return (RowTable, (self.batches, None, self._kept)) if self.file is None else (_opened, (self.file, self._kept))

    def take(self, rows: NDArray[np.int64]) -> RowTable:
        """Some of the rows, in this order."""
        return RowTable(self.batches, self.file, rows if self._kept is None else self._kept[rows])

    @cached_property
    def kept(self) -> NDArray[np.int64]:
        """Number of each row in its file."""
        return np.arange(self._count) if self._kept is None else self._kept

    def __len__(self) -> int:
        return self._count if self._kept is None else len(self._kept)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, place: int | slice) -> Row | tuple[Row, ...]:
        """The record of a row; the last ones are at hand, others are made anew."""
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(len(self))))
        if not -len(self) <= place < len(self):
            raise IndexError(f"expected a row below {len(self)}, got {place}")
        number = int(place % len(self)) if self._kept is None else int(self._kept[place])
        if number not in self._made:
            if len(self._made) == _ROWS_AT_HAND:
                del self._made[next(iter(self._made))]
            batch, inside = divmod(number, ROWS_PER_BATCH)
            self._made[number] = to_row(self.batches[batch].slice(inside, 1).to_pylist()[0])
        return self._made[number]

    def __iter__(self) -> Iterator[Row]:
        """The rows one after the other, a batch of records in memory at a time."""
        if self._kept is not None:
            yield from (self[number] for number in range(len(self)))
            return
        for batch in self.batches:
            for start in range(0, batch.num_rows, 1024):
                yield from map(to_row, batch.slice(start, 1024).to_pylist())

    def __eq__(self, other: object) -> bool:
        """Whether another sequence holds equal rows."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    # --- columns ---

    def lists(self, name: str) -> Lists:
        """Numbers of a column of lists, by the row's number in the file; see :attr:`kept`."""
        if name not in self._lists:
            self._lists[name] = Lists([batch.column(name) for batch in self.batches])
        return self._lists[name]

    def lengths(self, name: str) -> NDArray[np.int64]:
        """Length of the list of each row."""
        return self._chosen(self.lists(name).lengths)

    def array(self, name: str) -> NDArray[Any]:
        """A column of numbers."""
        empty = np.zeros(0, schema(pa.int32()).field(name).type.to_pandas_dtype())
        found = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self.batches]
        return self._chosen(np.concatenate([empty, *found]))

    @property
    def spoken(self) -> NDArray[np.bool_]:
        """Rows whose utterances all have speech tokens."""
        second = (self.lengths("rejected") > 0) | ~self.array("pair").astype(bool)
        return (self.lengths("speech") > 0) & second

    def column(self, name: str) -> pa.ChunkedArray:
        """A column as Arrow has it."""
        kind = schema(pa.int32()).field(name).type
        whole = pa.chunked_array([batch.column(name) for batch in self.batches], None if self.batches else kind)
        return whole if self._kept is None else whole.take(pa.array(self._kept))

    def columns(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Some columns of each row, as Python has them; a batch of rows in memory at a time."""
        found = [self.column(name) for name in names]
        for start in range(0, len(self), ROWS_PER_BATCH):
            yield from zip(*(one.slice(start, ROWS_PER_BATCH).to_pylist() for one in found), strict=True)

    def groups(self, *names: str) -> NDArray[np.int64]:
        """Number of each row's group: rows with equal columns share one, and groups count in the order they appear.

        Args:
            names: of columns of words or of speech tokens.
        """
        code = np.zeros(len(self), np.int64)
        for name in names:
            fresh, size = self._codes(name)
            if size > 1:
                code = numbered(code * size + fresh)
        return code

    def _codes(self, name: str) -> tuple[NDArray[np.int64], int]:
        if name in _NUMBERS:
            if not self.lengths(name).any():
                return np.zeros(len(self), np.int64), 1
            lists = self.lists(name)
            column: Any = pa.array([lists[row].tobytes() for row in self.kept.tolist()], pa.binary())
        else:
            column = self.column(name)
        coded = column.dictionary_encode()
        if isinstance(coded, pa.ChunkedArray):
            coded = coded.unify_dictionaries()
            size = len(coded.chunk(0).dictionary) if coded.num_chunks else 0
            parts = [np.asarray(chunk.indices) for chunk in coded.chunks]
        else:
            size, parts = len(coded.dictionary), [np.asarray(coded.indices)]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64), size

    def _chosen(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self._kept is None else values[self._kept]


def _opened(path: Path, kept: NDArray[np.int64] | None) -> RowTable:
    whole = RowTable.open(path)
    return whole if kept is None else whole.take(kept)


_NUMBERS = ("speech", "rejected", "prompt_speech")


def numbered(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Equal values as equal numbers, counted from 0 in the order in which they appear.

    >>> numbered(np.array([7, 3, 7, 9])).tolist()
    [0, 1, 0, 2]
    """
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
