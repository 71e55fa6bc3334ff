# SPDX-License-Identifier: Apache-2.0
"""What goes into and comes out of flow-matching models, as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tts_align.batch import Record


@dataclass(frozen=True)
class FlowRates:
    """How often what happens in training.

    Args:
        prompt: share of utterances whose first frames are given.
        prompt_share: at most this share of their frames is given.
        drop: share of utterances that are told nothing at all, for classifier-free guidance.
        streaming: share of batches whose attention does not look beyond its own chunk.
    """

    prompt: float = 0.5
    prompt_share: float = 0.3
    drop: float = 0.2
    streaming: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        for name in ("prompt", "prompt_share", "drop", "streaming"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")


@dataclass(frozen=True)
class FlowDraws(Record):
    """Everything random in one training step.

    Args:
        time: how far on the way from noise (0) to mel (1) each utterance is.
        noise: where it started; may have more frames than the utterances.
        prompt: how many of its first frames are given.
        keep: whether it is told tokens, speaker and given frames; ``False`` drops all three.
        streaming: whether attention does not look beyond its own chunk.
    """

    time: Float[Tensor, " b"]
    noise: Float[Tensor, "b f m"]
    prompt: Int[Tensor, " b"]
    keep: Bool[Tensor, " b"]
    streaming: bool = False

    @classmethod
    def draw(
        cls,
        frames: Sequence[int],
        mel_channels: int,
        generators: Sequence[torch.Generator],
        rates: FlowRates | None = None,
        streaming: bool | None = None,
    ) -> FlowDraws:
        """Draw for a batch; what an utterance gets depends on its own generator and length only.

        Args:
            frames: mel frames of each utterance.
            mel_channels: mel channels.
            generators: one for each utterance, or the same one several times, all on one device; they are advanced.
            rates: how often what happens.
            streaming: for the whole batch; without it a coin is tossed with the first utterance's generator.
        """
        if not 0 < len(frames) == len(generators):
            raise ValueError(f"expected one generator for each of {len(frames)} utterances, got {len(generators)}")
        rates = FlowRates() if rates is None else rates
        device = generators[0].device
        if streaming is None:
            streaming = bool(torch.rand((), generator=generators[0], device=device) < rates.streaming)
        coins, prompt, noise = [], [], []
        for count, generator in zip(frames, generators, strict=True):
            coins.append(torch.rand(3, generator=generator, device=device))
            most = int(rates.prompt_share * count)
            prompt.append(torch.randint(most + 1, (), generator=generator, device=device))
            noise.append(torch.randn(count, mel_channels, generator=generator, device=device))
        time, prompted, kept = torch.stack(coins, -1)
        return cls(
            time=time,
            noise=pad_sequence(noise, batch_first=True),
            prompt=torch.stack(prompt) * (prompted < rates.prompt),
            keep=kept >= rates.drop,
            streaming=streaming,
        )


@dataclass(frozen=True)
class FlowPrompt(Record):
    """Recordings that utterances continue.

    Tokens without all of their frames, and frames without their token, are left out.

    Args:
        tokens: speech tokens, padded on the right; a row may have none.
        token_mask: which of them are real.
        mel: the same recordings as mel, padded on the right.
        mel_mask: which of its frames are real.
    """

    tokens: Int[Tensor, "b s"]
    token_mask: Bool[Tensor, "b s"]
    mel: Float[Tensor, "b f m"]
    mel_mask: Bool[Tensor, "b f"]


@dataclass(frozen=True)
class FlowLoss(Record):
    """Squared error as a sum and a count, so that it can be divided by the counts of all micro-batches and ranks.

    Args:
        total: sum over real frames and channels; carries the gradient.
        count: how many numbers were summed: real frames times channels.
    """

    total: Float[Tensor, ""]
    count: Float[Tensor, ""]

    @property
    def value(self) -> Float[Tensor, ""]:
        """Mean squared error; 0 when nothing was counted."""
        return self.total / self.count.clamp(min=1)


@dataclass(frozen=True)
class MelFrames(Record):
    """Mel of utterances.

    Args:
        mel: frames; 0 at padding.
        mask: which of them are real.
    """

    mel: Float[Tensor, "b f m"]
    mask: Bool[Tensor, "b f"]
