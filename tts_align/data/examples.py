# SPDX-License-Identifier: Apache-2.0
"""All rows of a data set as arrays: which text, which speech, how arranged; token rows are made when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tts_align.data.keyed import hex_key
from tts_align.data.mismatch import partners
from tts_align.data.plan import Indices
from tts_align.data.select import Item, Items, LabelledUtterance
from tts_align.data.sound import RecordingFeatures
from tts_align.data.table.rows import numbered
from tts_align.data.texts import CONTEXT, Texts
from tts_align.models.base.layout import Layout, TokenRow
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.row_keys import RowKeys
from tts_align.utils.lazy import Lazy

_CHUNK = 8192


@dataclass(frozen=True)
class Arranged:
    """How utterances become token rows.

    Args:
        text: number of each one's text.
        bistream: whether text and speech are interleaved.
        key: of each row, (r, 16).
        partner: for each row the row whose speech stands under its text; empty if not wanted.
        partner_bistream: likewise for those.
        partner_key: likewise.
    """

    text: NDArray[np.int64]
    bistream: NDArray[np.bool_]
    key: NDArray[np.uint8]
    partner: NDArray[np.int64]
    partner_bistream: NDArray[np.bool_]
    partner_key: NDArray[np.uint8]


class SelectedUtterances:
    """The selected utterances as arrays, one behind the other.

    Args:
        items: what was selected.
    """

    def __init__(self, items: Items) -> None:
        self.items = items
        self.row, self.side = items.row.ravel(), items.side.ravel()
        self._number = items.table.kept[self.row]
        self._speech = items.table.lists("speech"), items.table.lists("rejected")
        lengths = items.table.lengths("speech"), items.table.lengths("rejected")
        self.length = np.where(self.side == 0, lengths[0][self.row], lengths[1][self.row])

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers that are not forked look at the table themselves."""
        return SelectedUtterances, (self.items,)

    def speech(self, number: int) -> NDArray[Any]:
        """Speech tokens of an utterance."""
        return self._speech[self.side[number]][int(self._number[number])]

    def source(self, number: int) -> LabelledUtterance:
        """The utterance and the row that it comes from."""
        item, inside = divmod(number, self.items.row.shape[1])
        row = self.items.table[int(self.items.row[item, inside])]
        sound = row.sounds[int(self.items.side[item, inside])]
        return LabelledUtterance(row, sound, bool(self.items.desirable[item, inside]))

    def texts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Number of each utterance's text, in the order in which texts appear, and a row of the table for each."""
        text = numbered(self.items.table.groups(*CONTEXT)[self.row])
        _, first = np.unique(text, return_index=True)
        return text, self.row[first]


def arrange(
    utterances: SelectedUtterances,
    text: NDArray[np.int64],
    texts: Texts,
    layout: Layout,
    mismatched: bool,
    bistream_share: float,
    seed: int,
) -> Arranged:
    """Draw once for all what is random: layout and partners.

    Args:
        utterances: that were selected.
        text: number of each one's text.
        texts: as the policy reads them.
        layout: of the policy.
        mismatched: also find each row's partner.
        bistream_share: probability that a row long enough for it is arranged bistream.
        seed: of the draws.
    """
    keys = _Keys(utterances, text, texts, layout, bistream_share, seed)
    own = np.arange(len(text))
    bistream, key = keys.of(own)
    if bistream_share > 0 and not keys.can_bistream(own).any():
        raise ValueError("bistream_share has no effect: no row has enough speech for its text; set it to 0")
    none = np.zeros(0, np.int64), np.zeros(0, bool), np.zeros((0, 16), np.uint8)
    partner, partner_bistream, partner_key = none
    if mismatched:
        # The voice is left out of the comparison: one sentence in two voices is still one sentence.
        _, words = np.unique(texts.words, axis=0, return_inverse=True)
        partner = partners(words.ravel()[text].tolist(), utterances.length.tolist(), seed)
        partner_bistream, partner_key = keys.of(partner)
    return Arranged(text, bistream, key, partner, partner_bistream, partner_key)


class _Keys:
    """Layout and key of each row, with its own speech or another's."""

    def __init__(
        self,
        utterances: SelectedUtterances,
        text: NDArray[np.int64],
        texts: Texts,
        layout: Layout,
        share: float,
        seed: int,
    ) -> None:
        self.utterances, self.text, self.texts, self.layout = utterances, text, texts, layout
        self.share, self.seed = share, seed
        self.words = texts.text.lengths - texts.prefix
        self.prompt = texts.prompt.lengths
        self.write = RowKeys(layout)

    def can_bistream(self, speech: NDArray[np.int64]) -> NDArray[np.bool_]:
        """See :meth:`Layout.can_bistream`; ``speech`` is the number of the utterance whose speech each row has."""
        words, length = self.words[self.text], self.utterances.length[speech]
        enough = length * self.layout.text_block > words * self.layout.speech_block
        return (words > 0) & (self.prompt[self.text] == 0) & enough

    def of(self, speech: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
        """Whether each row is bistream, and its key."""
        bistream = np.zeros(len(speech), bool)
        key = np.zeros((len(speech), 16), np.uint8)
        can = self.can_bistream(speech) if self.share > 0 else bistream
        for start in range(0, len(speech), _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, len(speech)))
            key[rows] = self._keys(rows, speech, bistream)
            # Decided by the row's content, so that every model and every run agrees.
            for row in rows[can[rows]].tolist():
                draw = hashlib.blake2b(f"{self.seed} {hex_key(key[row])}".encode(), digest_size=8).digest()
                bistream[row] = int.from_bytes(draw, "big") < self.share * 2**64
            if (changed := rows[bistream[rows]]).size:
                key[changed] = self._keys(changed, speech, bistream)
        return bistream, key

    def _keys(
        self, rows: NDArray[np.int64], speech: NDArray[np.int64], bistream: NDArray[np.bool_]
    ) -> NDArray[np.uint8]:
        starts: dict[int, bytes] = {}
        numbers = self.text[rows].tolist()
        for text in numbers:
            if text not in starts:
                starts[text] = self.write.start(self.texts.text[text].tolist())
        said = self.write.speech([self.utterances.speech(one) for one in speech[rows].tolist()])
        ends = (
            self.write.end(int(self.texts.prefix[text]), flag, self.texts.prompt[text].tolist())
            for text, flag in zip(numbers, bistream[rows].tolist(), strict=True)
        )
        return self.write.digests((starts[text] for text in numbers), said, ends)


@dataclass(frozen=True)
class Examples:
    """All rows of a data set, ready to be put into batches.

    Args:
        rows: one for each scored utterance.
        sources: where each comes from.
        desirable: their labels.
        items: indices of the rows that stay together, (items, 1) or (items, 2) with the chosen one first.
        keys: of the rows, (r, 16).
        inputs: backbone positions of each row.
        targets: predicted tokens of each row.
        mismatched: for each row its text with the speech of another sentence; empty if not wanted.
        mismatched_keys: of those.
        utterances: whether batches bring the rows as speech tokens and words, too.
        recordings: the rows as sound; empty if not wanted.
        noise_seed: of the run, which moves what objectives draw for a row.
    """

    rows: Sequence[TokenRow]
    sources: Sequence[LabelledUtterance]
    desirable: NDArray[np.bool_]
    items: Indices
    keys: NDArray[np.uint8]
    inputs: Indices
    targets: Indices
    mismatched: Sequence[TokenRow] = ()
    mismatched_keys: NDArray[np.uint8] | None = None
    utterances: bool = False
    recordings: tuple[RecordingFeatures, ...] = ()
    noise_seed: int = 0

    @classmethod
    def of(
        cls,
        items: Sequence[Item],
        policy: CodecLM,
        mismatched: bool = False,
        bistream_share: float = 0.0,
        seed: int = 0,
        utterances: bool = False,
    ) -> Examples:
        """Tokenise the texts, and draw once for all what is random: layout and partners; all of it in memory.

        Args:
            items: what :func:`tts_align.data.select.select` gave; all of them with speech tokens.
            policy: knows how text becomes tokens.
            mismatched: also make the mismatched rows.
            bistream_share: probability that a row long enough for it is arranged bistream.
            seed: of the draws.
            utterances: let batches bring the rows as speech tokens and words, too.
        """
        found = SelectedUtterances(Items.of(items))
        text, rows = found.texts()
        sink = pa.BufferOutputStream()
        Texts.write(found.items.table, rows, policy, sink)
        texts = Texts.open(sink.getvalue())
        arranged = arrange(found, text, texts, policy.layout, mismatched, bistream_share, seed)
        return cls.made(found, texts, arranged, policy.layout, utterances)

    @classmethod
    def made(
        cls, found: SelectedUtterances, texts: Texts, arranged: Arranged, layout: Layout, utterances: bool = False
    ) -> Examples:
        """What was arranged, put together."""
        text, count = arranged.text, len(arranged.text)

        lengths = texts.text.lengths[text]
        blocks = (lengths - texts.prefix[text]) // layout.text_block
        return cls(
            rows=Lazy(count, partial(_own, found, texts, arranged)),
            sources=Lazy(count, found.source),
            desirable=found.items.desirable.ravel(),
            items=np.arange(count).reshape(len(found.items), -1),  # :: (r) -> (items, 1 or 2)
            keys=arranged.key,
            inputs=lengths + texts.prompt.lengths[text] + found.length + 2,
            targets=found.length + 1 + np.where(arranged.bistream, blocks, 0),
            mismatched=Lazy(len(arranged.partner), partial(_twin, found, texts, arranged)),
            mismatched_keys=arranged.partner_key,
            utterances=utterances,
        )

    def tokens(self, layout: Layout) -> Indices:
        """Backbone positions of each item."""
        return self.inputs[self.items].sum(1)


def _own(found: SelectedUtterances, texts: Texts, arranged: Arranged, number: int) -> TokenRow:
    return _row(found, texts, arranged.text[number], number, arranged.bistream[number])


def _twin(found: SelectedUtterances, texts: Texts, arranged: Arranged, number: int) -> TokenRow:
    return _row(found, texts, arranged.text[number], arranged.partner[number], arranged.partner_bistream[number])


def _row(found: SelectedUtterances, texts: Texts, text: Any, speech: Any, bistream: Any) -> TokenRow:
    return TokenRow(
        text=tuple(texts.text[int(text)].tolist()),
        speech=tuple(found.speech(int(speech)).tolist()),
        prefix=int(texts.prefix[int(text)]),
        bistream=bool(bistream),
        prompt=tuple(texts.prompt[int(text)].tolist()),
    )
