# SPDX-License-Identifier: Apache-2.0
"""What of a module a checkpoint holds, and which checkpoints a module takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from tts_align.objectives.base import Part


def trained_state(module: nn.Module, state: Mapping[str, Tensor], trains: Collection[Part]) -> dict[str, Tensor]:
    """Keep what trains, and the buffers of models that train; the rest is rebuilt from its own path.

    Args:
        module: whose state it is.
        state: all of it, whole or sharded.
        trains: the parts that train besides the policy.
    """
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    prefixes = ("policy.", "objective.", *(f"parts.{part}." for part in trains))
    buffers = {name for name, _ in module.named_buffers() if name.startswith(prefixes)}
    return {key: value for key, value in state.items() if key in trained | buffers}


def check_fits(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` for a state that lacks what trains in the module: it is another model's."""
    trained = {name: value.shape for name, value in module.named_parameters() if value.requires_grad}
    saved = {name: value.shape for name, value in state.items()}
    wrong = sorted(name for name, shape in trained.items() if saved.get(name) != shape)
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit {len(wrong)} of {len(trained)} trained weights, {wrong[0]} first (there "
            f"{tuple(saved.get(wrong[0], ()))}, here {tuple(trained[wrong[0]])}): it was made with another "
            "model.policy"
        )
