# SPDX-License-Identifier: Apache-2.0
"""A reward model: scores speech tokens, hard or soft."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tts_align.models.base.precision import Float32Buffers
from tts_align.models.base.reward_records import AttributeTask, Regularisers, RewardLabels, RewardScores, TaskLoss


class RewardHead(Float32Buffers, ABC):
    """Scores speech tokens, hard or soft, so that gradients reach the soft ones."""

    codebook_size: int
    """Speech tokens c it reads."""
    tasks: tuple[str, ...]
    """Names of what it scores: ``asr``, ``ctc`` and attributes of utterances."""
    directory: Path | None = None
    """The directory it was built from; a model without one is trained before it is used."""
    attribute_tasks: tuple[AttributeTask, ...] = ()
    """The attributes among :attr:`tasks`, for its test; a model without any leaves it empty."""

    looks_up: bool = False
    """Whether :meth:`embed` gives rows of :attr:`table` and nothing else; then one-hots need never be formed."""

    @property
    def table(self) -> nn.Embedding:
        """Vectors of all speech tokens: a row for each, special tokens behind them."""
        raise NotImplementedError(f"{type(self).__name__} does not say where the vectors of its speech tokens are")

    @abstractmethod
    def encode_labels(
        self, texts: Sequence[str | None], attributes: Sequence[Mapping[str, str | int | float | Sequence[str]]]
    ) -> RewardLabels:
        """Labels of rows, on the CPU.

        Args:
            texts: transcripts; ``None`` where there is none.
            attributes: known properties of each row by name; those of which the model knows nothing are left out.
        """

    @abstractmethod
    def embed(self, tokens: Int[Tensor, "*r"] | Float[Tensor, "*r c"]) -> Float[Tensor, "*r h"]:
        """Vectors of speech tokens (..., h), given as ids (...) or soft one-hots (..., c); equal for equal tokens."""

    @abstractmethod
    def score_embedded(
        self,
        embedded: Float[Tensor, "r s h"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        tasks: Sequence[str] | None = None,
    ) -> RewardScores:
        """As :meth:`score`, of vectors made with :meth:`embed`: a flat (m, c) need never be padded."""

    def score(
        self,
        tokens: Int[Tensor, "r s"] | Float[Tensor, "r s c"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        tasks: Sequence[str] | None = None,
    ) -> RewardScores:
        """Log-probability of the labels of each row given its speech; the model must be in evaluation mode.

        Args:
            tokens: speech tokens, as ids or soft one-hots; gradients reach the latter.
            mask: which are real; padding on the right.
            labels: what is wanted, or known.
            tasks: which to score; all that have a log-probability by default.
        """
        return self.score_embedded(self.embed(tokens), mask, labels, tasks)

    @abstractmethod
    def losses(
        self,
        tokens: Int[Tensor, "r s"] | Float[Tensor, "r s c"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        regularisers: Regularisers | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, TaskLoss]:
        """Loss of every task for the model's own training, as sums and counts."""

    @abstractmethod
    def losses_embedded(
        self,
        embedded: Float[Tensor, "r s h"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        regularisers: Regularisers | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, TaskLoss]:
        """As :meth:`losses`, of vectors in the place of those that :meth:`embed` makes."""

    def transcribe(self, tokens: Int[Tensor, "r s"], mask: Bool[Tensor, "r s"], max_length: int = 200) -> list[str]:
        """Greedy transcripts; a model with the task ``asr`` or ``ctc`` that is trained on its own must give them.

        Args:
            tokens: speech tokens.
            mask: which are real.
            max_length: largest number of characters; a longer transcript is cut.
        """
        raise NotImplementedError(f"{type(self).__name__} does not transcribe: its test needs a method `transcribe`")

    def predict(self, tokens: Int[Tensor, "r s"], mask: Bool[Tensor, "r s"]) -> dict[str, list[Any]]:
        """What it says of each row, by name of the attribute, in the form of :meth:`Attribute.predict`."""
        raise NotImplementedError(f"{type(self).__name__} does not predict: its test needs a method `predict`")

    @abstractmethod
    def rebuild(self) -> RewardHead:
        """The model as its directory holds it."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write a directory from which the model can be built; atomically."""

    @abstractmethod
    def digest(self) -> str:
        """Digest of all weights as they are now."""
