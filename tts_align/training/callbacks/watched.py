# SPDX-License-Identifier: Apache-2.0
"""What callbacks look at in the module that trains."""

from __future__ import annotations

from typing import Protocol, TypeGuard, runtime_checkable

import torch
from lightning.pytorch import Trainer
from torch import nn

from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.models.base.tokenizer import TokenizerHead
from tts_align.objectives.base import Objective, Parts


@runtime_checkable
class Watched(SpeaksAndListens, Protocol):
    """An ``AlignModule`` as guards and other callbacks see it."""

    objective: Objective
    parts: Parts

    @property
    def device(self) -> torch.device:
        """Where it trains."""

    @property
    def trained_tokenizer(self) -> TokenizerHead | None:
        """The tokenizer whose speech tokens the rows are made of, if it is part of the training."""

    def log_when_due(self) -> bool:
        """Log the means of training if it is time; tells whether it was."""


def is_watched(module: object) -> TypeGuard[Watched]:
    """Whether a module is an ``AlignModule``, or works like one.

    ``isinstance`` has not seen the parts of a module, such as ``policy``, since Python 3.12.
    """
    return all(hasattr(module, name) for name in ("policy", "objective", "parts", "log_when_due"))


def models_of(module: Watched) -> dict[str, nn.Module]:
    """The policy and the other models that train beside it, by the names that recipes give them."""
    return {"policy": module.policy, **module.parts}


def planned_end(trainer: Trainer) -> bool:
    """Whether the step that has just been taken is the last one of ``trainer.max_epochs`` or ``trainer.max_steps``."""
    over = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return over or trainer.global_step == trainer.max_steps
