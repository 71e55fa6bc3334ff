# SPDX-License-Identifier: Apache-2.0
"""A deterministic decoder of speech tokens, whose mel a flow is conditioned on and refines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tts_align.models.codec.fsq import MaskedBlock
from tts_align.models.codec.mel import MelDecoder


@dataclass(frozen=True)
class PriorSizes:
    """Sizes of a mel decoder that a flow refines; the defaults are those of the demo's codec.

    Args:
        embedding_channels: channels of the token vectors.
        hidden_channels: channels inside the prior.
        blocks: convolution blocks at token rate.
        kernel: tokens that one block reads, odd.
    """

    embedding_channels: int = 128
    hidden_channels: int = 224
    blocks: int = 4
    kernel: int = 5

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be."""
        if min(self.embedding_channels, self.hidden_channels, self.blocks) < 1 or self.kernel % 2 == 0:
            raise ValueError(
                "prior: expected at least 1 for embedding_channels, hidden_channels and blocks and an odd kernel, got "
                f"{self.embedding_channels}, {self.hidden_channels}, {self.blocks} and {self.kernel}"
            )

    @property
    def lookahead(self) -> int:
        """How many tokens beyond it each token's frames depend on."""
        return self.blocks * (self.kernel // 2)


class MelPrior(nn.Module):
    """Token vectors and a projected speaker vector -> mel, without anything random.

    The network of :class:`~tts_align.models.codec.mel.MelDecoder`, told the voice by a vector instead of a number.

    Args:
        sizes: of the network.
        mel_channels: mel channels; the projected speaker vector has as many.
        frames_per_token: frames to make of each token.
    """

    def __init__(self, sizes: PriorSizes, mel_channels: int, frames_per_token: int) -> None:
        super().__init__()
        self.mel_channels = mel_channels
        self.stem = nn.Linear(sizes.embedding_channels, sizes.hidden_channels)
        self.voice = nn.Linear(mel_channels, sizes.hidden_channels, bias=False)
        self.blocks = nn.ModuleList(MaskedBlock(sizes.hidden_channels, sizes.kernel) for _ in range(sizes.blocks))
        self.norm = nn.LayerNorm(sizes.hidden_channels)
        self.frames = nn.Linear(sizes.hidden_channels, frames_per_token * mel_channels)

    def forward(
        self, vectors: Float[Tensor, "b s e"], mask: Bool[Tensor, "b s"], voice: Float[Tensor, "b m"]
    ) -> Float[Tensor, "b f m"]:
        """Decode; f is s * frames_per_token.

        Args:
            vectors: of the tokens.
            mask: which of them are real.
            voice: projected speaker vector of each utterance.
        """
        hidden = self.stem(vectors) + self.voice(voice)[:, None]
        for block in self.blocks:
            hidden = block(hidden, mask)
        # :: (b, s, frames_per_token * m) -> (b, s * frames_per_token, m)
        return self.frames(self.norm(hidden)).reshape(len(hidden), -1, self.mel_channels)

    @torch.no_grad()
    def take_over(self, decoder: MelDecoder, voices: Float[Tensor, "k m"]) -> float:
        """Become what a codec's decoder is.

        Args:
            decoder: of the same sizes.
            voices: projected vector of each of its speakers, in their order; linearly independent ones give exactly
                the decoder's voices.

        Returns:
            Largest difference between a voice and the decoder's own.
        """
        for name in ("stem", "blocks", "norm", "frames"):
            getattr(self, name).load_state_dict(getattr(decoder, name).state_dict())
        wanted = decoder.speaker.weight.double()
        weight = torch.linalg.pinv(voices.double()) @ wanted  # :: (m, k) @ (k, h) -> (m, h)
        self.voice.weight.copy_(weight.T)
        return float((voices.double() @ weight - wanted).abs().max())
