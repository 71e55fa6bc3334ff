# SPDX-License-Identifier: Apache-2.0
"""How ``fit`` trains what an objective needs before it: a reward model, or earlier stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RewardFit:
    """Training of a new reward model, by the objective mtr on the recipe's own data; unused for a trained one.

    Args:
        manifest: training rows of the reward model; those of ``data.manifest`` by default.
        epochs: passes over its training rows.
        learning_rate: its learning rate; that of ``model.optimizer`` by default.
        decay_steps: optimiser steps over which its learning rate falls linearly to a twentieth; constant by default.
        rows_per_step: rows in one of its optimiser steps; those of ``data`` by default.
        label_smoothing: share of a target's probability that is spread over all classes, see the objective mtr.
        mixup: alpha of the Beta distribution that mixes utterances two by two, see the objective mtr; 0 for no mixing.
        adversarial: weight of the adversarial loss, see the objective mtr; 0 for none.
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
        losses: losses that train the tokenizer in stage 1: any of reward, flow and policy; the models of the others
            begin in stage 2.
        epochs: passes over the rows in stage 1.
        learning_rate: learning rate of stage 1; that of ``model.optimizer`` by default.
        unfreeze_after: optimiser steps of stage 1 for which a part waits before it trains, by name, see the objective.
        second_epochs: passes over the rows in stage 2.
        second_learning_rate: learning rate of stage 2; that of ``model.optimizer`` by default.
        second_decay_steps: optimiser steps over which the learning rate of stage 2 falls linearly to a twentieth;
            constant by default. In stage 1 it is constant.
    """

    losses: tuple[Literal["reward", "flow", "policy"], ...] = ("reward", "flow", "policy")
    epochs: int = 10
    learning_rate: float | None = None
    unfreeze_after: Mapping[str, int] = field(default_factory=dict)
    second_epochs: int = 5
    second_learning_rate: float | None = None
    second_decay_steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if min(self.epochs, self.second_epochs) < 1:
            raise ValueError(
                "model.stage_fit: epochs and second_epochs must be at least 1, got "
                f"{self.epochs} and {self.second_epochs}"
            )
        if self.second_decay_steps is not None and self.second_decay_steps < 1:
            raise ValueError(f"model.stage_fit.second_decay_steps must be at least 1, got {self.second_decay_steps}")
