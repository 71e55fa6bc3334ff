# SPDX-License-Identifier: Apache-2.0
"""One seed moves everything random: that of the run, unless a part has one of its own."""

from __future__ import annotations

import os

RUN_SEED = "PL_GLOBAL_SEED"
"""Environment variable in which Lightning keeps what ``--seed_everything`` says, for all processes of a run."""


def run_seed() -> int:
    """Seed of the run; 0 where nothing was seeded."""
    return int(os.environ.get(RUN_SEED, 0))


def part_seed(own: int | None, first: int = 0) -> int:
    """Seed of a part: its own if it has one, otherwise that of the run, counted from a first one.

    Args:
        own: what the recipe says of the part; ``None`` to follow the run.
        first: seed of the part where the run's is 0, so that parts that draw alike do not draw the same.
    """
    return first + run_seed() if own is None else own


def drawn_for_step(number: int) -> float:
    """What is drawn for a whole optimiser step, on every process alike, from 0 to 1.

    Args:
        number: of the step.
    """
    import torch

    seed = (number + 0x9E3779B1 * run_seed()) % 2**32  # PyTorch's CPU generator looks at no more bits
    return float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
