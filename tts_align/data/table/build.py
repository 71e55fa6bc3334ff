# SPDX-License-Identifier: Apache-2.0
"""From the rows that a manifest holds to a table of those that are right: one pass, a few thousand rows in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tts_align.data.labels import NEEDS_STARS, stars_of
from tts_align.data.parse import Rules, parse
from tts_align.data.records import Faults, Raw, Row
from tts_align.data.refused import Refused
from tts_align.data.sources import Block
from tts_align.data.table.check import BatchCheck
from tts_align.data.table.chunks import Chunk, chunks
from tts_align.data.table.columns import ROWS_PER_BATCH, schema, to_batch

HALF = "holds half of a character (an unpaired surrogate), which no text has"


@dataclass
class Found:
    """What was read.

    Args:
        faults: of the rows left out.
        unsure: those of them that are labels which may be stars.
        bad: how many rows were left out.
        starred: whether a label is a number of stars.
        ignored: columns that are not known.
        rows: how many are right.
    """

    faults: Faults = field(default_factory=Faults)
    unsure: Faults = field(default_factory=Faults)
    bad: int = 0
    starred: bool = False
    ignored: set[str] = field(default_factory=set)
    rows: int = 0


class Batches:
    """Puts rows into batches of one size, and writes them.

    Args:
        token: type of speech tokens.
        sink: file or buffer of Arrow.
    """

    def __init__(self, token: pa.DataType, sink: Any) -> None:
        self._writer = pa.ipc.new_file(sink, schema(token))
        self._waiting: list[pa.RecordBatch] = []
        self._count = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Write what makes a whole batch; keep the rest."""
        self._waiting.append(batch)
        self._count += batch.num_rows
        if self._count >= ROWS_PER_BATCH:
            self._write(self._count // ROWS_PER_BATCH * ROWS_PER_BATCH)

    def close(self) -> None:
        """Write the rest."""
        self._write(self._count)
        self._writer.close()

    def _write(self, count: int) -> None:
        table = pa.Table.from_batches(self._waiting, self._writer_schema) if self._waiting else None
        if table is None:
            return
        for start in range(0, count, ROWS_PER_BATCH):
            some = table.slice(start, min(ROWS_PER_BATCH, count - start)).combine_chunks().to_batches()
            for batch in some:
                self._writer.write_batch(_unshifted(batch))
        self._waiting = [_unshifted(one) for one in table.slice(count).combine_chunks().to_batches()]
        self._count -= count

    @property
    def _writer_schema(self) -> pa.Schema:
        return self._waiting[0].schema


def _unshifted(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same with memory of its own, so that what it was cut from can be let go."""
    return pa.concat_batches([batch, batch.slice(0, 0)])


class Builder:
    """Reads a manifest into a table.

    Args:
        rules: what rows are checked against.
        token: type of speech tokens.
        refused: notes every row that is left out.
    """

    def __init__(self, rules: Rules, token: pa.DataType, refused: Refused | None = None) -> None:
        self.rules, self.token, self.refused = rules, token, refused
        self.check = BatchCheck(rules, token)
        self.found = Found()
        self._places: list[tuple[int, Callable[[int], str]]] = []
        self._numbers: list[NDArray[np.int64]] = []
        self._hashes: list[NDArray[np.int64]] = []

    def build(self, source: Iterable[Raw | Block], sink: Any) -> Found:
        """Write every row that is right; those whose id is taken are still among them, see :meth:`repeated`."""
        batches, first = Batches(self.token, sink), 1
        for chunk in chunks(source):
            self._places.append((first, chunk.where))
            batch, numbers = self._chunk(chunk, first)
            if batch.num_rows:
                self._numbers.append(numbers)
                self._hashes.append(np.fromiter(map(hash, batch.column("id").to_pylist()), np.int64, batch.num_rows))
                batches.add(batch)
            first += len(chunk)
        batches.close()
        self.found.rows = sum(map(len, self._numbers))
        return self.found

    def _chunk(self, chunk: Chunk, first: int) -> tuple[pa.RecordBatch, NDArray[np.int64]]:
        checked = self.check(chunk.columns, chunk.slow, first)
        self.found.starred |= checked.starred
        self.found.ignored |= checked.ignored
        passed = np.flatnonzero(checked.passed)
        rest = np.flatnonzero(~checked.passed)
        if not len(rest):
            return checked.batch, passed + first
        rows, numbers = self._one_by_one(chunk, rest, first)
        batch = pa.concat_batches([checked.batch, *_batches(rows, self.token)])
        every = np.concatenate([passed, np.asarray(numbers, np.int64)])
        order = np.argsort(every, kind="stable")
        return batch.take(pa.array(order)), every[order] + first

    def _one_by_one(self, chunk: Chunk, rest: NDArray[np.int64], first: int) -> tuple[list[Row], list[int]]:
        rows, numbers = [], []
        for number, raw in zip(rest.tolist(), chunk.raw(rest), strict=True):
            row, wrong = self._read(raw, first + number)
            if row is None:
                self._refuse(first + number, raw.where, wrong)
            else:
                rows.append(row)
                numbers.append(number)
        return rows, numbers

    def _read(self, raw: Raw, number: int) -> tuple[Row | None, list[str]]:
        if raw.fault:
            return None, [raw.fault]
        row, wrong, unknown = parse(raw.columns, f"row-{number}", self.rules)
        self.found.ignored |= unknown
        self.found.starred |= isinstance(raw.columns, dict) and stars_of(raw.columns.get("label")) is not None
        if row is not None:
            try:
                to_batch([row], self.token)
            except UnicodeEncodeError:
                return None, [HALF]
        return row, wrong

    def _refuse(self, number: int, where: str, wrong: list[str]) -> None:
        self.found.bad += 1
        if self.refused is not None:
            self.refused.add(number, where, "; ".join(wrong))
        for what in wrong:
            self.found.faults.add(number, where, what)
            if NEEDS_STARS in what:
                self.found.unsure.add(number, where, what)

    def where(self, number: int) -> str:
        """Place of a row by its number in the manifest."""
        at = bisect_right(self._places, number, key=lambda place: place[0]) - 1
        first, where = self._places[at]
        return where(number - first)

    def repeated(self, ids: Callable[[NDArray[np.int64]], list[str]]) -> NDArray[np.int64]:
        """Rows of the table whose id an earlier one has; their faults are noted.

        Args:
            ids: of rows of the table, by their numbers.
        """
        numbers = np.concatenate([np.zeros(0, np.int64), *self._numbers])
        hashes = np.concatenate([np.zeros(0, np.int64), *self._hashes])
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(np.diff(hashes[order]) == 0)
        alike = np.unique(np.concatenate([order[same], order[same + 1]]))  # in the order of the table
        holders: dict[str, int] = {}
        again = []
        for row, name in _with_names(alike, ids):
            number = int(numbers[row])
            if name not in holders:
                holders[name] = number
                continue
            again.append(row)
            self._refuse(number, self.where(number), [f"id {name!r} is taken by {self.where(holders[name])}"])
        self.found.rows -= len(again)
        return np.asarray(again, np.int64)


def _batches(rows: list[Row], token: pa.DataType) -> list[pa.RecordBatch]:
    return [to_batch(rows, token)] if rows else []


def _with_names(rows: NDArray[np.int64], ids: Callable[[NDArray[np.int64]], list[str]]) -> Iterator[tuple[int, str]]:
    for start in range(0, len(rows), ROWS_PER_BATCH):
        some = rows[start : start + ROWS_PER_BATCH]
        yield from zip(some.tolist(), ids(some), strict=True)
