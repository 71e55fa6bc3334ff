# SPDX-License-Identifier: Apache-2.0
"""Exponential moving averages of weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An average of a model's weights that forgets by ``decay`` per update, and faster in its first updates.

    So it does not remember the weights of the start for as long as a whole short training: update n (from 0) keeps
    min(decay, (1 + n) / (10 + n)) of what was there.

    Args:
        model: whose weights are averaged; call ``update_parameters(model)`` behind each step.
        decay: share that is kept per update, in [0, 1).

    Raises:
        ValueError: the decay is no such share.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay}")

    def average(kept: Tensor, new: Tensor, updates: Tensor | int) -> Tensor:
        share = min(decay, (1 + int(updates)) / (10 + int(updates)))
        return kept + (new - kept) * (1 - share)

    return AveragedModel(model, avg_fn=average)
