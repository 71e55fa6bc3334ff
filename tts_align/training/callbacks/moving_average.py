# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the weights, which a training ends with.

Lightning's ``EMAWeightAveraging`` averages the whole module and writes checkpoints of a layout of its own; here one
names the parts, and frozen ones stay out of the checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from tts_align.training.callbacks.watched import Watched, models_of, planned_end
from tts_align.utils.sharded import is_share, share_of, whole_tensor

log = logging.getLogger(__name__)
WARM_UP = 10
"""Of the share that stays at first, (1 + t) / (10 + t): the first weights must not stay in a short training's mean."""


class MovingAverage(Callback):
    """Averages the trained weights over the last steps and gives them to the model after the last one.

    After step t the average keeps a share of min(decay, (1 + t) / (10 + t)) and takes the rest from the weights; at
    0.99 it reaches back over about a hundred steps. Put it before callbacks that listen at the end (``KeepBase``). A
    training that is stopped early keeps the weights of its last step.

    Args:
        decay: share of the average that stays at each step, at least 0 and less than 1.
        parts: models whose weights are averaged: policy, tokenizer, reward, flow.
    """

    def __init__(self, decay: float = 0.99, parts: Sequence[str] = ("policy",)) -> None:
        super().__init__()
        if not 0 <= decay < 1 or not math.isfinite(decay):
            raise ValueError(f"MovingAverage: decay must be at least 0 and less than 1, got {decay}")
        if not parts:
            raise ValueError("MovingAverage: parts must name a model, such as [policy]")
        self.decay, self.parts = decay, tuple(parts)
        self.average: dict[str, Tensor] = {}
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as they are, or with the average of the checkpoint.

        Raises:
            ValueError: a part is not there.
        """
        module = cast("Watched", pl_module)
        missing = [name for name in self.parts if name not in models_of(module)]
        if missing:
            raise ValueError(
                f"MovingAverage: there is no part {missing[0]} to average; there are {', '.join(models_of(module))}"
            )
        weights = dict(self._weights(module))
        if not weights:  # such as the policy in a stage that trains the tokenizer by the reward model alone
            log.warning("MovingAverage: nothing of %s is trained here, so it averages nothing", ", ".join(self.parts))
        begun = self.average.keys() == weights.keys()
        source = self.average if begun else weights
        self.average = {
            # Of sharded weights each process averages its share.
            name: share_of(source[name].detach().to(one.device, torch.float32, copy=True), one)
            for name, one in weights.items()
        }
        self.step = self.step if begun else trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take the step's weights into the average; after the last step, the model takes the average."""
        module = cast("Watched", pl_module)
        if trainer.global_step == self.step:  # gradients are still accumulated
            return
        self.step = trainer.global_step
        weights = {name: local(one) for name, one in self._weights(module)}
        moved({name: local(one) for name, one in self.average.items()}, weights, kept_share(self.decay, self.step))
        if planned_end(trainer):
            with torch.no_grad():
                for name, one in self._weights(module):
                    local(one).copy_(local(self.average[name]))

    def _weights(self, module: Watched) -> Iterator[tuple[str, nn.Parameter]]:
        for part in self.parts:
            for name, one in models_of(module)[part].named_parameters():
                if one.requires_grad:
                    yield f"{part}.{name}", one

    def state_dict(self) -> dict[str, Any]:
        """The average, and the step it has reached; all processes must ask."""
        return {"average": {name: whole_tensor(one) for name, one in self.average.items()}, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with it."""
        self.average, self.step = dict(state_dict["average"]), state_dict["step"]


def local(value: Tensor) -> Tensor:
    """This process's share of a tensor that is spread over processes, and any other as it is; the same memory."""
    return cast("Any", value).to_local() if is_share(value) else value


def kept_share(decay: float, step: int) -> float:
    """Share of the average that stays after a step, counted from 1."""
    return min(decay, (1 + step) / (WARM_UP + step))


@torch.no_grad()
def moved(average: dict[str, Tensor], weights: dict[str, Any], kept: float) -> dict[str, Tensor]:
    """``kept * average + (1 - kept) * weights``, tensor by tensor, of any shape; the average is changed in place."""
    for name, one in average.items():
        one.lerp_(weights[name].detach().float(), 1 - kept)
    return average
