# SPDX-License-Identifier: Apache-2.0
"""The published CosyVoice2 flow at tiny size: sizes, weights, inputs and outputs."""

from __future__ import annotations

import torch
from parity import FOLDER, parity
from safetensors.torch import load_file
from torch import Tensor

ENCODER = {"channels": 64, "width": 64, "heads": 4, "hidden": 80, "blocks": 2, "up_blocks": 4, "chunk": 4}
UNET = {
    "channels": 24,
    "time_channels": 96,
    "blocks": 2,
    "mid_blocks": 2,
    "heads": 4,
    "head_channels": 8,
    "hidden": 96,
    "chunk": 8,
}
TOLERANCE = 1e-5


def dump() -> dict[str, Tensor]:
    """Inputs and outputs."""
    return parity("flow_v2").io


def weights(prefix: str = "") -> dict[str, Tensor]:
    """Those whose name begins with ``prefix``, without it."""
    state = load_file(FOLDER / "flow_v2" / "state_dict.safetensors")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def length_mask(lengths: Tensor, width: int | None = None) -> Tensor:
    """True for the first ``lengths`` positions."""
    return torch.arange(int(lengths.max()) if width is None else width) < lengths[:, None]


def off(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max()).item()
