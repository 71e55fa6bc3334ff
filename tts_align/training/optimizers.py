# SPDX-License-Identifier: Apache-2.0
"""One optimiser for several models: a learning rate, a warm-up and a clip for each, and models that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer

from tts_align.objectives.base import Objective
from tts_align.training.gradients import fused
from tts_align.training.sharding import ShardedModule
from tts_align.utils.sharded import is_sharded

REST = "the rest"


@dataclass(frozen=True)
class PartOptimizer:
    """What is particular about the training of one part: policy, tokenizer, reward, flow, or objective (bridges).

    Args:
        lr: learning rate; that of ``model.optimizer`` by default.
        clip: largest norm of the part's own gradient, which is then left out of ``trainer.gradient_clip_val``.
        warm_up_steps: optimiser steps over which its learning rate rises linearly from the step on in which it starts
            to train.
    """

    lr: float | None = None
    clip: float | None = None
    warm_up_steps: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if (self.lr is not None and self.lr <= 0) or (self.clip is not None and self.clip <= 0):
            raise ValueError(f"model.optimizer_groups: lr and clip must be above 0, got {self.lr} and {self.clip}")
        if self.warm_up_steps < 0:
            raise ValueError(f"model.optimizer_groups: warm_up_steps must not be negative, got {self.warm_up_steps}")


class GroupedModule(ShardedModule):
    """The hooks of a module whose parts are optimised each in its own way."""

    objective: Objective
    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable | None
    optimizer_groups: Mapping[str, PartOptimizer]

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by part; a part with settings of its own is a group, all others are one."""
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in (*self.optimizer_groups, REST)}
        for name, value in self.named_parameters():
            if value.requires_grad:
                part = part_of(name)
                groups[part if part in groups else REST].append(value)
        return {name: values for name, values in groups.items() if values}

    def configure_optimizers(self) -> Any:
        """Build the optimizer from the trainable parameters only."""
        if not self.optimizer_groups:
            optimizer = self._built([value for value in self.parameters() if value.requires_grad])
        else:
            optimizer = self._built(list(self._groups()))
            self._warm_up(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _built(self, weights: list[Any]) -> Optimizer:
        """The recipe's optimiser of these weights.

        Raises:
            ValueError: it refuses its settings, or weights of their shape.
        """
        try:
            return fused(self.optimizer(weights))
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            raise ValueError(f"model.optimizer refuses its settings or these weights: {_in_a_line(error)}") from error

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Make a step; what the optimiser itself cannot do is the recipe's fault, what fails before it is not.

        Raises:
            ValueError: the optimiser cannot update these weights with its settings.
        """
        computing = False

        def closure() -> Any:
            nonlocal computing
            computing = True
            result = None if optimizer_closure is None else optimizer_closure()
            computing = False
            return result

        try:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if computing or "out of memory" in str(error).lower():
                raise
            kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
            raise ValueError(
                f"model.optimizer {kind} cannot make a step: {_in_a_line(error)}; check its init_args, or take AdamW"
            ) from error

    def on_train_start(self) -> None:
        """A resumed optimiser computes as this process would; see :func:`unfused`."""
        for optimizer in self.trainer.optimizers:
            fused(optimizer)

    def _groups(self) -> Iterator[dict[str, Any]]:
        for name, values in self.trained().items():
            own = self.optimizer_groups.get(name)
            rate = {} if own is None or own.lr is None else {"lr": own.lr}
            yield {"params": values, "part": name, **rate}

    def _warm_up(self, optimizer: Optimizer) -> None:
        """Let each step use a share of the group's rate; between steps it is what the schedule says."""
        if not any(one.warm_up_steps for one in self.optimizer_groups.values()):
            return
        kept: list[float] = []

        def lower(_: Optimizer, __: Any, ___: Any) -> None:
            kept[:] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                own = self.optimizer_groups.get(group["part"])
                if own is not None and own.warm_up_steps:
                    done = self.trainer.global_step - self.objective.unfreeze_after.get(group["part"], 0)
                    group["lr"] *= min(1.0, max(done + 1, 0) / own.warm_up_steps)

        def restore(_: Optimizer, __: Any, ___: Any) -> None:
            for group, rate in zip(optimizer.param_groups, kept, strict=True):
                group["lr"] = rate

        optimizer.register_step_pre_hook(lower)
        optimizer.register_step_post_hook(restore)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average gradients as a sharded strategy needs it; drop those of parts that wait."""
        super().on_before_optimizer_step(optimizer)
        step = self.trainer.global_step
        waiting = {name for name, first in self.objective.unfreeze_after.items() if step < first}
        if waiting:
            for name, value in self.named_parameters():
                if part_of(name) in waiting:
                    value.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip parts with a limit of their own by that, and the others together."""
        own = {name: one.clip for name, one in self.optimizer_groups.items() if one.clip is not None}
        if not own:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        if is_sharded(self.policy):
            raise ValueError("model.optimizer_groups: clip is for models that are whole in every process; leave it out")
        groups = self.trained()
        for name, limit in own.items():
            nn.utils.clip_grad_norm_(groups.get(name, []), limit)
        rest = [value for name, values in groups.items() if name not in own for value in values]
        if gradient_clip_val and rest:
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(rest, gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(rest, gradient_clip_val)


def unfused(checkpoint: Mapping[str, Any]) -> None:
    """Leave out of a checkpoint how its process computed: another one may have sharded weights, or other devices."""
    for state in checkpoint.get("optimizer_states", ()):
        for group in state["param_groups"]:
            if group.get("fused"):
                group["fused"] = None


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def part_of(name: str) -> str:
    """Part that a parameter belongs to.

    >>> [part_of(name) for name in ("policy.norm.weight", "parts.flow.table.weight", "objective.bridges.flow.weight")]
    ['policy', 'flow', 'objective']
    """
    first, second, *_ = name.split(".")
    return second if first == "parts" else first
