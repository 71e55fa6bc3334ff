# SPDX-License-Identifier: Apache-2.0
"""Causal attention inside each of several rows that stand one behind the other, without padding and without a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tts_align.models.policy.kernels import autocast_type

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query (l, n, d), key and value (l, k, d) to what each head has read, (l, n, d)."""


@dataclass(frozen=True)
class RowAttention:
    """Attention of every position to the positions of its own row up to itself.

    On a GPU, in half precision and without dropout, one variable-length flash kernel does it for all rows, if it takes
    heads of their size; elsewhere on a GPU the rows are padded for this one operation, so that one call is enough; on a
    CPU each row is a call of its own, which costs less than padding.

    Args:
        lengths: positions of each row, in order.
        offset: where each row begins, and the end of the last, on the device.
        row: which row each position belongs to, on the device.
        position: place of each position in its row, on the device.
        dropout: of attention weights.
    """

    lengths: Sequence[int]
    offset: Int[Tensor, " r_plus_1"]
    row: Int[Tensor, " l"]
    position: Int[Tensor, " l"]
    dropout: float = 0.0

    def __call__(
        self, query: Float[Tensor, "l n d"], key: Float[Tensor, "l k d"], value: Float[Tensor, "l k d"]
    ) -> Float[Tensor, "l n d"]:
        """What each position reads."""
        if query.device.type == "cpu":
            return self.row_by_row(query, key, value)
        half = autocast_type(query.device.type) or query.dtype
        if half in (torch.float16, torch.bfloat16) and not self.dropout and flash_can(query):
            return self.variable_length(query.to(half), key.to(half), value.to(half))
        return self.padded(query, key, value)

    def row_by_row(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A call for each row."""
        lengths = list(self.lengths)
        rows = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        mixed = [
            # :: (s, n, d) -> (1, n, s, d) -> (s, n, d)
            _causal([part.transpose(0, 1)[None] for part in row], self.dropout)[0].transpose(0, 1)
            for row in rows
        ]
        return torch.cat(mixed)

    def padded(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One call for all rows, each padded on the right, which nothing before it sees."""
        longest = max(self.lengths)
        place = self.row * longest + self.position
        wide = []
        for part in (query, key, value):
            flat = part.new_zeros(len(self.lengths) * longest, *part.shape[1:]).index_copy(0, place, part)
            wide.append(flat.unflatten(0, (-1, longest)).transpose(1, 2))  # :: (r * s, n, d) -> (r, n, s, d)
        mixed = _causal(wide, self.dropout)
        return (
            mixed.transpose(1, 2).flatten(0, 1).index_select(0, place)
        )  # :: (r, n, s, d) -> (r * s, n, d) -> (l, n, d)

    def variable_length(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One flash kernel for all rows."""
        from torch.nn.attention.varlen import varlen_attn

        groups = query.shape[1] // key.shape[1]
        longest = max(self.lengths)
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))  # :: (l, k, d) -> (l, n, d)
        causal = (-1, 0)  # window: all that stands before, nothing behind
        mixed = varlen_attn(query, key, value, self.offset, self.offset, longest, longest, window_size=causal)
        assert isinstance(mixed, Tensor)
        return mixed


def flash_can(query: Float[Tensor, "l n d"]) -> bool:
    """Whether the flash kernel takes heads of this size on this device: CUDA from compute capability 8 on."""
    size = query.shape[-1]
    if query.device.type != "cuda" or size % 8 or size > 256:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _causal(parts: Sequence[Tensor], dropout: float) -> Tensor:
    query, key, value = parts
    return functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
