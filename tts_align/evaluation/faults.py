# SPDX-License-Identifier: Apache-2.0
"""Work on a batch of which single utterances may fail: a fault is not a verdict, and costs no other its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Answer = TypeVar("Answer")
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Failed to allocate memory",
)
"""How the errors of PyTorch, cuDNN, cuBLAS, CTranslate2 and ONNX Runtime say so."""


def attempt(
    work: Callable[[Sequence[Item]], Sequence[Answer]],
    items: Sequence[Item],
    names: Sequence[str],
    split: Callable[[int, Exception], None] | None = None,
) -> list[Answer | Exception]:
    """Answers of a batch; after an error one by one, only to find which utterances are at fault.

    Args:
        work: gives one answer for each item, and none depends on another item.
        items: the batch.
        names: of the items.
        split: told of a batch that failed although each item alone did not: the number of its items, and the error.

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
        raise_if_memory_is_exhausted(error)
        if len(items) == 1:
            return [error]
        whole = error
    found: list[Answer | Exception] = []
    for item in items:
        try:
            found += work([item])
        except Exception as error:
            raise_if_memory_is_exhausted(error)
            found.append(error)
    errors = [one for one in found if isinstance(one, Exception)]
    if not errors and split is not None:
        split(len(items), whole)
    if len(errors) == len(items) and len({_kind(error) for error in errors}) == 1:
        errors[0].add_note(f"each of the {len(items)} utterances of a batch failed so, {names[0]} first")
        raise errors[0]
    return found


def _kind(error: Exception) -> tuple[type[Exception], str]:
    """What is the same of two errors that differ only in sizes and numbers."""
    return type(error), re.sub(r"\d+", "#", str(error))


def raise_if_memory_is_exhausted(error: Exception) -> None:
    """Raise an error that says nothing about an utterance, with advice."""
    if is_out_of_memory(error):
        error.add_note("there is not enough memory to speak and judge a batch of candidates: lower batch_rows")
        raise error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of its accelerator is exhausted.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    True
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # ONNX Runtime's errors are of classes of its own.
    machine = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return machine and any(words in str(error) for words in _NO_MEMORY)
