# SPDX-License-Identifier: Apache-2.0
"""One manifest, read, selected and planned: training or validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from tts_align.batch import Batch
from tts_align.data.collate import MicroBatches, PlanSampler
from tts_align.data.examples import Examples
from tts_align.data.keyed import digest_of, hex_key
from tts_align.data.plan import Plan
from tts_align.models.base.layout import Layout
from tts_align.utils.lazy import Lazy


class AlignLoader(DataLoader[Batch]):
    """Begins to read when the first batch is asked for, and says that it is resumable.

    Lightning makes the iterator of an interrupted epoch before it has restored where training stood; reading the
    position that early would start the epoch from its beginning.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches from where training stands."""
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer's own progress is enough."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class TrainerProgress:
    """Where a trainer stands.

    Args:
        trainer: whose fit loop counts.
        check: raises when training cannot continue with these data.
    """

    def __init__(self, trainer: Trainer, check: Callable[[], None]) -> None:
        self.batches: Any = trainer.fit_loop.epoch_loop.batch_progress
        self.accumulate, self.check = trainer.accumulate_grad_batches, check

    @property
    def done(self) -> int:
        """Micro-batches trained on since the beginning, over all epochs."""
        return self.batches.total.processed

    def resume(self) -> None:
        """Go back to the beginning of the optimiser step.

        A checkpoint from inside a step has lost the gradients of its first micro-batches: they are computed again.
        """
        if self.done:
            self.check()
        inside = self.done % self.accumulate
        for counts in (self.batches.total, self.batches.current):
            counts.increment_by(-inside)


@dataclass(frozen=True)
class Split:
    """Rows of one manifest and their plan.

    Args:
        examples: the rows.
        plan: which of them meet.
        layout: of the policy.
    """

    examples: Examples
    plan: Plan
    layout: Layout

    @property
    def keys(self) -> Sequence[str]:
        """Digest of each row."""
        keys = self.examples.keys
        return Lazy(len(keys), lambda number: hex_key(keys[number]))

    @cached_property
    def digest(self) -> str:
        """Name of the rows in their order."""
        return digest_of(self.examples.keys)

    @cached_property
    def labels_digest(self) -> str:
        """Name of their labels: a manifest may have been labelled anew while nothing else changed."""
        return digest_of(np.packbits(self.examples.desirable))

    def loader(self, sampler: PlanSampler, workers: int, pin_memory: bool) -> AlignLoader:
        """Batches in the order of ``sampler``."""
        data = MicroBatches(self.examples, self.layout)
        return AlignLoader(
            data,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            pin_memory=pin_memory,
        )


def cut_by_tokens(trainer: Trainer, plan: Plan, most_tokens: int) -> None:
    """Let a trainer accumulate over the fewest micro-batches that hold no more than ``most_tokens`` each.

    Raises:
        ValueError: there can be no such micro-batches, or the recipe also says how many there are.
    """
    if most_tokens < 1:
        raise ValueError(f"data.tokens_per_micro_batch must be at least 1, got {most_tokens}")
    count = plan.micro_batches(trainer.world_size, most_tokens)
    if trainer.accumulate_grad_batches not in (1, count):
        raise ValueError(
            "data.tokens_per_micro_batch and trainer.accumulate_grad_batches both say how a step is cut: leave out one"
        )
    trainer.accumulate_grad_batches = count
    rank_zero_info(f"{count} micro-batches per optimiser step and device, of {most_tokens} tokens at most")


def check_not_replaced(trainer: Trainer) -> None:
    """Raise ``ValueError`` for a trainer that would put its own order of rows in the place of the plan."""
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise ValueError(
            "trainer.overfit_batches would replace the plan of the epoch: set data.max_rows to train on a few rows "
            "again and again, and watch their loss in the log"
        )


def limited_steps(steps: int, accumulate: int, limit: int | float) -> int:
    """Optimiser steps of an epoch under ``trainer.limit_train_batches``, which counts micro-batches."""
    batches = steps * accumulate
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if batches % accumulate:
        raise ValueError(
            f"an epoch of {batches} micro-batches (trainer.limit_train_batches or fast_dev_run) ends inside an "
            f"optimiser step: make it a multiple of trainer.accumulate_grad_batches, {accumulate}"
        )
    return max(batches // accumulate, 1)
