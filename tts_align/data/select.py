# SPDX-License-Identifier: Apache-2.0
"""Which rows an objective can use: pairs serve as two labelled rows, labelled rows of one sentence form pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tts_align.batch import Reads
from tts_align.data.records import Row, Sound


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


def usable(rows: Sequence[Row], seed: int = 0, readers: Mapping[Reads, Sequence[str]] | None = None) -> Usable:
    """Count what each kind of objective can use.

    Args:
        rows: of a manifest.
        seed: of the pairs that are formed.
        readers: names of the objectives that use each kind, to be printed with it.
    """
    labelled = _labelled(rows)
    sides: defaultdict[tuple[object, ...], set[bool]] = defaultdict(set)
    for item in labelled:
        sides[item.row.sentence].add(item.desirable)
    given = sum(row.pair is not None for row in rows)
    good = sum(item.desirable for item in labelled)
    return Usable(
        speech=len(_speech(rows)),
        pairs=given,
        formed=len(_pairs(rows, seed)) - given,
        desirable=good,
        undesirable=len(labelled) - good,
        sentences=len(sides),
        one_sided=sum(len(both) == 1 for both in sides.values()),
        readers=readers or {},
    )


def select(
    rows: Sequence[Row], reads: Reads, paired_only: bool = False, flip_labels: bool = False, seed: int = 0
) -> tuple[Item, ...]:
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
    if reads is Reads.PAIR and paired_only:
        raise ValueError("paired_only has no effect on an objective that reads pairs: leave it out")
    if reads in (Reads.SPEECH, Reads.ANY) and flip_labels:
        raise ValueError(f"flip_labels has no effect on an objective that reads {reads} rows: leave it out")
    items = _select(rows, reads, paired_only, seed)
    if not items:
        kind = f"{reads} rows" + (" that stand in pairs" if paired_only else "")
        raise ValueError(f"the objective reads {kind}, but the manifest has none; it has:\n{usable(rows, seed)}")
    if not flip_labels:
        return items
    flipped = (tuple(LabelledUtterance(u.row, u.sound, not u.desirable) for u in item) for item in items)
    return tuple(tuple(sorted(item, key=lambda u: not u.desirable)) for item in flipped)


def _select(rows: Sequence[Row], reads: Reads, paired_only: bool, seed: int) -> tuple[Item, ...]:
    if reads is Reads.PAIR or paired_only:
        pairs = _pairs(rows, seed)
        if reads is Reads.PAIR:
            return pairs
        return tuple((side,) for pair in pairs for side in pair if reads is not Reads.SPEECH or side.desirable)
    find = {Reads.LABELLED: _labelled, Reads.SPEECH: _speech}.get(reads, _every)
    return tuple((item,) for item in find(rows))


def _every(rows: Sequence[Row]) -> list[LabelledUtterance]:
    return [
        LabelledUtterance(row, sound, number == 0 and row.desirable is not False)
        for row in rows
        for number, sound in enumerate(row.sounds)
    ]


def _speech(rows: Sequence[Row]) -> list[LabelledUtterance]:
    return [
        LabelledUtterance(row, row.sounds[0], True)
        for row in rows
        if row.pair is not None or row.desirable is not False
    ]


def _labelled(rows: Sequence[Row]) -> list[LabelledUtterance]:
    found = []
    for row in rows:
        if row.pair is not None:
            found += [LabelledUtterance(row, row.pair.chosen, True), LabelledUtterance(row, row.pair.rejected, False)]
        elif row.desirable is not None:
            found.append(LabelledUtterance(row, row.sounds[0], row.desirable))
    return found


def _pairs(rows: Sequence[Row], seed: int) -> tuple[Item, ...]:
    """Given pairs, and labelled utterances of one sentence, each used at most once."""
    pairs: list[Item] = []
    loose: defaultdict[tuple[object, ...], tuple[list[LabelledUtterance], list[LabelledUtterance]]]
    loose = defaultdict(lambda: ([], []))
    for row in rows:
        if row.pair is not None:
            pairs.append(
                (LabelledUtterance(row, row.pair.chosen, True), LabelledUtterance(row, row.pair.rejected, False))
            )
        elif row.desirable is not None:
            side = 0 if row.desirable else 1
            loose[row.sentence][side].append(LabelledUtterance(row, row.sounds[0], row.desirable))
    generator = np.random.default_rng([seed, 0x9A125])
    for good, bad in loose.values():
        if good and bad:
            rejected = [bad[i] for i in generator.permutation(len(bad))]
            for i in generator.permutation(len(good)):
                # Two equal utterances with opposite labels prefer nothing.
                match = next((r for r in rejected if r.sound != good[i].sound), None)
                if match is not None:
                    rejected.remove(match)
                    pairs.append((good[i], match))
    return tuple(pairs)
