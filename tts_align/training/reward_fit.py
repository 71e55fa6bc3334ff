# SPDX-License-Identifier: Apache-2.0
"""How ``fit`` trains a new reward model before the objective that needs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardFit:
    """Training of a new reward model, by the objective mtr on the recipe's own data; unused for a trained one.

    Args:
        manifest: its training rows; those of ``data.manifest`` by default.
        epochs: of it.
        learning_rate: of it; that of ``model.optimizer`` by default.
        decay_steps: optimiser steps over which its learning rate falls linearly to a twentieth; by default it stays.
        rows_per_step: of it; that of the data by default.
        label_smoothing: see the objective mtr.
        mixup: see the objective mtr.
        adversarial: see the objective mtr.
    """

    manifest: str | None = None
    epochs: int = 10
    learning_rate: float | None = None
    decay_steps: int | None = None
    rows_per_step: int | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    adversarial: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.epochs < 1:
            raise ValueError(f"model.reward_fit.epochs must be at least 1, got {self.epochs}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"model.reward_fit.decay_steps must be at least 1, got {self.decay_steps}")
