# SPDX-License-Identifier: Apache-2.0
"""Numbers on their way to the log: summed as they come, reduced over ranks once, logged once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Trainer

from tts_align.batch import Mean
from tts_align.utils.distributed import gathered
from tts_align.utils.messages import first_process


def log_numbers(trainer: Trainer, numbers: Mapping[str, float]) -> None:
    """Hand numbers to every logger, and to the callbacks that look at them."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(numbers), step=trainer.global_step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})


class StageMeans:
    """Means of one stage between two logs, kept as sums and counts: never means of means.

    Args:
        stage: train or val; the first half of every name that is logged.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.sums: dict[str, Mean] = {}
        self.logged = 0
        self._restored: dict[str, Mean] = {}

    def begin(self, step: int) -> None:
        """Begin a training, from what a checkpoint had noted since its last log.

        Args:
            step: number of the last step before it.
        """
        self.logged, self.sums, self._restored = step, self._restored, {}

    def to_state(self, trainer: Trainer) -> dict[str, list[float]]:
        """What has been noted and not logged, over all processes, for a checkpoint; every process must call it.

        What is going to be logged in this very step is not part of it: a training that resumes from here begins after.
        """
        state: dict[str, list[float]] = {}
        if self._is_due(trainer):
            return state
        for mine in gathered({name: [float(one.total), float(one.count)] for name, one in self.sums.items()}):
            for name, (total, count) in mine.items():
                before = state.get(name, [0.0, 0.0])
                state[name] = [before[0] + total, before[1] + count]
        return state

    def from_state(self, state: Mapping[str, Sequence[float]], device: torch.device) -> None:
        """Remember what a checkpoint had noted; the first process counts it for all of them."""
        mine = state if first_process() else {}
        self._restored = {
            name: Mean(torch.tensor(total, device=device), torch.tensor(count, device=device))
            for name, (total, count) in mine.items()
        }

    def note(self, metrics: Mapping[str, Mean]) -> None:
        """Add a micro-batch's numbers, without waiting for the device."""
        for name, mean in metrics.items():
            # Detached: otherwise the graph of every micro-batch would stay in memory until the next log.
            total, count = mean.total.detach(), mean.count.detach()
            before = self.sums.get(name)
            self.sums[name] = Mean(total, count) if before is None else Mean(before.total + total, before.count + count)

    def log_when_due(self, trainer: Trainer) -> bool:
        """Log once in ``trainer.log_every_n_steps`` optimiser steps; tells whether this call has logged."""
        due = self._is_due(trainer)
        if due:
            self.logged = trainer.global_step
            self.log(trainer)
        return due

    def _is_due(self, trainer: Trainer) -> bool:
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step != self.logged and step % every == 0

    def log(self, trainer: Trainer) -> None:
        """Log what has been noted, and begin anew; every rank must call it, whatever it has noted."""
        sums, self.sums = self.sums, {}
        names = sorted(set().union(*gathered(list(sums))))  # a rank may have met nothing that another one counts
        if not names:
            return
        nothing = torch.zeros(2, device=trainer.strategy.root_device)
        pairs = [torch.stack([sums[name].total, sums[name].count]) if name in sums else nothing for name in names]
        both = torch.stack([pair.float() for pair in pairs])
        reduced = trainer.strategy.reduce(both, reduce_op="sum") if trainer.world_size > 1 else both
        means = {
            f"{self.stage}/{name}": total / count
            for name, (total, count) in zip(names, reduced.tolist(), strict=True)
            if count > 0
        }
        log_numbers(trainer, means)
        if self.stage == "train":
            trainer.progress_bar_metrics["loss"] = means["train/loss"]
