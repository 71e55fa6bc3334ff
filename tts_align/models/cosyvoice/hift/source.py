# SPDX-License-Identifier: Apache-2.0
"""The excitation of the HiFT vocoders: sines at the harmonics of the voice, and noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

# Noise of unvoiced stretches, as a share of the sines' amplitude.
_UNVOICED_SHARE = 1 / 3
# Of the noise that is drawn when no generator is given.
NOISE_SEED = 0


class Source(nn.Module):
    """Frequency -> excitation.

    Phases are the sum of all increments so far: at frame rate, then brought to sample rate by a straight line between
    the frames' centres (``staircase`` False, CosyVoice2) or by repetition (True, Fun-CosyVoice3). They are summed in
    double precision, so that a long recording ends as precisely as it begins. No random initial phase is added: the
    published models draw one and lose it again.

    Args:
        harmonics: overtones beside the fundamental.
        sample_rate: samples per second.
        frame_samples: samples per mel frame.
        amplitude: of the sines.
        noise_std: factor of the noise in voiced stretches; unvoiced ones have a third of ``amplitude``.
        voiced_threshold: hertz above which a frame counts as voiced.
        staircase: how phases are brought to sample rate.
        uniform_noise: whether the noise is uniform in [0, 1) outside training (Fun-CosyVoice3) or Gaussian.
    """

    def __init__(
        self,
        harmonics: int,
        sample_rate: int,
        frame_samples: int,
        amplitude: float,
        noise_std: float,
        voiced_threshold: float,
        staircase: bool,
        uniform_noise: bool,
    ) -> None:
        super().__init__()
        self.l_linear = nn.Linear(harmonics + 1, 1)
        self.sample_rate, self.frame_samples = sample_rate, frame_samples
        self.amplitude, self.noise_std, self.voiced_threshold = amplitude, noise_std, voiced_threshold
        self.staircase, self.uniform_noise = staircase, uniform_noise

    def forward(self, f0: Float[Tensor, "b f"], noise: Float[Tensor, "#b time h"]) -> Float[Tensor, "b time"]:
        """Excitation of every sample; gradients reach the mixing layer, not the frequency."""
        sines = self.sines(f0.detach(), noise.to(f0))
        return self.l_linear(sines).squeeze(-1).tanh()

    def spread(self, f0: Float[Tensor, "b f"]) -> Float[Tensor, "b time"]:
        """Bring the frequency to sample rate by repetition."""
        return f0.repeat_interleave(self.frame_samples, dim=-1)

    def voiced(self, f0: Float[Tensor, "b f"]) -> Bool[Tensor, "b time"]:
        """Which samples are voiced."""
        return self.spread(f0) > self.voiced_threshold

    def sines(self, f0: Float[Tensor, "b f"], noise: Float[Tensor, "#b time h"]) -> Float[Tensor, "b time h"]:
        """Fundamental and harmonics where there is a voice, and noise everywhere."""
        voiced = self.voiced(f0)[..., None]
        loudness = torch.where(voiced, self.noise_std, self.amplitude * _UNVOICED_SHARE)
        return self.amplitude * self.phase(f0).sin() * voiced + loudness.to(f0) * noise

    def phase(self, f0: Float[Tensor, "b f"]) -> Float[Tensor, "b time h"]:
        """Phase of the fundamental and each harmonic in radians, within one turn."""
        order = torch.arange(1, self.l_linear.in_features + 1, device=f0.device, dtype=torch.float64)
        turns = (f0.double()[:, None] * order[:, None] / self.sample_rate % 1).cumsum(-1) * self.frame_samples
        if self.staircase:
            turns = (turns % 1).to(f0.dtype).repeat_interleave(self.frame_samples, dim=-1)
        else:
            turns = (F.interpolate(turns, scale_factor=self.frame_samples, mode="linear") % 1).to(f0.dtype)
        # :: (b, k, time) -> (b, time, k)
        return turns.transpose(1, 2) * (2 * math.pi)

    def noise(
        self, batch: int, samples: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "rows {samples} h"]:
        """Draw noise of the family's kind, never from the global generator.

        Args:
            batch: rows of the batch.
            samples: samples per row; any number.
            generator: where from; every row then gets noise of its own. ``None``: one noise for all rows, the same at
                every call, so that a row sounds the same in every batch; of uniform noise a shorter call gets the
                beginning of what a longer one gets, so that a stream sounds like the whole.

        Returns:
            ``batch`` rows, or one for all without a generator, on the generator's device (CPU without one).
        """
        if generator is None:
            generator, batch = torch.Generator().manual_seed(NOISE_SEED), 1
        shape = (batch, samples, self.l_linear.in_features)
        draw = torch.rand if self.uniform_noise and not self.training else torch.randn
        return draw(shape, generator=generator, device=generator.device)
