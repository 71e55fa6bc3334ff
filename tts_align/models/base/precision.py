# SPDX-License-Identifier: Apache-2.0
"""What stays in float32 whatever precision a trainer or a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A model whose weights may be half precision, but not its buffers: frequencies and tables.

    In bfloat16 a rotary frequency is wrong by one part in 256, so that position 300 is turned by 0.28 rad too much.
    """

    def stays_float32(self, parameter: str) -> bool:
        """Whether a parameter, by its name, stays float32 as well."""
        return False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow to another device or type, with buffers of float32 at least."""
        before = list(self._kept())
        changed = super()._apply(fn, recurse)
        for module, name, tensor in before:
            if name in module._buffers:
                now = module._buffers[name]
                if now is not None and coarser(now, tensor):
                    module._buffers[name] = tensor.to(now.device)
            elif coarser(module._parameters[name], tensor):  # type: ignore[arg-type]
                module._parameters[name].data = tensor.to(module._parameters[name].device)  # type: ignore[union-attr]
        return changed

    def _kept(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for prefix, module in self.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield module, name, buffer
            for name, parameter in module._parameters.items():
                if parameter is not None and self.stays_float32(f"{prefix}.{name}"):
                    yield module, name, parameter.detach()


def coarser(changed: Tensor, tensor: Tensor) -> bool:
    """Whether a change made half precision of more."""
    both_float = changed.is_floating_point() and tensor.is_floating_point()
    return both_float and changed.element_size() < 4 <= tensor.element_size()


@contextmanager
def full_precision(device: torch.device | str = "cpu") -> Iterator[None]:
    """Within the block nothing is cast to half precision, nor made in it.

    A trainer of ``bf16-mixed`` casts inside matrix products and convolutions, one of ``bf16-true`` makes new tensors
    bfloat16: a waveform would be rough, a speech token another one, and some transforms do not exist at all.

    Args:
        device: where is computed besides the CPU.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            for kind in {"cpu", torch.device(device).type}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(before)
