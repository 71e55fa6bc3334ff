# SPDX-License-Identifier: Apache-2.0
"""Losses of the reward model's own training, with RRPO's regularisers: label smoothing, mixup, adversarial steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tts_align.models.base.reward_records import Regularisers, RewardLabels, TaskLoss, TaskRows


@runtime_checkable
class Trainable(Protocol):
    """What of a reward model its losses use."""

    tasks: tuple[str, ...]

    def encode(self, embedded: Float[Tensor, "r s h"], mask: Bool[Tensor, "r s"]) -> Float[Tensor, "r s h"]:
        """Hidden states of embedded speech."""

    def task_rows(
        self, hidden: Tensor, mask: Tensor, labels: RewardLabels, task: str, smoothing: float = 0.0
    ) -> TaskRows | None:
        """Log-probability of one task's labels, for each row; ``None`` if no row has one."""


@dataclass(frozen=True)
class Mixture:
    """Which utterance each row is mixed with.

    Args:
        partner: a permutation of the rows.
        share: of the row itself, one for the micro-batch, so that the counts of labels do not depend on it.
    """

    partner: Int[Tensor, " r"]
    share: float


def draw_mixture(rows: int, alpha: float, generator: torch.Generator) -> Mixture:
    """A random permutation and a share from Beta(alpha, alpha)."""
    partner = torch.randperm(rows, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    return Mixture(partner, float(np.random.default_rng(seed).beta(alpha, alpha)))


def mix(
    embedded: Float[Tensor, "r s h"], mask: Bool[Tensor, "r s"], mixture: Mixture
) -> tuple[Float[Tensor, "r s h"], Bool[Tensor, "r s"]]:
    """Mixed vectors, as long as the longer of the two; where one has ended it adds nothing."""
    clean = torch.where(mask[..., None], embedded, 0.0)
    mixed = mixture.share * clean + (1 - mixture.share) * clean[mixture.partner]
    return mixed, mask | mask[mixture.partner]


def adversarial_step(
    objective: Float[Tensor, ""], hidden: Float[Tensor, "r s h"], radius: float
) -> Float[Tensor, "r s h"]:
    """The step of norm ``radius`` in each row that raises the objective most, to first order; 0 without a gradient."""
    (gradient,) = torch.autograd.grad(objective, hidden, retain_graph=True)
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    norm = torch.linalg.vector_norm(gradient, dim=(1, 2), keepdim=True)
    unit = torch.where(norm > 0, gradient / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)
    return (radius * unit).to(hidden.dtype)


def regularised_losses(
    model: Trainable,
    embedded: Float[Tensor, "r s h"],
    mask: Bool[Tensor, "r s"],
    labels: RewardLabels,
    regularisers: Regularisers,
    generator: torch.Generator | None,
) -> dict[str, TaskLoss]:
    """Loss of every task that the labels speak of; see :meth:`RewardModel.losses`."""
    mixture = None
    if regularisers.mixup:
        if generator is None:
            raise ValueError("mixup draws partners and shares: give `generator`")
        drawn = draw_mixture(len(mask), regularisers.mixup, generator)
        mixture = Mixture(drawn.partner.to(mask.device), drawn.share)
        embedded, mask = mix(embedded, mask, mixture)
    hidden = model.encode(embedded, mask)
    clean = _rows(model, hidden, mask, labels, regularisers.label_smoothing, mixture)
    totals = {rows.name: rows.total.sum() for rows in clean}
    if regularisers.adversarial:
        if not hidden.requires_grad:
            raise ValueError("the adversarial step needs gradients: it is for training only")
        objective = torch.stack([rows.mean.sum() for rows in clean]).sum()
        step = adversarial_step(objective, hidden, regularisers.radius)
        moved = _rows(model, hidden + step, mask, labels, regularisers.label_smoothing, mixture)
        totals = {rows.name: totals[rows.name] + regularisers.adversarial * rows.total.sum() for rows in moved}
    return {rows.name: TaskLoss(totals[rows.name], rows.count.sum()) for rows in clean}


def _rows(
    model: Trainable,
    hidden: Tensor,
    mask: Tensor,
    labels: RewardLabels,
    smoothing: float,
    mixture: Mixture | None,
) -> list[TaskRows]:
    """Loss of each task and row, under the row's own labels and, in a mixture, under its partner's."""
    own = list(_negated(model, hidden, mask, labels, smoothing))
    if mixture is None:
        return own
    other = _negated(model, hidden, mask, labels.take(mixture.partner), smoothing)
    return [_weighted(one, two, mixture.share) for one, two in zip(own, other, strict=True)]


def _negated(
    model: Trainable, hidden: Tensor, mask: Tensor, labels: RewardLabels, smoothing: float
) -> Iterable[TaskRows]:
    for task in model.tasks:
        rows = model.task_rows(hidden, mask, labels, task, smoothing)
        if rows is not None:
            yield TaskRows(task, -rows.total, rows.count)


def _weighted(one: TaskRows, two: TaskRows, share: float) -> TaskRows:
    return TaskRows(one.name, share * one.total + (1 - share) * two.total, share * one.count + (1 - share) * two.count)
