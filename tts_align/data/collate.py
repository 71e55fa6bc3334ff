# SPDX-License-Identifier: Apache-2.0
"""From selected utterances to micro-batches: token rows, their mismatched twins, and what a step counts up to."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from tts_align.batch import Batch, Totals, Utterances
from tts_align.data.examples import Examples
from tts_align.data.plan import Indices, Plan
from tts_align.data.select import LabelledUtterance
from tts_align.data.sound import collate_recordings
from tts_align.models.base.code_places import code_places
from tts_align.models.base.layout import Layout, TokenRow, collate


def _attributes(source: LabelledUtterance) -> dict[str, str | float]:
    """What is known of an utterance, its voice included."""
    known = dict(source.row.attributes)
    return {"speaker": source.row.speaker, **known} if source.row.speaker else known


def row_seed(key: str, epoch: int, seed: int = 0) -> int:
    """Seed of what is drawn for a row in an epoch of a run, however the rows are cut into batches."""
    name = f"{key} {epoch} {seed}" if seed else f"{key} {epoch}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big")


def as_utterances(
    sources: Sequence[LabelledUtterance], rows: Sequence[TokenRow], seeds: Sequence[int], layout: Layout
) -> Utterances:
    """Rows as speech tokens and words.

    Args:
        sources: what they were made of.
        rows: the same rows as the policy scores them.
        seeds: of each.
        layout: how they are arranged.
    """
    return Utterances(
        **code_places(rows, layout),
        rows=tuple(rows),
        seeds=tuple(seeds),
        transcripts=tuple(source.transcript for source in sources),
        target_texts=tuple(source.row.target_text for source in sources),
        speakers=tuple(source.row.speaker for source in sources),
        attributes=tuple(_attributes(source) for source in sources),
    )


@dataclass(frozen=True)
class MicroBatch:
    """What one rank scores at once, as row indices.

    Args:
        rows: the rows, chosen before rejected.
        totals: counts of the whole optimiser step.
        first: whether it is the first of its step on this rank.
        mismatched: on the first one, the rows of each of the step's micro-batches whose mismatched twins are scored.
        epoch: number of the epoch.
    """

    rows: tuple[int, ...]
    totals: Totals
    first: bool = True
    mismatched: tuple[tuple[int, ...], ...] = ()
    epoch: int = 0


class MicroBatches(Dataset[Batch]):
    """Collates micro-batches; the index is the plan's, so workers need no state."""

    def __init__(self, examples: Examples, layout: Layout) -> None:
        self.examples, self.layout = examples, layout

    def __len__(self) -> int:
        return len(self.examples.items)

    def __getitem__(self, micro: MicroBatch) -> Batch:
        """Collate the rows of one micro-batch."""
        examples = self.examples
        return Batch(
            rows=collate([examples.rows[i] for i in micro.rows], self.layout),
            desirable=torch.from_numpy(examples.desirable[list(micro.rows)]),
            totals=micro.totals,
            mismatched=tuple(collate([examples.mismatched[i] for i in rows], self.layout) for rows in micro.mismatched),
            first=micro.first,
            utterances=self._utterances(micro) if examples.utterances else None,
            recordings=collate_recordings([examples.recordings[i] for i in micro.rows])
            if examples.recordings
            else None,
        )

    def _utterances(self, micro: MicroBatch) -> Utterances:
        examples = self.examples
        # Rows that are still to be tokenised may be alike but for their sound.
        names = [examples.sources[i].row.id if examples.recordings else "" for i in micro.rows]
        keys = [self.layout.key(examples.rows[i]) for i in micro.rows]
        both = zip(keys, names, strict=True)
        seeds = [row_seed(f"{key}{name}", micro.epoch, examples.noise_seed) for key, name in both]
        return as_utterances(
            [examples.sources[i] for i in micro.rows], [examples.rows[i] for i in micro.rows], seeds, self.layout
        )


@runtime_checkable
class Progress(Protocol):
    """Where training stands."""

    @property
    def done(self) -> int:
        """Micro-batches this rank has trained on since the beginning, over all epochs."""

    def resume(self) -> None:
        """Make sure that training can continue from here."""


class PlanSampler(DistributedSampler[MicroBatch]):
    """This rank's micro-batches, from where training stands.

    It is a ``DistributedSampler`` so that Lightning leaves it alone: the plan already knows the ranks.

    Args:
        plan: cuts the epochs.
        examples: what is cut.
        rank: this process.
        world: number of processes.
        accumulate: micro-batches of a step on one rank.
        steps: optimiser steps after which the next epoch begins; by default all of the plan's.
        progress: where training stands; by default at the beginning of the epoch that ``set_epoch`` names.
    """

    def __init__(
        self,
        plan: Plan,
        examples: Examples,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        steps: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(range(len(examples.items)), num_replicas=world, rank=rank)  # type: ignore[arg-type]
        self.plan, self.examples = plan, examples
        self.world, self.accumulate = world, accumulate
        self.steps = plan.steps_per_epoch if steps is None else steps
        self.progress = progress

    def __len__(self) -> int:
        """Micro-batches of a whole epoch of the plan on this rank; Lightning's limits are applied to this number."""
        return self.plan.steps_per_epoch * self.accumulate

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch, a resumed one too."""
        super().set_epoch(epoch)
        if self.progress is not None:
            self.progress.resume()

    def __iter__(self) -> Iterator[MicroBatch]:
        length = self.steps * self.accumulate
        epoch, position = divmod(self.epoch * length if self.progress is None else self.progress.done, length)
        step, inside = divmod(position, self.accumulate)
        for items in self.plan.steps(epoch)[step : self.steps]:
            yield from self.step(items, epoch)[inside:]
            inside = 0

    def step(self, items: Indices, epoch: int = 0) -> list[MicroBatch]:
        """This rank's micro-batches of one optimiser step."""
        dealt = self.plan.deal(items, self.world, self.accumulate)
        mine = tuple(tuple(self.examples.items[ranks[self.rank]].T.ravel().tolist()) for ranks in dealt)
        totals = self._totals(items)
        twins = mine if len(self.examples.mismatched) else ()
        return [MicroBatch(rows, totals, i == 0, twins if i == 0 else (), epoch) for i, rows in enumerate(mine)]

    def _totals(self, items: Indices) -> Totals:
        rows = self.examples.items[items].ravel()
        targets, desirable = self.examples.targets[rows], self.examples.desirable[rows]
        sources = [self.examples.sources[row] for row in rows.tolist()] if self.examples.utterances else []
        labels = Counter(name for source in sources for name in _attributes(source))
        transcripts = [source.transcript for source in sources if source.transcript is not None]
        labels["text"] = len(transcripts)
        return Totals(
            rows=len(rows),
            tokens=int(targets.sum()),
            desirable_rows=int(desirable.sum()),
            desirable_tokens=int(targets[desirable].sum()),
            labels=dict(labels),
            speech_tokens=sum(len(source.sound.speech) for source in sources),
            letters=sum(map(len, transcripts)),
        )
