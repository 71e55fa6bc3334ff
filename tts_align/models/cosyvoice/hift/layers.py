# SPDX-License-Identifier: Apache-2.0
"""Convolutions and residual blocks of the HiFT vocoders; attribute names are those of the published files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

# Keeps the division by a snake's frequency finite.
_TINY = 1e-9


class PaddedConv1d(nn.Conv1d):
    """A convolution that brings its own zero padding, which need not be the same on both sides.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: taps.
        stride: steps between two outputs.
        dilation: steps between two taps.
        left: zeros in front.
        right: zeros behind, standing for a future that never comes.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, left: int = 0, right: int = 0
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, dilation=dilation)
        self.left, self.right = left, right

    @classmethod
    def same(cls, inputs: int, outputs: int, kernel: int, dilation: int = 1, causal: bool = False) -> PaddedConv1d:
        """As many steps out as in; a causal one sees the past only."""
        past = dilation * (kernel - 1)
        left = past if causal else past // 2
        return cls(inputs, outputs, kernel, dilation=dilation, left=left, right=past - left)

    def forward(self, x: Float[Tensor, "b in_c in_t"], finalize: bool = True) -> Float[Tensor, "b out_c out_t"]:
        """Convolve.

        Args:
            x: the signal.
            finalize: whether the signal is at its end. If not, nothing is put behind it, so as many steps fewer
                come out as the convolution looks ahead.
        """
        right = self.right if finalize else 0
        if self.left == right:  # one pass over the signal instead of two
            return F.conv1d(x, self.weight, self.bias, self.stride, right, self.dilation)
        x = F.pad(x, (self.left, right))
        return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation)


class RepeatConv1d(PaddedConv1d):
    """Causal upsampling: every step is repeated, then a convolution over the past smooths the stairs.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: taps.
        rate: repetitions.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, rate: int) -> None:
        super().__init__(inputs, outputs, kernel, left=kernel - 1)
        self.rate = rate

    def forward(self, x: Float[Tensor, "b in_c in_t"], finalize: bool = True) -> Float[Tensor, "b out_c out_t"]:
        """Upsample; ``rate`` times as many steps come out."""
        return super().forward(x.repeat_interleave(self.rate, dim=-1), finalize)


class Snake(nn.Module):
    """``x + sin²(αx) / α`` with one frequency α per channel.

    Args:
        channels: channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c t"]) -> Float[Tensor, "b c t"]:
        """Apply it to every step."""
        alpha = self.alpha[:, None]
        wave = (x * alpha).sin()
        return torch.addcmul(x, wave, wave / (alpha + _TINY))


class ResidualBlock(nn.Module):
    """Pairs of a dilated and a plain convolution, each behind a snake, each pair with a residual connection.

    Args:
        channels: width.
        kernel: taps of every convolution.
        dilations: that of the first convolution of each pair.
        causal: whether only the past is seen.
    """

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int], causal: bool) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(normed(PaddedConv1d.same(channels, channels, kernel, d, causal)) for d in dilations)
        self.convs2 = nn.ModuleList(normed(PaddedConv1d.same(channels, channels, kernel, 1, causal)) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, x: Float[Tensor, "b c t"]) -> Float[Tensor, "b c t"]:
        """Refine; the shape stays."""
        layers = zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)
        for first_snake, first, second_snake, second in layers:
            x = x + second(second_snake(first(first_snake(x))))
        return x


def normed(convolution: nn.Module) -> nn.Module:
    """Give a convolution's weight as gain times direction, one gain per row of the weight's first axis."""
    return parametrizations.weight_norm(convolution)


def fold_norms(module: nn.Module) -> None:
    """Replace every gain and direction inside ``module`` by the weight they make, once and for all."""
    for part in list(module.modules()):
        if parametrize.is_parametrized(part, "weight"):
            trained = all(parameter.requires_grad for parameter in part.parameters())
            parametrize.remove_parametrizations(part, "weight")
            # PyTorch leaves a buffer where the weight is frozen; a merged layer is to be an ordinary one either way.
            weight = part.get_buffer("weight") if "weight" in part._buffers else part.get_parameter("weight")
            del part.weight
            part.weight = nn.Parameter(weight.detach(), requires_grad=trained)
