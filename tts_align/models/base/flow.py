# SPDX-License-Identifier: Apache-2.0
"""A flow-matching model: turns speech tokens into mel frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tts_align.models.base.flow_records import FlowDraws, FlowLoss, FlowPrompt, FlowRates, MelFrames
from tts_align.models.base.precision import Float32Buffers


class FlowHead(Float32Buffers, ABC):
    """Turns speech tokens, hard or soft, into mel frames by flow matching."""

    codebook_size: int
    """Size of the codebook."""
    mel_channels: int
    """Of the frames."""
    frames_per_token: int
    """Mel frames that a token lasts."""

    speaker_channels: int
    """Of the speaker vectors."""
    looks_up: bool = False
    """Whether :meth:`embed` gives rows of :attr:`table` and nothing else; then one-hots need never be formed."""

    @property
    def table(self) -> nn.Embedding:
        """Vectors of all speech tokens: a row for each, special tokens behind them."""
        raise NotImplementedError(f"{type(self).__name__} does not say where the vectors of its speech tokens are")

    @abstractmethod
    def embed(self, tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"]) -> Float[Tensor, "b s e"]:
        """Vectors of speech tokens, or mixed of those of all speech tokens."""

    @abstractmethod
    def loss(
        self,
        tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"],
        token_mask: Bool[Tensor, "b s"],
        mel: Float[Tensor, "b f m"],
        mel_mask: Bool[Tensor, "b f"],
        speaker: Float[Tensor, "b d"],
        draws: FlowDraws,
    ) -> FlowLoss:
        """Squared error of the velocity at random times.

        Args:
            tokens: ids or mixtures of all speech tokens; gradients reach the latter.
            token_mask: which are real; padding on the right.
            mel: the same utterances as mel; what has no counterpart among the tokens is left out, and conversely.
            mel_mask: which of its frames are real.
            speaker: vectors of the speakers.
            draws: everything random.
        """

    @abstractmethod
    def loss_embedded(
        self,
        vectors: Float[Tensor, "b s e"],
        token_mask: Bool[Tensor, "b s"],
        mel: Float[Tensor, "b f m"],
        mel_mask: Bool[Tensor, "b f"],
        speaker: Float[Tensor, "b d"],
        draws: FlowDraws,
    ) -> FlowLoss:
        """As :meth:`loss`, of vectors in the place of those that :meth:`embed` makes."""

    def draw(
        self, frames: Sequence[int], generators: Sequence[torch.Generator], rates: FlowRates | None, streaming: bool
    ) -> FlowDraws:
        """What is random in one training step; each utterance's share comes from its own generator.

        Args:
            frames: of each utterance.
            generators: one for each.
            rates: how often what happens.
            streaming: whether the batch is trained for streaming.
        """
        return FlowDraws.draw(frames, self.mel_channels, generators, rates, streaming)

    @abstractmethod
    def sample(
        self,
        tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"],
        token_mask: Bool[Tensor, "b s"],
        speaker: Float[Tensor, "b d"],
        prompt: FlowPrompt | None = None,
    ) -> MelFrames:
        """Mel of utterances; what one becomes does not depend on the others. The model should be in evaluation mode.

        Args:
            tokens: ids or mixtures.
            token_mask: which are real; padding on the right.
            speaker: vectors of the speakers.
            prompt: recordings to continue; their frames are not returned.
        """
