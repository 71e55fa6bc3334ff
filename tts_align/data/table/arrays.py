# SPDX-License-Identifier: Apache-2.0
"""Columns of raw rows as Arrow holds them, whatever wrote them: words, lists of speech tokens, records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tts_align.data.columns import MOST_TOKEN

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Tokens:
    """Speech tokens of each row.

    Args:
        there: rows that have the column at all.
        right: rows that hold at least one, all of them in the codebook.
        lists: as Arrow has them, without absent values.
    """

    there: Mask
    right: Mask
    lists: pa.ListArray


def is_words(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or (
        pa.types.is_dictionary(kind) and is_words(kind.value_type)
    )  # fmt: skip


def valid(array: pa.Array) -> Mask:
    """Rows that have a value."""
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False))


def said(words: pa.Array) -> Mask:
    """Rows that hold more than white space."""
    return np.asarray(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(words)), 0).to_numpy(zero_copy_only=False))


def as_array(values: Any, kind: pa.DataType) -> pa.Array:
    """Values as Arrow has them."""
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


def no_lists(count: int, kind: pa.DataType | None = None) -> pa.ListArray:
    """An empty list in every row."""
    return pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), pa.array([], kind or pa.int64()))


def listed(column: Any) -> Sequence[Any]:
    """Values as Python has them."""
    return column.to_pylist() if isinstance(column, pa.Array) else column


def fields_of(column: Any) -> dict[str, pa.Array]:
    """Columns of a column of records, absent where the record is."""
    if column is None or not pa.types.is_struct(column.type):
        return {}
    return dict(zip([one.name for one in column.type], column.flatten(), strict=True))


def is_list(column: Any) -> bool:
    """Whether a column holds lists."""
    kinds = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    return column is not None and any(is_kind(column.type) for is_kind in kinds)


def inner_of(column: pa.Array) -> pa.Array | None:
    """The values of all lists, one behind the other; nothing of what is no list."""
    return column.flatten() if is_list(column) else None


def plain(column: pa.Array) -> pa.ListArray:
    """Lists that begin at 0 and have no absent rows or room between them."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), column.flatten())


def tokens_of(column: Any, count: int, codebook_size: int | None) -> Tokens:
    """Speech tokens of a column.

    Args:
        column: as Arrow has it; nothing if there is none.
        count: number of rows.
        codebook_size: of the codebook, if it is known.
    """
    if column is None or column.null_count == count:
        no = np.zeros(count, bool)
        return Tokens(no, no, no_lists(count))
    there, values = valid(column), inner_of(column)
    if values is None or not pa.types.is_integer(values.type):
        return Tokens(there, np.zeros(count, bool), no_lists(count))
    lists = plain(column)
    numbers = np.asarray(values.cast(pa.int64(), safe=False).fill_null(-1))  # unsigned ones have no -1
    limit = MOST_TOKEN + 1 if codebook_size is None else codebook_size
    odd = (numbers < 0) | (numbers >= limit)
    offsets = np.asarray(lists.offsets)
    right = there & ~any_in(odd, offsets) & (np.diff(offsets) > 0)
    # What is wrong becomes harmless here, as its row is not taken.
    return Tokens(there, right, pa.ListArray.from_arrays(lists.offsets, pa.array(np.where(odd, 0, numbers))))


def any_in(odd: Mask, offsets: NDArray[np.int32]) -> Mask:
    """Rows of which a value is odd."""
    before = np.concatenate([[0], np.cumsum(odd)])
    return np.asarray(before[offsets[1:]] > before[offsets[:-1]])


def either(one: Tokens, other: Tokens) -> Tokens:
    """The tokens of whichever column a row has."""
    if not other.there.any():
        return one
    if not one.there.any():
        return other
    lists = chosen_of(one.there, one.lists, other.lists)
    return Tokens(one.there | other.there, np.where(one.there, one.right, other.right), lists)


def chosen_of(which: Mask, one: pa.ListArray, other: pa.ListArray) -> pa.ListArray:
    """Each row's list from one column or the other."""
    both = pa.concat_arrays([one, other])
    return plain(both.take(pa.array(np.where(which, 0, len(one)) + np.arange(len(one)))))


def same_lists(one: pa.ListArray, other: pa.ListArray) -> Mask:
    """Rows in which both lists are equal."""
    found = np.diff(np.asarray(one.offsets)) == np.diff(np.asarray(other.offsets))
    a, b = (np.asarray(lists.values) for lists in (one, other))
    starts, others, ends = np.asarray(one.offsets), np.asarray(other.offsets), np.asarray(one.offsets)[1:]
    for row in np.flatnonzero(found):
        length = ends[row] - starts[row]
        found[row] = np.array_equal(a[starts[row] : ends[row]], b[others[row] : others[row] + length])
    return np.asarray(found)
