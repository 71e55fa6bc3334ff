# SPDX-License-Identifier: Apache-2.0
"""Speech tokenizer: log-mel frames in, one finite-scalar-quantised index per group of frames out.

Finite scalar quantisation (Mentzer et al., arXiv 2309.15505), the scheme of CosyVoice2's speech tokenizer: project
down to a few bounded numbers, round each to one of `levels[j]` values with a straight-through gradient, read the
digits as one index. Every layer either looks at one token at a time or is a masked convolution, so that padding
never reaches a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tts_align.models.base.tokenizer import Tokenised

TERNARY = (3,) * 8
"""Levels of the published tokenizers: 6561 speech tokens."""
SHRINK = 0.9990000128746033
"""What the published tokenizers multiply a bounded number with before they round it: 0.999 in single precision."""


class FiniteScalarQuantiser(nn.Module):
    """Round each of a few bounded numbers to its own number of levels; no codebook to learn or to collapse.

    Args:
        levels: Number of values of each dimension; the codebook has their product.
        shrink: Factor of the bounded numbers, which are then rounded around zero, as in the published tokenizers; with
            three levels a digit is round(shrink * tanh(x)) + 1. Without it tanh spans the digits from first to last.
    """

    levels: Tensor
    strides: Tensor

    def __init__(self, levels: Sequence[int] = TERNARY, shrink: float | None = None) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels must be one or more numbers of at least 2, got {list(levels)}")
        if shrink is not None and not 0 < shrink <= 1:
            raise ValueError(f"shrink must be above 0 and at most 1, got {shrink}")
        self.codebook_size, self.shrink = math.prod(levels), shrink
        strides = [math.prod(levels[:position]) for position in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)

    def forward(self, latent: Float[Tensor, "*b d"]) -> tuple[Int[Tensor, "*b"], Float[Tensor, "*b d"]]:
        """Quantise.

        Args:
            latent: Unbounded numbers.

        Returns:
            The index, sum_j h_j * prod(levels[:j]) with digits 0 <= h_j < levels[j], and the quantised numbers in
            [-1, 1], with the gradient of the bounded ones.
        """
        # Half precision would move numbers over the border between two digits.
        wide = latent.float() if latent.dtype in (torch.float16, torch.bfloat16) else latent
        digits = self._spread(wide) if self.shrink is None else self._centred(wide, self.shrink)
        values = digits / (self.levels - 1) * 2 - 1
        return (digits.round().long() * self.strides).sum(-1), values.to(latent.dtype)

    def codebook(self) -> Float[Tensor, "v d"]:
        """The quantised numbers of every index: mixtures of tokens are products with this table."""
        return self.values(torch.arange(self.codebook_size, device=self.levels.device))

    def values(self, tokens: Int[Tensor, "*b"] | Float[Tensor, "*b v"]) -> Float[Tensor, "*b d"]:
        """The quantised numbers of each index: the inverse of `forward`.

        Args:
            tokens: Indices, or the weights with which each is mixed from all of the codebook.

        Raises:
            ValueError: The weights are not as many as the codebook has entries.
        """
        if not tokens.is_floating_point():
            digits = tokens[..., None] // self.strides % self.levels
            return digits / (self.levels - 1) * 2 - 1
        if tokens.shape[-1] != self.codebook_size:
            raise ValueError(
                f"expected a weight for each of the {self.codebook_size} speech tokens, got {tokens.shape[-1]}: "
                "leave special tokens out"
            )
        return tokens @ self.codebook().to(tokens.dtype)

    def _spread(self, latent: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Digits, spread over all of tanh."""
        position = (torch.tanh(latent) + 1) / 2 * (self.levels - 1)
        return position + (position.round() - position).detach()

    def _centred(self, latent: Float[Tensor, "*b d"], shrink: float) -> Float[Tensor, "*b d"]:
        """Digits, rounded around zero; halves go to the even number, which is not the same as in `_spread`."""
        half = (self.levels - 1) / 2
        between = half % 1  # an even number of levels has none at zero
        position = shrink * torch.tanh(latent) * half - between
        # The difference is exactly 0: only its gradient counts, and the digits stay whole.
        return position.round().detach() + (half + between) + (position - position.detach())


class MaskedBlock(nn.Module):
    """ConvNeXt block whose normalisation looks at one position at a time and whose convolution sees no padding.

    Args:
        channels: Width.
        kernel_size: Odd number of positions the depth-wise convolution sees.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 2 * channels)
        self.narrow = nn.Linear(2 * channels, channels)

    def forward(self, hidden: Float[Tensor, "b s c"], mask: Bool[Tensor, "b s"]) -> Float[Tensor, "b s c"]:
        """Residual update; masked positions count as zero, exactly like the ends of an unpadded utterance."""
        # :: (b, s, c) -> (b, c, s) -> (b, s, c)
        seen = (hidden * mask[..., None]).transpose(1, 2)
        update = self.norm(self.depthwise(seen).transpose(1, 2))
        return hidden + self.narrow(functional.gelu(self.widen(update)))


class FSQTokenizer(nn.Module):
    """Log-mel -> groups of frames -> encoder -> project down -> round -> index -> project up.

    With frames of 10 ms the defaults give 25 tokens a second.

    Args:
        mel_channels: Mel channels of the features.
        frames_per_token: Log-mel frames that one token stands for.
        levels: Levels per dimension of the quantiser; their product is the codebook size.
        hidden_channels: Width of the encoder.
        blocks: Number of convolution blocks. Fewer blocks see less context: the same sound gets the same token more
            often.
        kernel_size: Tokens that one block sees.
        embedding_channels: Width of the embedding handed to the decoder.
        shrink: Factor of the bounded numbers, see `FiniteScalarQuantiser`; by default that of the published tokenizers.
    """

    def __init__(
        self,
        mel_channels: int = 128,
        frames_per_token: int = 4,
        levels: Sequence[int] = TERNARY,
        hidden_channels: int = 512,
        blocks: int = 6,
        kernel_size: int = 7,
        embedding_channels: int = 512,
        shrink: float | None = SHRINK,
    ) -> None:
        super().__init__()
        self.frames_per_token = frames_per_token
        self.stem = nn.Linear(mel_channels * frames_per_token, hidden_channels)
        self.blocks = nn.ModuleList(MaskedBlock(hidden_channels, kernel_size) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden_channels)
        self.down = nn.Linear(hidden_channels, len(levels))
        self.quantiser = FiniteScalarQuantiser(levels, shrink)
        self.up = nn.Linear(len(levels), embedding_channels)

    @property
    def codebook_size(self) -> int:
        """Number of different tokens."""
        return self.quantiser.codebook_size

    def forward(self, log_mel: Float[Tensor, "b f m"], frames: Int[Tensor, " b"]) -> Tokenised:
        """Tokenise a padded batch.

        Args:
            log_mel: Normalised log-mel, padded with anything.
            frames: Real frames of each utterance; a last, partly filled token counts.
        """
        groups, mask = self._group(log_mel, frames)
        hidden = functional.gelu(self.stem(groups))
        for block in self.blocks:
            hidden = block(hidden, mask)
        latent = self.down(self.norm(hidden))
        tokens, values = self.quantiser(latent)
        return Tokenised(tokens, self.up(values), mask, latent)

    def embed(self, tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"]) -> Float[Tensor, "b s c"]:
        """Embedding of each token: what `forward` hands on for it.

        Args:
            tokens: Indices, or the weights with which each is mixed from all of the codebook; one weight of 1 gives
                exactly what its index gives.
        """
        return self.up(self.quantiser.values(tokens).to(self.up.weight.dtype))

    def _group(
        self, log_mel: Float[Tensor, "b f m"], frames: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b s g"], Bool[Tensor, "b s"]]:
        """Frames -> groups of `frames_per_token`, padding set to zero."""
        positions = torch.arange(log_mel.shape[1], device=log_mel.device)
        clean = log_mel * (positions < frames[:, None])[..., None]
        clean = functional.pad(clean, (0, 0, 0, -log_mel.shape[1] % self.frames_per_token))
        # :: (b, s * frames_per_token, m) -> (b, s, frames_per_token * m)
        groups = clean.reshape(clean.shape[0], -1, self.frames_per_token * clean.shape[2])
        counts = -(-frames // self.frames_per_token)
        return groups, torch.arange(groups.shape[1], device=log_mel.device) < counts[:, None]
