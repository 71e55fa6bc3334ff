# SPDX-License-Identifier: Apache-2.0
"""The plan of an epoch: which items meet in which optimiser step, and which rank and micro-batch scores them.

A pure function of the lengths, the knobs, the seed and the epoch. Which items a step holds never depends on the number
of ranks or micro-batches, so neither does the trajectory of the training.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_SHUFFLES_AT_LEAST = 4
"""Sorting by length reaches over no more than this part of an epoch, or the same items would always meet."""


@dataclass(frozen=True)
class Plan:
    """Cuts items into optimiser steps, and steps into micro-batches.

    Args:
        tokens: backbone positions of each item, at least one.
        rows_per_item: 1, or 2 for pairs.
        rows_per_step: rows of one optimiser step, over all ranks and micro-batches; some steps get one item more, so
            that none is left over.
        tokens_per_step: backbone positions of one optimiser step, about; instead of ``rows_per_step``.
        bucket_steps: steps of a window within which items are sorted by length; 1 for not at all.
        seed: of the shuffles.
        shuffle: another order in every epoch; otherwise always the same one.
    """

    tokens: Indices
    rows_per_item: int = 1
    rows_per_step: int | None = None
    tokens_per_step: int | None = None
    bucket_steps: int = 8
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other."""
        faults = []
        if (self.rows_per_step is None) == (self.tokens_per_step is None):
            faults.append("give exactly one of rows_per_step and tokens_per_step")
        for name in ("rows_per_step", "tokens_per_step", "bucket_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                faults.append(f"{name} must be at least 1, got {value}")
        if self.rows_per_step is not None and self.rows_per_step % self.rows_per_item:
            faults.append(f"rows_per_step must be even, a pair is two rows; got {self.rows_per_step}")
        if len(self.tokens) == 0 or self.tokens.min() < 1:
            faults.append("expected at least one item, and at least one position in each")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimiser steps, the same in every epoch."""
        items = len(self.tokens)
        if self.rows_per_step is not None:
            return max(1, items * self.rows_per_item // self.rows_per_step)
        assert self.tokens_per_step is not None
        return min(items, max(1, round(int(self.tokens.sum()) / self.tokens_per_step)))

    def steps(self, epoch: int) -> list[Indices]:
        """The items of each optimiser step; over the epoch each item comes exactly once."""
        order, cuts, turn = self._cuts(epoch)
        return [order[cuts[step] : cuts[step + 1]] for step in turn.tolist()]

    def fullest(self, count: int) -> list[Indices]:
        """The ``count`` steps of the first epoch with the most tokens, the fullest first."""
        order, cuts, turn = self._cuts(0)
        sums = np.add.reduceat(self.tokens[order], cuts[:-1])[turn]
        chosen = turn[np.argsort(-sums, kind="stable")[:count]]
        return [order[cuts[step] : cuts[step + 1]] for step in chosen.tolist()]

    def _cuts(self, epoch: int) -> tuple[Indices, Indices, Indices]:
        """All items, where steps begin and end among them, (steps + 1), and the order in which these come, (steps)."""
        generator = np.random.default_rng([self.seed, epoch if self.shuffle else 0])
        count = self.steps_per_epoch
        order = generator.permutation(len(self.tokens)) if self.shuffle else np.arange(len(self.tokens))
        windows = np.array_split(order, max(-(-count // self.bucket_steps), min(count, _SHUFFLES_AT_LEAST)))
        if self.bucket_steps > 1:
            # Up, then down: a step that reaches over the border of two windows still holds similar lengths.
            windows = [self._sorted(items)[:: 1 if i % 2 == 0 else -1] for i, items in enumerate(windows)]
        order = np.concatenate(windows)
        weights = np.ones(len(order)) if self.rows_per_step is not None else self.tokens[order]
        cuts = _borders(weights, count, minimum=1)
        return order, cuts, generator.permutation(count) if self.shuffle else np.arange(count)

    def _sorted(self, items: Indices) -> Indices:
        return items[np.argsort(self.tokens[items], kind="stable")]

    def deal(self, items: Indices, world: int, accumulate: int) -> list[list[Indices]]:
        """Deal one step's items to micro-batches, none of them empty.

        Micro-batches that follow each other on a rank hold different lengths, those of different ranks at the same
        time similar lengths and similar sums, so that little is padded and ranks wait little for each other.

        Args:
            items: of one step.
            world: number of ranks.
            accumulate: micro-batches of a step on one rank.

        Returns:
            For each accumulation index and each rank the items.
        """
        if len(items) < world * accumulate:
            raise ValueError(self._too_few(len(items), world, accumulate))
        items = self._sorted(items)
        return [self._balance(group, world) for group in _cut(items, self.tokens[items], accumulate, world)]

    def _balance(self, items: Indices, world: int) -> list[Indices]:
        """Longest first, each to the rank with the least so far."""
        loads = [(0, rank) for rank in range(world)]
        dealt: list[list[int]] = [[] for _ in range(world)]
        for item in items[::-1]:
            load, rank = loads[0]
            dealt[rank].append(int(item))
            heapq.heapreplace(loads, (load + int(self.tokens[item]), rank))
        return [np.asarray(mine, np.int64) for mine in dealt]

    def micro_batches(self, world: int, most_tokens: int) -> int:
        """Fewest micro-batches per step and rank of which none holds more than ``most_tokens``, but for a single item.

        Found on the fullest steps of the first epoch; in others a micro-batch may hold a little more.

        Args:
            world: number of ranks.
            most_tokens: backbone positions of a micro-batch.
        """
        fullest = self.fullest(50)
        most = int(np.diff(self._cuts(0)[1]).min()) // world
        for count in range(1, most + 1):
            dealt = (one for items in fullest for ranks in self.deal(items, world, count) for one in ranks)
            if all(int(self.tokens[one].sum()) <= most_tokens or len(one) == 1 for one in dealt):
                return count
        return max(most, 1)

    def largest(self, world: int, accumulate: int) -> int:
        """Backbone positions of the largest micro-batch of one rank, found on the fullest steps of the first epoch.

        Args:
            world: number of ranks.
            accumulate: micro-batches of a step on one rank.
        """
        dealt = (one for items in self.fullest(20) for ranks in self.deal(items, world, accumulate) for one in ranks)
        return max(int(self.tokens[one].sum()) for one in dealt)

    def check(self, world: int, accumulate: int) -> None:
        """Raise before training if in any epoch a step could have too few items for its micro-batches."""
        fewest = len(self.tokens) // self.steps_per_epoch
        if self.tokens_per_step is not None:
            # The fewest items are those of a step that gets the longest ones; it may miss its size by half an item.
            longest = np.sort(self.tokens)[::-1]
            size = self.tokens.sum() / self.steps_per_epoch - longest[0]
            fewest = min(fewest, max(1, int(np.searchsorted(np.cumsum(longest), size))))
        if fewest < world * accumulate:
            raise ValueError(self._too_few(fewest, world, accumulate))

    def _too_few(self, items: int, world: int, accumulate: int) -> str:
        knob = "rows_per_step" if self.rows_per_step is not None else "tokens_per_step"
        kind = "pairs" if self.rows_per_item == 2 else "rows"
        return (
            f"a step of {items} {kind} cannot be dealt to {world} devices x {accumulate} micro-batches "
            f"(trainer.accumulate_grad_batches): raise data.{knob}, now {getattr(self, knob)}, which counts all "
            f"devices and micro-batches together, use fewer of them, or bring more than {len(self.tokens)} {kind}"
        )


def _cut(items: Indices, weights: NDArray[np.number], parts: int, minimum: int) -> list[Indices]:
    """Cut a sequence into ``parts`` pieces of about equal weight and at least ``minimum`` items."""
    return [items[start:stop] for start, stop in pairwise(_borders(weights, parts, minimum))]


def _borders(weights: NDArray[np.number], parts: int, minimum: int) -> Indices:
    """Where such pieces begin and end, (parts + 1)."""
    part = np.arange(parts + 1)
    middles = np.cumsum(weights) - weights / 2
    cuts = np.searchsorted(middles, weights.sum() * part / parts)
    cuts[0], cuts[-1] = 0, len(weights)
    cuts = np.maximum.accumulate(cuts - minimum * part) + minimum * part
    return np.minimum(cuts, len(weights) - minimum * (parts - part))
