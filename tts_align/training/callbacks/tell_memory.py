# SPDX-License-Identifier: Apache-2.0
"""Says before the first step how much memory the training will need, and what to change if the device has less."""

from __future__ import annotations

import logging

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from tts_align.data.collate import PlanSampler
from tts_align.training.callbacks.watched import is_watched
from tts_align.training.memory import available, estimate

log = logging.getLogger(__name__)


class TellMemory(Callback):
    """Compares what the largest micro-batch will need with what the device has, once everything else is there."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it; a training that may not fit starts all the same, since this is an estimate."""
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        trained = [one for one in pl_module.parameters() if one.requires_grad]
        if not isinstance(sampler, PlanSampler) or not is_watched(pl_module):
            return
        if not pl_module.objective.scores:
            return
        tokens = sampler.plan.largest(trainer.world_size, int(trainer.accumulate_grad_batches))
        found = estimate(
            pl_module.policy,
            trained,
            trainer.optimizers,
            tokens,
            pl_module.objective.wants_logits,
            half="16" in str(trainer.precision),
            copies=2 if trainer.world_size > 1 and isinstance(trainer.strategy, DDPStrategy) else 1,
        )
        free = available(pl_module.device)
        if found is None:
            return
        rank_zero_info(f"memory: {found}")
        if free is not None and (advice := found.advice(free)):
            log.warning("memory: %s", advice)
