# SPDX-License-Identifier: Apache-2.0
"""How text and speech tokens stand in one sequence, and where each speech token is predicted.

Unistream: ``[sos, text.., task, speech..]`` predicts ``[speech.., end]`` from the task token on. Bistream: blocks of
``text_block`` text and ``speech_block`` speech tokens interleaved, each block closed by a predicted fill token, the
rest as in unistream. Special ids follow the two published families of checkpoints (CosyVoice2, arXiv 2412.10117, and
CosyVoice 3, arXiv 2505.17589).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tts_align.batch import Rows

TEXT, SPEECH, SPECIAL = 0, 1, 2
Family = Literal["cosyvoice2", "cosyvoice3"]


@dataclass(frozen=True)
class TokenRow:
    """One row before it is arranged.

    Args:
        text: ids of the text tokens, the prefix included.
        speech: speech tokens without end-of-speech.
        prefix: how many leading text tokens (voice, instruction) always stay in front of the speech.
        bistream: whether text and speech are interleaved; drawn once per row by the data.
        prompt: speech tokens of a recording that the speech continues: inputs, never targets.
    """

    text: tuple[int, ...]
    speech: tuple[int, ...]
    prefix: int = 0
    bistream: bool = False
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class Arranged:
    """One arranged row: parallel inputs and tables, and (position, target id) of what is predicted."""

    token: list[int]
    table: list[int]
    predicted_at: list[int]
    target: list[int]


@dataclass(frozen=True)
class Layout:
    """Ids and block sizes of one family of models.

    Args:
        family: which published arrangement of special ids is followed.
        codebook_size: number of speech tokens V.
        text_block: text tokens in a bistream block.
        speech_block: speech tokens in a bistream block.
    """

    family: Family
    codebook_size: int
    text_block: int = 5
    speech_block: int = 15

    @property
    def vocabulary(self) -> int:
        """Rows of the speech embedding and outputs of the head."""
        return self.codebook_size + (3 if self.family == "cosyvoice2" else 200)

    @property
    def end(self) -> int:
        """End-of-speech, a target only."""
        return self.codebook_size + (0 if self.family == "cosyvoice2" else 1)

    @property
    def fill(self) -> int:
        """What closes a bistream block, a target only."""
        return self.codebook_size + (2 if self.family == "cosyvoice2" else 3)

    @property
    def sos(self) -> tuple[int, int]:
        """Start of sequence as (id, table)."""
        return (0, SPECIAL) if self.family == "cosyvoice2" else (self.codebook_size, SPEECH)

    @property
    def task(self) -> tuple[int, int]:
        """Turn from text to speech as (id, table)."""
        return (1, SPECIAL) if self.family == "cosyvoice2" else (self.codebook_size + 2, SPEECH)

    def can_bistream(self, row: TokenRow) -> bool:
        """Whether there is enough speech for the text to interleave them (strictly more than 15 : 5).

        A row that continues a recording is not interleaved: its transcript stands before its own text.
        """
        words = len(row.text) - row.prefix
        return words > 0 and not row.prompt and len(row.speech) * self.text_block > words * self.speech_block

    def prompt(self, text: Sequence[int], speech: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Ids and tables of what precedes the speech to be generated."""
        (sos, sos_table), (task, task_table) = self.sos, self.task
        token = [sos, *text, task, *speech]
        return token, [sos_table, *[TEXT] * len(text), task_table, *[SPEECH] * len(speech)]

    def arrange(self, row: TokenRow) -> Arranged:
        """Arrange one row.

        Raises:
            ValueError: a token is outside the codebook, or bistream was asked of a row too short for it.
        """
        for tokens in (row.speech, row.prompt):
            if tokens and not 0 <= min(tokens) <= max(tokens) < self.codebook_size:
                raise ValueError(
                    f"speech tokens must lie in 0..{self.codebook_size - 1}, got {min(tokens)}..{max(tokens)}: "
                    "were they made by another tokenizer?"
                )
        if row.bistream and row.prompt:
            raise ValueError("a bistream row cannot continue a recording: leave out its prompt, or the interleaving")
        if row.bistream and not self.can_bistream(row):
            raise ValueError(
                f"a bistream row needs more than {self.speech_block} speech tokens per {self.text_block} text tokens, "
                f"got {len(row.speech)} for {len(row.text) - row.prefix}"
            )
        return self._bistream(row) if row.bistream else self._unistream(row)

    def _unistream(self, row: TokenRow) -> Arranged:
        token, table = self.prompt(row.text, (*row.prompt, *row.speech))
        first = 1 + len(row.text) + len(row.prompt)  # the task token, or the prompt's last, predicts the first token
        target = [*row.speech, self.end]
        return Arranged(token, table, list(range(first, first + len(target))), target)

    def _bistream(self, row: TokenRow) -> Arranged:
        prefix, words = row.text[: row.prefix], row.text[row.prefix :]
        blocks = len(words) // self.text_block
        token, table = [self.sos[0], *prefix], [self.sos[1], *[TEXT] * len(prefix)]
        at: list[int] = []
        target: list[int] = []
        for block in range(blocks):
            text = words[block * self.text_block : (block + 1) * self.text_block]
            speech = row.speech[block * self.speech_block : (block + 1) * self.speech_block]
            token += [*text, *speech]
            table += [TEXT] * len(text) + [SPEECH] * len(speech)
            target += [*speech, self.fill]  # the block's last text token predicts its first token
            at += range(len(token) - len(speech) - 1, len(token))
        tail = row.speech[blocks * self.speech_block :]
        token += [*words[blocks * self.text_block :], self.task[0], *tail]
        table += [TEXT] * (len(words) % self.text_block) + [self.task[1]] + [SPEECH] * len(tail)
        at += range(len(token) - len(tail) - 1, len(token))
        target += [*tail, self.end]
        return Arranged(token, table, at, target)

    def target_count(self, row: TokenRow) -> int:
        """How many targets the row has: speech tokens, fills and end-of-speech."""
        words = len(row.text) - row.prefix
        return len(row.speech) + 1 + (words // self.text_block if row.bistream else 0)

    def input_count(self, row: TokenRow) -> int:
        """How many positions the row takes in the backbone: sos, text, task and speech."""
        return len(row.text) + len(row.prompt) + len(row.speech) + 2

    def key(self, row: TokenRow) -> str:
        """Digest of everything in the row and its layout that changes a model's numbers."""
        return hashlib.blake2b(f"{self.words}{row!r})".encode(), digest_size=16).hexdigest()

    @property
    def words(self) -> str:
        """What stands before the row in what is digested."""
        blocks = f"text_block={self.text_block}, speech_block={self.speech_block}"
        # Caches and seeds of earlier runs hang on these very words: a renamed field must not change them.
        return f"(Layout(family={self.family!r}, codes={self.codebook_size}, {blocks}), "


def collate(token_rows: Sequence[TokenRow], layout: Layout) -> Rows:
    """Arrange rows and put their inputs one behind the other; only the target matrix is padded.

    Args:
        token_rows: the rows, at least one.
        layout: ids and blocks of the model.

    Returns:
        The rows, on the CPU.
    """
    if not token_rows:
        raise ValueError("expected at least one row to collate, got none")
    arranged = [layout.arrange(row) for row in token_rows]
    lengths = [len(row.token) for row in arranged]
    offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)  # int32: what attention kernels read
    width = max(len(row.target) for row in arranged)
    mask = np.zeros((len(arranged), width), bool)
    target = np.zeros((len(arranged), width), np.int64)
    hidden = np.zeros((len(arranged), width), np.int64)
    for number, row in enumerate(arranged):
        mask[number, : len(row.target)] = True
        target[number, : len(row.target)] = row.target
        hidden[number, : len(row.target)] = offset[number] + np.asarray(row.predicted_at)
    return Rows(
        token=torch.tensor([token for row in arranged for token in row.token]),
        table=torch.tensor([table for row in arranged for table in row.table]),
        position=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        row=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        offset=torch.from_numpy(offset),
        lengths=tuple(lengths),
        hidden_index=torch.from_numpy(hidden[mask]),
        target_index=torch.from_numpy(np.flatnonzero(mask)),
        target=torch.from_numpy(target[mask]),
        mask=torch.from_numpy(mask),
        end=torch.from_numpy(mask & (target == layout.end)),
        keys=tuple(layout.key(row) for row in token_rows),
    )
