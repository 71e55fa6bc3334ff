# SPDX-License-Identifier: Apache-2.0
"""From noise to mel: the path that flow-matching models learn, and the solver that follows it.

Optimal-transport conditional flow matching (arXiv 2210.02747): noise ``z`` at time 0 moves to mel ``x`` at time 1 on
the line ``(1 - (1 - sigma) t) z + t x``; the model learns the velocity ``x - (1 - sigma) z`` of that movement. In
training all conditions are dropped together now and then, so that in sampling the velocity without them can be
subtracted (classifier-free guidance, arXiv 2207.12598).

Axes: ``b`` utterances, ``f`` frames, ``m`` mel channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

SIGMA = 1e-6
"""What is left of the noise at time 1."""
NOISE_FRAMES = 15000
"""Frames drawn at a time for the fixed noise."""

Field = Callable[[Float[Tensor, "b f m"], Float[Tensor, " b"]], Float[Tensor, "b f m"]]
"""Velocity of states at times."""


def path(
    noise: Float[Tensor, "b f m"], mel: Float[Tensor, "b f m"], time: Float[Tensor, " b"]
) -> Float[Tensor, "b f m"]:
    """State at ``time`` on the way from ``noise`` to ``mel``."""
    time = time[:, None, None]
    return (1 - (1 - SIGMA) * time) * noise + time * mel


def path_velocity(noise: Float[Tensor, "b f m"], mel: Float[Tensor, "b f m"]) -> Float[Tensor, "b f m"]:
    """Velocity on the way from ``noise`` to ``mel``, the same at all times."""
    return mel - (1 - SIGMA) * noise


def cosine_grid(steps: int, device: torch.device | str | None = None) -> Float[Tensor, " q"]:
    """Times 0 = t_0 < ... < t_steps = 1, closest together near the noise.

    >>> cosine_grid(2)
    tensor([0.0000, 0.2929, 1.0000])
    """
    if steps < 1:
        raise ValueError(f"expected at least 1 step from noise to mel, got {steps}")
    return 1 - torch.cos(torch.linspace(0, 1, steps + 1, device=device) * 0.5 * torch.pi)


def euler(field: Field, noise: Float[Tensor, "b f m"], grid: Float[Tensor, " q"]) -> Float[Tensor, "b f m"]:
    """Follow ``field`` from ``noise`` over the times of ``grid``, one straight step between each two."""
    state = noise
    for start, end in itertools.pairwise(grid.to(noise.dtype)):
        state = state + (end - start) * field(state, start.expand(len(state)))
    return state


def fixed_noise(frames: int, mel_channels: int) -> Float[Tensor, "f m"]:
    """The noise that every utterance is made from, so that the same tokens give the same mel.

    It is the published models' own: CPU numbers of seed 0, drawn as a matrix (channels, 15000) and cut. Where that is
    too short (5 minutes at 50 frames a second) further such matrices follow. The global generator is left alone.
    """
    generator = torch.Generator().manual_seed(0)
    blocks = max(1, math.ceil(frames / NOISE_FRAMES))
    drawn = [torch.randn(mel_channels, NOISE_FRAMES, generator=generator, device="cpu") for _ in range(blocks)]
    return torch.cat(drawn, 1)[:, :frames].T.contiguous()
