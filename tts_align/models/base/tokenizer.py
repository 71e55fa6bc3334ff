# SPDX-License-Identifier: Apache-2.0
"""A speech tokenizer: turns sound into speech tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tts_align.models.base.device import OwnsItsDevice


@dataclass(frozen=True)
class Tokenised:
    """What the tokenizer makes of a batch.

    Attributes:
        tokens: Indices into the codebook.
        embedding: The quantised vectors, projected up; gradients pass the rounding unchanged.
        mask: True where a token stands for at least one real frame.
        latent: The numbers before they were bounded and rounded.
    """

    tokens: Int[Tensor, "b s"]
    embedding: Float[Tensor, "b s c"]
    mask: Bool[Tensor, "b s"]
    latent: Float[Tensor, "b s d"]


class SpeechTokenizer(OwnsItsDevice, ABC):
    """Turns sound into speech tokens.

    :meth:`encode` of a subclass runs on the tokenizer's own device, in full precision and without gradients; see
    :mod:`tts_align.models.base.device`.
    """

    on_own_device: ClassVar[tuple[str, ...]] = ("encode",)
    codebook_size: int
    """Size of the codebook."""
    sample_rate: int
    """Of the waveforms it hears, in Hz."""
    max_seconds: float | None = None
    """Longest waveform it takes; ``None`` for any."""

    @abstractmethod
    def encode(self, waveforms: Sequence[Float[Tensor, " time"]]) -> list[Int[Tensor, " s"]]:
        """Speech tokens of each waveform, on the CPU; a waveform's speech tokens do not depend on its neighbours."""


class TokenizerHead(SpeechTokenizer):
    """A speech tokenizer that trains: gradients pass its rounding, so what reads its vectors can teach it."""

    on_own_device: ClassVar[tuple[str, ...]] = ("encode", "features")
    embedding_channels: int
    """Width of its vectors."""

    @abstractmethod
    def features(self, waveform: Float[Tensor, " time"]) -> Float[Tensor, "f c"]:
        """What it reads of a waveform; no frames if that is too short."""

    @abstractmethod
    def count(self, frames: int) -> int:
        """How many speech tokens it makes of a number of frames of features."""

    @abstractmethod
    def forward(self, log_mel: Float[Tensor, "b f m"], frames: Int[Tensor, " b"]) -> Tokenised:
        """Tokenise padded features, of which ``frames`` are real."""

    @abstractmethod
    def embed(self, tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"]) -> Float[Tensor, "b s c"]:
        """Vectors of speech tokens, or mixed of those of all speech tokens: what :meth:`forward` hands on for them."""

    def codebook(self) -> Float[Tensor, "v c"]:
        """Vectors of all speech tokens."""
        device = next(self.parameters()).device
        return self.embed(torch.arange(self.codebook_size, device=device)[None])[0]
