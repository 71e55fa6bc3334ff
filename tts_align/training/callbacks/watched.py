# SPDX-License-Identifier: Apache-2.0
"""What callbacks look at in the module that trains."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

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
