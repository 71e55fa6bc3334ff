# SPDX-License-Identifier: Apache-2.0
"""How ``fit`` trains what an objective needs before it: a reward model, or earlier stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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


@dataclass(frozen=True)
class StageFit:
    """Training of the earlier stages of the objective e2e, on the recipe's own data.

    Args:
        losses: what stage 1 trains the tokenizer with: any of reward, flow and policy; what is left out begins in
            stage 2.
        epochs: of stage 1.
        learning_rate: of stage 1; that of ``model.optimizer`` by default.
        second_epochs: of stage 2.
        second_learning_rate: of stage 2, likewise.
    """

    losses: tuple[Literal["reward", "flow", "policy"], ...] = ("reward", "flow", "policy")
    epochs: int = 10
    learning_rate: float | None = None
    second_epochs: int = 5
    second_learning_rate: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if min(self.epochs, self.second_epochs) < 1:
            raise ValueError(
                "model.stage_fit: epochs and second_epochs must be at least 1, got "
                f"{self.epochs} and {self.second_epochs}"
            )
