# SPDX-License-Identifier: Apache-2.0
"""Whatever precision a trainer computes in, what is heard and spoken is computed in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def full_precision(device_type: str = "cpu") -> Iterator[None]:
    """Within the block nothing is cast to half precision, nor made in it.

    A trainer of ``bf16-mixed`` casts inside matrix products and convolutions, one of ``bf16-true`` makes new tensors
    bfloat16: a waveform would be rough, a speech token another one, and some transforms do not exist at all.

    Args:
        device_type: where is computed besides the CPU.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            for kind in {"cpu", device_type}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(before)
