# SPDX-License-Identifier: Apache-2.0
"""Fundamental frequency from log-mel: the first part of the HiFT vocoders."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from tts_align.models.cosyvoice.hift.layers import PaddedConv1d, normed


class F0Predictor(nn.Module):
    """Convolutions and one linear layer, whose absolute value is the frequency.

    Args:
        mel_channels: mel channels.
        channels: width.
        layers: number of convolutions.
        kernel: taps of each convolution; of the first one ``look_ahead + 1`` if causal.
        look_ahead: future frames that the first convolution sees, the only ones if causal.
        causal: whether the other convolutions see the past only. A causal predictor computes in double precision
            outside training, as its weights expect: the phase of the source is 480 times the sum of all frequencies.
    """

    def __init__(
        self, mel_channels: int, channels: int, layers: int, kernel: int, look_ahead: int, causal: bool
    ) -> None:
        super().__init__()
        self.causal = causal
        if causal:
            first = PaddedConv1d(mel_channels, channels, look_ahead + 1, right=look_ahead)
        else:
            first = PaddedConv1d.same(mel_channels, channels, kernel)
        others = [PaddedConv1d.same(channels, channels, kernel, causal=causal) for _ in range(layers - 1)]
        self.condnet = nn.Sequential()
        for convolution in (first, *others):
            self.condnet.append(normed(convolution))
            self.condnet.append(nn.ELU())
        self.classifier = nn.Linear(channels, 1)

    def forward(self, mel: Float[Tensor, "b m in_f"], finalize: bool = True) -> Float[Tensor, "b f"]:
        """Frequency of each frame in hertz, in the precision of the weights."""
        hidden = mel
        for layer in self.condnet:
            hidden = layer(hidden, finalize) if isinstance(layer, PaddedConv1d) else layer(hidden)
        # :: (b, c, f) -> (b, f, 1)
        frequency: Tensor = self.classifier(hidden.transpose(1, 2))
        return frequency.squeeze(-1).abs()

    def predict(self, mel: Float[Tensor, "b m in_f"], finalize: bool = True) -> Float[Tensor, "b f"]:
        """Frequency of each frame in hertz, in the precision that the family asks for.

        The parameters themselves keep their precision: what is computed with is a passing copy.

        Args:
            mel: log-mel.
            finalize: whether ``mel`` is complete; if not, its last ``look_ahead`` frames get no frequency.
        """
        if self.training or not self.causal:
            return self(mel, finalize)
        double = {name: parameter.double() for name, parameter in self.named_parameters()}
        return functional_call(self, double, (mel.double(), finalize)).to(mel.dtype)
