# SPDX-License-Identifier: Apache-2.0
"""Which rows an objective can use: pairs serve as two labelled rows, labelled rows of one sentence form pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from tts_align.batch import Reads
from tts_align.data.records import Row, Sound
from tts_align.data.table.columns import BAD, GOOD, NONE
from tts_align.data.table.rows import RowTable, numbered


@dataclass(frozen=True)
class LabelledUtterance:
    """One scored utterance under a text.

    Args:
        row: where it comes from.
        sound: what is scored.
        desirable: its label; chosen and unlabelled speech is desirable.
    """

    row: Row
    sound: Sound
    desirable: bool

    @property
    def transcript(self) -> str | None:
        """What is said: what a recogniser heard, or the text where the speech is good; ``None`` if nobody knows."""
        if self.row.pair is not None:
            return self.row.target_text if self.sound is self.row.pair.chosen else None
        return self.row.notes.get("transcript", self.row.target_text if self.row.desirable is not False else None)


Item = tuple[LabelledUtterance, ...]
"""What stays together in a batch: one utterance, or (chosen, rejected)."""


@dataclass(frozen=True)
class Usable:
    """How many rows each kind of objective can use.

    Args:
        speech: good utterances.
        pairs: pairs that the manifest gives.
        formed: pairs made of labelled utterances.
        desirable: utterances labelled desirable, or chosen.
        undesirable: utterances labelled undesirable, or rejected.
        sentences: sentences with any label.
        one_sided: those of them that have only good or only bad utterances.
        readers: names of the objectives that use each kind.
    """

    speech: int
    pairs: int
    formed: int
    desirable: int
    undesirable: int
    sentences: int
    one_sided: int
    readers: Mapping[Reads, Sequence[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        share = f"{self.one_sided / self.sentences:.0%}" if self.sentences else "none labelled"
        lines = [
            (self._named(Reads.SPEECH), f"{self.speech} rows"),
            (self._named(Reads.PAIR), f"{self.pairs + self.formed} pairs ({self.pairs} given, {self.formed} formed)"),
            (self._named(Reads.LABELLED), f"{self.desirable} desirable + {self.undesirable} undesirable"),
            ("one-sided sentences", f"{share} ({self.one_sided} of {self.sentences}); no pair can be formed of them"),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {count}" for name, count in lines)

    def _named(self, reads: Reads) -> str:
        names = self.readers.get(reads)
        return f"{reads} ({', '.join(names)})" if names else str(reads)


@dataclass(frozen=True, eq=False)
class Items(Sequence[Item]):
    """Utterances of a manifest as arrays; records are made of those that are asked for.

    Args:
        table: the manifest.
        row: number of each utterance's row in it, (items, 1) or (items, 2).
        side: 0 for a row's utterance or the chosen one of its pair, 1 for the rejected one; likewise.
        desirable: the labels; likewise.
    """

    table: RowTable
    row: NDArray[np.int64]
    side: NDArray[np.int8]
    desirable: NDArray[np.bool_]

    @classmethod
    def of(cls, items: Sequence[Item]) -> Items:
        """The same of records, whose rows become a table in memory."""
        if isinstance(items, Items):
            return items
        table = RowTable.of(utterance.row for item in items for utterance in item)
        width = len(items[0]) if items else 1
        rejected = [[one.row.pair is not None and one.sound is one.row.pair.rejected for one in item] for item in items]
        labels = [[one.desirable for one in item] for item in items]
        numbers = np.arange(len(table)).reshape(-1, width)  # :: (r) -> (items, 1 or 2)
        return cls(table, numbers, np.asarray(rejected, np.int8).reshape(-1, width), np.asarray(labels, bool))

    def __len__(self) -> int:
        """How many items."""
        return len(self.row)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, place: int | slice) -> Item | tuple[Item, ...]:
        """One or two utterances as records."""
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(len(self))))
        return tuple(
            _utterance(self.table[row], side, desirable)
            for row, side, desirable in zip(
                self.row[place].tolist(), self.side[place].tolist(), self.desirable[place].tolist(), strict=True
            )
        )

    def __eq__(self, other: object) -> bool:
        """Whether another sequence holds equal utterances."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def _utterance(row: Row, side: int, desirable: bool) -> LabelledUtterance:
    return LabelledUtterance(row, row.sounds[side], desirable)


class Selector:
    """What can be used of a manifest.

    Args:
        rows: of the manifest.
        seed: decides which of several utterances of a sentence form pairs.
    """

    def __init__(self, rows: Sequence[Row], seed: int = 0) -> None:
        self.table = rows if isinstance(rows, RowTable) else RowTable.of(rows)
        self.seed = seed

    @cached_property
    def label(self) -> NDArray[np.int8]:
        """Label of each row."""
        return self.table.array("label").astype(np.int8)

    @cached_property
    def pair(self) -> NDArray[np.bool_]:
        """Rows that are pairs."""
        return self.table.array("pair").astype(bool)

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return self.table.lengths("speech")

    @cached_property
    def sentence(self) -> NDArray[np.int64]:
        """Number of each row's sentence; see :attr:`~tts_align.data.records.Row.sentence`."""
        return self.table.groups("text", "language", "speaker", "instruct", "prompt_text", "prompt_speech")

    def _items(self, row: NDArray[np.int64], side: NDArray[np.int8], desirable: NDArray[np.bool_]) -> Items:
        width = row.shape[1] if row.ndim == 2 else 1
        return Items(self.table, row.reshape(-1, width), side.reshape(-1, width), desirable.reshape(-1, width))

    def every(self) -> Items:
        """Every utterance, of pairs both; what is rejected or labelled undesirable is not desirable."""
        row = np.repeat(np.arange(len(self.table)), 1 + self.pair)
        side = np.zeros(len(row), np.int8)
        side[1:] = row[1:] == row[:-1]
        return self._items(row, side, (side == 0) & (self.label[row] != BAD))

    def speech(self) -> Items:
        """Good speech: what is chosen, desirable or not labelled."""
        row = np.flatnonzero(self.pair | (self.label != BAD))
        return self._items(row, np.zeros(len(row), np.int8), np.ones(len(row), bool))

    def labelled(self) -> Items:
        """Labelled utterances, and both sides of pairs."""
        every = self.every()
        row, side = every.row[:, 0], every.side[:, 0]
        there = self.pair[row] | (self.label[row] != NONE)
        row, side = row[there], side[there]
        return self._items(row, side, np.where(self.pair[row], side == 0, self.label[row] == GOOD))

    @cached_property
    def pairs(self) -> Items:
        """Given pairs, and labelled utterances of one sentence, each used at most once."""
        given = np.flatnonzero(self.pair)
        formed = np.asarray(list(self._formed()), np.int64).reshape(-1, 2)
        row = np.concatenate([np.stack([given, given], 1), formed])
        side = np.zeros(row.shape, np.int8)
        side[: len(given), 1] = 1
        return self._items(row, side, np.broadcast_to([True, False], row.shape).copy())

    def _formed(self) -> Iterator[tuple[int, int]]:
        loose = np.flatnonzero(~self.pair & (self.label != NONE))
        sentence, good = numbered(self.sentence[loose]), self.label[loose] == GOOD
        count = int(sentence.max()) + 1 if len(loose) else 0
        sides = np.bincount(sentence[good], minlength=count), np.bincount(sentence[~good], minlength=count)
        order = np.lexsort((~good, sentence))  # sentences as they appear, in each the good ones first
        starts = np.concatenate([[0], np.cumsum(sides[0] + sides[1])])
        generator = np.random.default_rng([self.seed, 0x9A125])
        for group in np.flatnonzero((sides[0] > 0) & (sides[1] > 0)).tolist():
            rows = loose[order[starts[group] : starts[group + 1]]].tolist()
            chosen, bad = rows[: sides[0][group]], rows[sides[0][group] :]
            rejected = [bad[i] for i in generator.permutation(len(bad)).tolist()]
            for i in generator.permutation(len(chosen)).tolist():
                # Two equal utterances with opposite labels prefer nothing.
                match = next((one for one in rejected if not self._same(one, chosen[i])), None)
                if match is not None:
                    rejected.remove(match)
                    yield chosen[i], match

    def _same(self, one: int, other: int) -> bool:
        if self._lengths[one] != self._lengths[other]:
            return False
        speech, numbers = self.table.lists("speech"), self.table.kept
        if not np.array_equal(speech[int(numbers[one])], speech[int(numbers[other])]):
            return False
        return self.table[one].audio == self.table[other].audio

    def usable(self, readers: Mapping[Reads, Sequence[str]] | None = None) -> Usable:
        """Count what each kind of objective can use."""
        labelled = self.labelled()
        sentence, good = self.sentence[labelled.row[:, 0]], labelled.desirable[:, 0]
        both = np.intersect1d(sentence[good], sentence[~good])
        given, sentences = int(self.pair.sum()), len(np.unique(sentence))
        return Usable(
            speech=len(self.speech()),
            pairs=given,
            formed=len(self.pairs) - given,
            desirable=int(good.sum()),
            undesirable=int((~good).sum()),
            sentences=sentences,
            one_sided=sentences - len(both),
            readers=readers or {},
        )

    def select(self, reads: Reads, paired_only: bool = False, flip_labels: bool = False) -> Items:
        """The items that an objective trains on; see :func:`select`."""
        if reads is Reads.PAIR and paired_only:
            raise ValueError("paired_only has no effect on an objective that reads pairs: leave it out")
        if reads in (Reads.SPEECH, Reads.ANY) and flip_labels:
            raise ValueError(f"flip_labels has no effect on an objective that reads {reads} rows: leave it out")
        items = self._select(reads, paired_only)
        if not len(items):
            kind = f"{reads} rows" + (" that stand in pairs" if paired_only else "")
            raise ValueError(f"the objective reads {kind}, but the manifest has none; it has:\n{self.usable()}")
        if not flip_labels:
            return items
        # The desirable one stands first, whatever the labels are.
        return Items(items.table, items.row[:, ::-1], items.side[:, ::-1], ~items.desirable[:, ::-1])

    def _select(self, reads: Reads, paired_only: bool) -> Items:
        if reads is Reads.PAIR:
            return self.pairs
        if paired_only:
            pairs = self.pairs
            every = self._items(pairs.row.ravel(), pairs.side.ravel(), pairs.desirable.ravel())
            kept = np.ones(len(every), bool) if reads is not Reads.SPEECH else every.desirable[:, 0]
            return self._items(every.row[kept], every.side[kept], every.desirable[kept])
        return {Reads.LABELLED: self.labelled, Reads.SPEECH: self.speech}.get(reads, self.every)()


def usable(rows: Sequence[Row], seed: int = 0, readers: Mapping[Reads, Sequence[str]] | None = None) -> Usable:
    """Count what each kind of objective can use.

    Args:
        rows: of a manifest.
        seed: of the pairs that are formed.
        readers: names of the objectives that use each kind, to be printed with it.
    """
    return Selector(rows, seed).usable(readers)


def select(
    rows: Sequence[Row], reads: Reads, paired_only: bool = False, flip_labels: bool = False, seed: int = 0
) -> Items:
    """The items that an objective trains on.

    Args:
        rows: the manifest.
        reads: which rows the objective can use.
        paired_only: of labelled or good speech only what stands in a pair.
        flip_labels: desirable counts as undesirable and the other way round.
        seed: decides which of several utterances of a sentence form pairs.

    Raises:
        ValueError: nothing can be used, or an option has no effect.
    """
    return Selector(rows, seed).select(reads, paired_only, flip_labels)
