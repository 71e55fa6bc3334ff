# SPDX-License-Identifier: Apache-2.0
"""Work on a batch of which single utterances may fail: a fault is not a verdict, and costs no other its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from tts_align.evaluation.listening import is_out_of_memory

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def attempt(
    work: Callable[[Sequence[Item]], Sequence[Answer]], items: Sequence[Item], names: Sequence[str]
) -> list[Answer | Exception]:
    """Answers of a batch; after an error one by one, only to find which utterances are at fault.

    Args:
        work: gives one answer for each item, and none depends on another item.
        items: the batch.
        names: of the items.

    Returns:
        For each item its answer, or the error that it alone raises.

    Raises:
        Exception: what ``work`` raised, if memory is exhausted, or if all items of several fail for one reason.
    """
    if not items:
        return []
    try:
        return list(work(items))
    except Exception as error:
        _raise_if_memory_is_exhausted(error)
        if len(items) == 1:
            return [error]
    found: list[Answer | Exception] = []
    for item in items:
        try:
            found += work([item])
        except Exception as error:
            _raise_if_memory_is_exhausted(error)
            found.append(error)
    errors = [one for one in found if isinstance(one, Exception)]
    if len(errors) == len(items) and len({_kind(error) for error in errors}) == 1:
        errors[0].add_note(f"each of the {len(items)} utterances of a batch failed so, {names[0]} first")
        raise errors[0]
    return found


def _raise_if_memory_is_exhausted(error: Exception) -> None:
    if is_out_of_memory(error):
        error.add_note("there is not enough memory for so many utterances at a time: lower batch_rows")
        raise error


def _kind(error: Exception) -> tuple[type[Exception], str]:
    """What is the same of two errors that differ only in sizes and numbers."""
    return type(error), re.sub(r"\d+", "#", str(error))
