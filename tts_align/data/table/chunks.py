# SPDX-License-Identifier: Apache-2.0
"""Raw rows, some thousands at a time, as columns: of Parquet they are columns already, of JSON they become some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tts_align.data.columns import MOST_TOKEN
from tts_align.data.records import Raw
from tts_align.data.sources import Block

ROWS = 2048
_WORDS = frozenset(
    {"text", "prompt", "language", "speaker", "instruct", "transcript", "audio", "prompt_text", "prompt_audio"}
)
_TOKENS = frozenset({"speech", "completion", "prompt_speech"})
_SIDES = ("chosen", "rejected")
_SIDE = pa.struct({"speech": pa.list_(pa.int64()), "audio": pa.string()})


@dataclass(frozen=True)
class Chunk:
    """Some rows of a manifest.

    Args:
        columns: by name, as :class:`~tts_align.data.table.check.BatchCheck` takes them.
        slow: rows that do not fit into columns.
        where: place of a row, by its number in the chunk.
        raw: rows as their file holds them, by their numbers.
    """

    columns: Mapping[str, Any]
    slow: NDArray[np.bool_]
    where: Callable[[int], str]
    raw: Callable[[NDArray[np.int64]], Sequence[Raw]]

    def __len__(self) -> int:
        """How many rows."""
        return len(self.slow)


def chunks(found: Iterable[Raw | Block]) -> Iterator[Chunk]:
    """Cut what a source gives into chunks, in its order."""
    raws: list[Raw] = []
    for one in found:
        if isinstance(one, Raw):
            raws.append(one)
        if raws and (len(raws) == ROWS or isinstance(one, Block)):
            yield _of_raws(raws)
            raws = []
        if isinstance(one, Block):
            yield from _of_block(one)
    if raws:
        yield _of_raws(raws)


def _of_block(block: Block) -> Iterator[Chunk]:
    for start in range(0, block.batch.num_rows, ROWS):
        batch = block.batch.slice(start, ROWS)

        def where(row: int, first: int = block.first + start, name: str = block.name) -> str:
            return f"{name}:row {first + row}"

        def raw(rows: NDArray[np.int64], batch: pa.RecordBatch = batch, where: Any = where) -> list[Raw]:
            taken = batch.take(pa.array(rows)).to_pylist()
            return [Raw(where(row), columns) for row, columns in zip(rows.tolist(), taken, strict=True)]

        names = batch.schema.names
        yield Chunk(dict(zip(names, batch.columns, strict=True)), np.zeros(batch.num_rows, bool), where, raw)


def _of_raws(raws: list[Raw]) -> Chunk:
    rows = [{} if raw.fault or not isinstance(raw.columns, dict) else raw.columns for raw in raws]
    slow = np.asarray([raw.fault != "" or not isinstance(raw.columns, dict) for raw in raws], bool)
    names = {name for row in rows for name in row}
    columns = {name: _column(name, [row.get(name) for row in rows], slow) for name in names}
    where = [raw.where for raw in raws]  # which are short; the rows themselves are let go

    def again(numbers: NDArray[np.int64]) -> list[Raw]:
        return [raws[number] for number in numbers.tolist()]

    return Chunk(columns, slow, where.__getitem__, again)


def _column(name: str, values: list[Any], slow: NDArray[np.bool_]) -> Any:
    """A column of values as JSON gives them; rows whose value does not fit are slow, and have none here."""
    if name == "id":
        values = [str(value) if type(value) is int else value for value in values]
    if name in _WORDS or name == "id":
        return _array(values, pa.string(), slow, lambda value: type(value) is str)
    if name in _TOKENS:
        return _array(values, pa.list_(pa.int64()), slow, _are_tokens)
    if name in _SIDES:
        return _array([_side(value) for value in values], _SIDE, slow, _is_side)
    if name == "pair":
        both = pa.struct(dict.fromkeys(_SIDES, _SIDE))
        return _array([_both(value) for value in values], both, slow, _is_pair)
    if name == "speaker_vector":
        return _array(values, pa.list_(pa.float64()), slow, _are_numbers)
    return values


def _array(values: list[Any], kind: pa.DataType, slow: NDArray[np.bool_], fits: Callable[[Any], bool]) -> pa.Array:
    kept = values
    for row, value in enumerate(values):
        if value is not None and not fits(value):
            kept = list(values) if kept is values else kept
            kept[row], slow[row] = None, True
    try:
        return pa.array(kept, kind)
    except (UnicodeEncodeError, pa.ArrowException):  # halves of characters somewhere in it
        slow |= np.asarray([value is not None for value in kept], bool)
        return pa.nulls(len(kept), kind)


def _are_tokens(value: Any) -> bool:
    return type(value) is list and set(map(type, value)) <= {int} and (not value or max(map(abs, value)) <= MOST_TOKEN)


def _are_numbers(value: Any) -> bool:
    return type(value) is list and set(map(type, value)) <= {int, float} and all(abs(one) < 2**63 for one in value)


def _side(value: Any) -> Any:
    return {"speech": value} if isinstance(value, list) else value


def _both(value: Any) -> Any:
    return {name: _side(one) for name, one in value.items()} if isinstance(value, dict) else value


def _is_side(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"speech", "audio"}:
        return False
    speech, audio = value.get("speech"), value.get("audio")
    return (speech is None or _are_tokens(speech)) and (audio is None or type(audio) is str)


def _is_pair(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == set(_SIDES) and all(map(_is_side, value.values()))
