# SPDX-License-Identifier: Apache-2.0
"""Precisions that cannot train: refused with the reason and what to do instead."""

from __future__ import annotations

from torch import nn

_ROUNDED = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")
_LOST = "AdamW at a learning rate of 1e-6 changes one weight in fifty of them, the other steps are lost in the rounding"


def check_precision(precision: str | int | None) -> None:
    """Raise ``ValueError`` for a trainer's precision that keeps the weights themselves in half precision.

    Args:
        precision: ``trainer.precision`` of the recipe.
    """
    if str(precision) in _ROUNDED:
        raise ValueError(
            f"trainer.precision {precision} keeps the weights in half precision: {_LOST}. Set trainer.precision to "
            "bf16-mixed: it computes in bfloat16 and keeps the weights in float32"
        )


def check_trained_weights(model: nn.Module, option: str) -> None:
    """Raise ``ValueError`` if weights that train are coarser than float32.

    Args:
        model: about to be trained.
        option: of the recipe that makes it, such as ``model.policy``.
    """
    for name, value in model.named_parameters():
        if value.requires_grad and value.is_floating_point() and value.element_size() < 4:
            raise ValueError(
                f"{option} trains {name} in {str(value.dtype).removeprefix('torch.')}: {_LOST}. Set dtype: float32 "
                "(with trainer.precision bf16-mixed it is computed in bfloat16 all the same), or train adapters: lora"
            )
