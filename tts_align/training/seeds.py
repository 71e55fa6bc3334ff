# SPDX-License-Identifier: Apache-2.0
"""Seeds of what is random in a step: they depend on what the step is, and on nothing that came before it."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int) -> int:
    """A seed made of several numbers.

    >>> seed_of(0, 1) == seed_of(0, 1) != seed_of(1, 0)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed PyTorch's own generators, that of the CPU and that of one device."""
    # torch.manual_seed would write down the stack for every back end that is not in use: a millisecond or two a step.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
