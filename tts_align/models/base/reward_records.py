# SPDX-License-Identifier: Apache-2.0
"""What a reward model is told and what it answers, and how its own training is regularised.

Axis letters beside those of :mod:`tts_align.batch`: ``c`` speech tokens, ``k`` text ids, ``e`` classes or events of an
attribute, ``h`` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tts_align.batch import Record


@dataclass(frozen=True)
class AttributeLabels(Record):
    """One attribute of each row.

    Args:
        name: of the attribute.
        target: class; whether each event is there; score of 1 to 5; or number. Anything where ``mask`` is ``False``.
        mask: which rows have this label.
    """

    name: str
    target: Int[Tensor, " r"] | Float[Tensor, " r"] | Bool[Tensor, "r e"]
    mask: Bool[Tensor, " r"]


@runtime_checkable
class AttributeTask(Protocol):
    """A property of utterances that a reward model predicts, such as an ``Attribute`` of ``RewardModel``."""

    @property
    def name(self) -> str:
        """Name of its column and its scores."""

    @property
    def kind(self) -> str:
        """``classes``, ``events``, ``mos`` or ``regression``."""

    def encode(self, values: Sequence[Any]) -> AttributeLabels:
        """Labels of rows; ``None`` where a row has none."""


@dataclass(frozen=True)
class RewardLabels(Record):
    """What is known about rows; any of it may be missing for any row.

    Args:
        text: ids of the transcript, without an end.
        text_mask: which of them are real.
        has_text: which rows have a transcript; it may be empty.
        attributes: labels of the utterance-level tasks.
        text_lengths: how long each transcript is, for what must know without waiting for a device; may be missing.
        speech_lengths: how many speech tokens each row has, likewise.
    """

    text: Int[Tensor, "r n"]
    text_mask: Bool[Tensor, "r n"]
    has_text: Bool[Tensor, " r"]
    attributes: tuple[AttributeLabels, ...] = ()
    text_lengths: tuple[int, ...] = ()
    speech_lengths: tuple[int, ...] = ()

    def attribute(self, name: str) -> AttributeLabels | None:
        """Labels of an attribute; ``None`` when no row was asked for it."""
        return next((labels for labels in self.attributes if labels.name == name), None)

    def take(self, index: Int[Tensor, " q"]) -> RewardLabels:
        """The labels of these rows."""
        attributes = tuple(
            AttributeLabels(labels.name, labels.target[index], labels.mask[index]) for labels in self.attributes
        )
        return RewardLabels(self.text[index], self.text_mask[index], self.has_text[index], attributes)


@dataclass(frozen=True)
class TaskRows(Record):
    """One number per row for one task, kept as a sum and what it runs over.

    Args:
        name: of the task.
        total: sum over text tokens, over events, or the one number of the row; 0 where the row has no label.
        count: how many numbers are in the sum; 0 where the row has no label.
    """

    name: str
    total: Float[Tensor, " r"]
    count: Float[Tensor, " r"]

    @property
    def mean(self) -> Float[Tensor, " r"]:
        """Total over count, 0 where nothing was counted."""
        return self.total / self.count.clamp(min=1)


@dataclass(frozen=True)
class RewardScores(Record):
    """log P(label | speech tokens) of each task and row.

    Args:
        tasks: text with end-of-text (``asr``), text summed over alignments (``ctc``), and the attributes.
    """

    tasks: tuple[TaskRows, ...]

    def __getitem__(self, name: str) -> TaskRows:
        """One task."""
        for rows in self.tasks:
            if rows.name == name:
                return rows
        raise KeyError(f"no task {name!r} was scored: expected one of {', '.join(rows.name for rows in self.tasks)}")

    def reward(self, mean: bool = True) -> Float[Tensor, " r"]:
        """R of each row: the unweighted sum over the tasks.

        Args:
            mean: take the mean over text tokens and events instead of their sum.
        """
        return torch.stack([rows.mean if mean else rows.total for rows in self.tasks]).sum(0)


@dataclass(frozen=True)
class TaskLoss(Record):
    """Loss of one task over a micro-batch.

    Args:
        total: sum over everything that has a label, with gradient.
        count: how much that is; divide by the count of the whole optimiser step.
    """

    total: Float[Tensor, ""]
    count: Float[Tensor, ""]


@dataclass(frozen=True)
class Regularisers:
    """What keeps a reward model from being easy to fool, in its own training (RRPO); all off by default.

    Args:
        label_smoothing: share of the target's probability that is spread over all classes; RRPO: 0.1. Not for CTC and
            regression.
        mixup: alpha of the Beta(alpha, alpha) distribution from which the share of each of two mixed utterances is
            drawn.
        adversarial: weight of the loss on the encoder's output moved against the model; RRPO: 0.5.
        radius: how far it is moved, each row by this norm along the gradient of its loss.
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0
    adversarial: float = 0.0
    radius: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what cannot work, or would have no effect."""
        faults = []
        if not 0 <= self.label_smoothing < 1:
            faults.append(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.mixup < 0 or self.adversarial < 0:
            faults.append(f"mixup and adversarial must not be negative, got {self.mixup} and {self.adversarial}")
        if not self.radius > 0:
            faults.append(f"radius must be above 0, got {self.radius}; adversarial: 0 turns it off")
        if self.radius != 0.5 and not self.adversarial:
            faults.append("radius has no effect without adversarial")
        if faults:
            raise ValueError("; ".join(faults))
