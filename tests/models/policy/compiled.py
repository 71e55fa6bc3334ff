# SPDX-License-Identifier: Apache-2.0
"""Compares compiled layers with plain ones: a script, because the tests' checks of types cannot be traced.

    python compiled.py aot_eager|inductor...

``aot_eager`` traces forward and backward as for a compiler and runs them by PyTorch's own operations.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.policy import backbone
from tts_align.models.policy.qwen2 import LoRA, Qwen2CodecLM, Sizes

SIZES = Sizes(50, 20, hidden_size=16, layers=2, heads=2, key_value_heads=1, intermediate_size=32)
BATCHES = ([TokenRow((1, 2, 3), (4, 5, 6))] * 2, [TokenRow((1, 2), tuple(range(9)))] * 3)


def scored(model: Qwen2CodecLM, backward: bool) -> list[Tensor]:
    """Log-probabilities of two batches of other lengths, and the gradients of what trains."""
    found: list[Tensor] = []
    for rows in BATCHES:
        model.zero_grad()
        logp = model(collate(rows, model.layout)).logp
        if backward:
            logp.sum().backward()
        found += [logp.detach(), *(one.grad.clone() for one in model.parameters() if one.grad is not None)]
    return found


def made(compiled: bool, lora: LoRA | None, recompute: bool) -> Qwen2CodecLM:
    """A model of random weights, the same for the same seed."""
    torch.manual_seed(0)
    return Qwen2CodecLM(sizes=SIZES, compile=compiled, lora=lora, recompute=recompute)


def main() -> None:
    """Compare, and say what was compared."""
    original = torch.compile
    for name in sys.argv[1:]:
        compiled: list[str] = []

        def through(function, name=name, compiled=compiled, **given):
            compiled.append(function.__name__)
            return original(function, backend=name, **given)

        torch.compile = through
        for lora, recompute in ((None, False), (None, True), (LoRA(rank=2), False)):
            if name == "inductor" and (lora or recompute):
                continue  # its code is the same for them, and takes long to make
            both = [made(one, lora, recompute) for one in (True, False)]
            with torch.set_grad_enabled(name != "inductor"):
                found, expected = (scored(one, name != "inductor") for one in both)
            assert len(found) == len(expected) >= 2
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert compiled == ["project", "combine"], compiled  # once for all layers
        print(name)
        backbone._project.cache_clear()
        backbone._combine.cache_clear()


if __name__ == "__main__":
    main()
