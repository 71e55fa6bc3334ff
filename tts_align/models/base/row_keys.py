# SPDX-License-Identifier: Apache-2.0
"""Keys of very many rows: what :meth:`Layout.key` digests, written without making a record of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tts_align.models.base.layout import Layout

KEY_BYTES = 16


def tuple_words(numbers: Sequence[int]) -> str:
    """Numbers as Python writes them.

    >>> tuple_words([1]), tuple_words([1, 2])
    ('(1,)', '(1, 2)')
    """
    return repr(tuple(numbers))


class RowKeys:
    """Keys of rows of one layout.

    Args:
        layout: of the model.
    """

    def __init__(self, layout: Layout) -> None:
        self._before = f"{layout.words}TokenRow(text="
        words = [f"{token}, ".encode() for token in range(layout.codebook_size)]
        self._widths = np.asarray([len(word) for word in words], np.int64)
        self._words = np.asarray(words, "S8")  # a token and what follows it, filled up with zeros
        if self._widths.max() > 8:
            raise ValueError(f"expected a codebook of less than a million speech tokens, got {layout.codebook_size}")

    def start(self, text: Sequence[int]) -> bytes:
        """What stands before the speech tokens of a row with this text."""
        return f"{self._before}{tuple_words(text)}, speech=(".encode()

    def speech(self, values: Sequence[NDArray[np.integer]]) -> Iterator[bytes]:
        """The speech tokens of each row, as they are digested."""
        lengths = np.asarray([len(one) for one in values])
        tokens = np.concatenate([np.zeros(0, np.int64), *values])
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(self._widths):  # which batches refuse
            yield from (tuple_words(one.tolist())[1:-1].encode() for one in values)
            return
        ends = np.concatenate([[0], np.cumsum(self._widths[tokens])])
        written = self._words[tokens].tobytes().replace(b"\0", b"")
        places = ends[np.concatenate([[0], np.cumsum(lengths)])].tolist()
        for start, stop, length in zip(places[:-1], places[1:], lengths.tolist(), strict=True):
            yield written[start : stop - (1 if length == 1 else 2 if length else 0)]

    @staticmethod
    def end(prefix: int, bistream: bool, prompt: Sequence[int]) -> bytes:
        """What stands after the speech tokens."""
        return f"), prefix={prefix}, bistream={bistream}, prompt={tuple_words(prompt)}))".encode()

    @staticmethod
    def digests(starts: Iterable[bytes], speech: Iterable[bytes], ends: Iterable[bytes]) -> NDArray[np.uint8]:
        """Keys as bytes, (r, 16)."""
        made = (
            hashlib.blake2b(b"".join(parts), digest_size=KEY_BYTES).digest()
            for parts in zip(starts, speech, ends, strict=True)
        )
        # :: (r * 16) -> (r, 16)
        return np.frombuffer(b"".join(made), np.uint8).reshape(-1, KEY_BYTES)
