# SPDX-License-Identifier: Apache-2.0
"""Whether a training changes the policy at all: what its steps can do, and what they have done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tts_align.models.base.layout import TokenRow, collate
from tts_align.training.callbacks.guards import HackingGuard
from tts_align.training.callbacks.watched import Watched
from tts_align.utils.messages import say

log = logging.getLogger(__name__)


class Movement(Callback):
    """Says before the training what its steps can move, and warns after it when they moved nothing.

    Before: the number of optimiser steps and the learning rate. AdamW moves a weight by about its learning rate per
    step whatever the gradient is, so few steps at a small one change nothing, and look like success. After: the mean
    change of the policy's log-probabilities of a few training rows, per token, since the start.

    Args:
        rows: training rows that are scored, spread evenly.
        noise_nats: change of the log-probability per token, in nats, up to which the policy counts as unchanged.
    """

    def __init__(self, rows: int = 16, noise_nats: float = 0.01) -> None:
        super().__init__()
        if rows < 1 or noise_nats < 0:
            raise ValueError(f"rows must be at least 1 and noise_nats not negative, got {rows} and {noise_nats}")
        self.rows, self.noise_nats = rows, noise_nats
        self.before: dict[str, list[float]] = {}
        self.moved: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the steps can move, and score the rows."""
        module = cast("Watched", pl_module)
        if not _speaks(module) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        say(_budget(trainer))
        if not self.before:
            chosen = trainer.datamodule.rows("train").spread(self.rows)  # type: ignore[attr-defined]
            self.before = self._scores(trainer, module, chosen)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score them again, and warn."""
        module = cast("Watched", pl_module)
        if not self.before or not _speaks(module):
            return
        rows = trainer.datamodule.rows("train")  # type: ignore[attr-defined]
        after = self._scores(trainer, module, {key: rows[key] for key in self.before})
        changes = [
            abs(new - old) for key, scores in after.items() for new, old in zip(scores, self.before[key], strict=True)
        ]
        self.moved = sum(changes) / max(len(changes), 1)
        for logger in trainer.loggers:
            logger.log_metrics({"train/moved_nats": self.moved}, step=trainer.global_step)
        trainer.callback_metrics["train/moved_nats"] = torch.tensor(self.moved)
        restored = any(isinstance(one, HackingGuard) and one.stopped for one in trainer.callbacks)  # type: ignore[attr-defined]
        if self.moved <= self.noise_nats and not restored:
            log.warning(
                "the policy has hardly changed: its log-probabilities of training rows moved by %.2g nats per token "
                "(up to %g is noise). %s: train longer (trainer.max_epochs), or raise the learning rate "
                "(model.optimizer)",
                *(self.moved, self.noise_nats, _budget(trainer)),
            )

    @torch.no_grad()
    def _scores(self, trainer: Trainer, module: Watched, rows: Mapping[str, TokenRow]) -> dict[str, list[float]]:
        """Log-probabilities of each row's targets, by key; the same rows on every rank."""
        policy, training = module.policy, module.policy.training
        policy.eval()
        batch = collate(list(rows.values()), policy.layout).to(trainer.strategy.root_device)
        with trainer.precision_plugin.forward_context():
            scored = policy(batch)
        policy.train(training)
        values, lengths = scored.logp.float().cpu(), batch.mask.sum(-1).tolist()
        return {key: values[i, :length].tolist() for i, (key, length) in enumerate(zip(rows, lengths, strict=True))}

    def state_dict(self) -> dict[str, Any]:
        """The scores at the start, so that a resumed run compares with the same."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.before = dict(state_dict["before"])


def _speaks(module: Watched) -> bool:
    """Whether the policy trains on rows whose speech tokens are known."""
    return module.objective.scores and module.trained_tokenizer is None


def _budget(trainer: Trainer) -> str:
    """Number of steps, learning rate, and what both can do."""
    steps = trainer.estimated_stepping_batches
    kind = type(trainer.optimizers[0]).__name__
    rate = max(group.get("initial_lr", group["lr"]) for group in trainer.optimizers[0].param_groups)
    said = f"{steps:g} optimiser steps of {kind} at learning rate {float(rate):.3g}"
    if "adam" not in kind.lower() or steps == float("inf"):
        return said
    return f"{said}: they move a weight by about {steps * float(rate):.2g} at most"
