# SPDX-License-Identifier: Apache-2.0
"""Texts as the policy reads them, each once, however many rows speak it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tts_align.data.table.columns import ROWS_PER_BATCH
from tts_align.data.table.rows import Lists, RowTable
from tts_align.models.base.generation import Context, Encoded
from tts_align.models.base.policy import CodecLM

_SCHEMA = pa.schema(
    {"text": pa.list_(pa.int32()), "prompt": pa.list_(pa.int32()), "prefix": pa.int32(), "words": pa.binary(16)}
)
CONTEXT = ("text", "speaker", "instruct", "prompt_text", "prompt_speech")
"""Columns that decide what the policy reads before the speech."""


@dataclass(frozen=True)
class Texts:
    """Encoded texts, on the disk or in memory.

    Args:
        text: token ids of each, the prefix included.
        prompt: speech tokens of the recording that each continues.
        prefix: how many leading ids of each are not its own words.
        words: digest of each one's own words, as two numbers, (m, 2).
        where: what they lie in.
    """

    text: Lists
    prompt: Lists
    prefix: NDArray[np.int64]
    words: NDArray[np.int64]
    where: Path | pa.Buffer

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers that are not forked look at the file themselves."""
        return Texts.open, (self.where,)

    @classmethod
    def write(cls, table: RowTable, rows: NDArray[np.int64], policy: CodecLM, sink: Any) -> None:
        """Encode the texts of some rows.

        Args:
            table: of the manifest.
            rows: of it, one for each text.
            policy: knows how text becomes tokens.
            sink: file or buffer of Arrow.
        """
        with pa.ipc.new_file(sink, _SCHEMA) as writer:
            for start in range(0, len(rows), ROWS_PER_BATCH):
                made = list(_encoded(table.take(rows[start : start + ROWS_PER_BATCH]), policy))
                columns = [
                    pa.array([one.text for one in made], _SCHEMA.field("text").type),
                    pa.array([one.prompt_speech for one in made], _SCHEMA.field("prompt").type),
                    pa.array([one.prefix for one in made], pa.int32()),
                    pa.array([_digest(one) for one in made], pa.binary(16)),
                ]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))

    @classmethod
    def open(cls, where: Path | pa.Buffer) -> Texts:
        """What was written."""
        reader = pa.ipc.open_file(pa.memory_map(str(where)) if isinstance(where, Path) else where)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        buffers = [(one.column("words").buffers()[1], one.num_rows) for one in batches]
        words = [np.frombuffer(buffer, np.int64, 2 * count).reshape(-1, 2) for buffer, count in buffers]
        prefix = [np.asarray(one.column("prefix")) for one in batches]
        return cls(
            text=Lists([one.column("text") for one in batches]),
            prompt=Lists([one.column("prompt") for one in batches]),
            prefix=np.concatenate([np.zeros(0, np.int64), *prefix]),
            words=np.concatenate([np.zeros((0, 2), np.int64), *words]),
            where=where,
        )


def _encoded(table: RowTable, policy: CodecLM) -> Iterator[Encoded]:
    text, speaker, instruct, prompt_text = (table.column(name).to_pylist() for name in CONTEXT[:4])
    prompts, numbers = table.lists("prompt_speech"), table.kept.tolist()
    for number, *words in zip(numbers, text, speaker, instruct, prompt_text, strict=True):
        prompt = tuple(prompts[number].tolist())
        yield policy.encode_text(words[0], Context(words[1], words[2], words[3], prompt))


def _digest(encoded: Encoded) -> bytes:
    words = repr(encoded.text[encoded.prefix :]).encode()
    return hashlib.blake2b(words, digest_size=16).digest()
