# SPDX-License-Identifier: Apache-2.0
"""How ``fit`` trains the stages that come before the one an objective asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StageFit:
    """Training of the earlier stages of the objective e2e, on the recipe's own data.

    Args:
        losses: losses that train the tokenizer in stage 1: any of reward, flow and policy; the models of the others
            begin in stage 2.
        epochs: passes over the rows in stage 1.
        learning_rate: learning rate of stage 1; that of ``model.optimizer`` by default.
        second_epochs: passes over the rows in stage 2.
        second_learning_rate: learning rate of stage 2; that of ``model.optimizer`` by default.
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
