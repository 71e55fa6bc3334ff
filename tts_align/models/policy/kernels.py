# SPDX-License-Identifier: Apache-2.0
"""Normalisation, rotation and the scored head: what a language model repeats most, with few passes over memory.

On a CPU each of them is written as one function with a gradient of its own, because PyTorch has no fused kernel there
and every pass over memory counts; elsewhere, and in half precision, PyTorch's own operations run.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_BLOCK = {"cpu": 2**20, "cuda": 2**25}
"""Logits of a block of the head: on a CPU what its cache holds, on a GPU enough for full speed."""


def autocast_type(device: str) -> torch.dtype | None:
    """The type that autocast brings products to on a kind of device; ``None`` where it is off, or is not known."""
    known = torch.amp.is_autocast_available(device)
    return torch.get_autocast_dtype(device) if known and torch.is_autocast_enabled(device) else None


def rms_norm(hidden: Float[Tensor, "*l h"], weight: Float[Tensor, " h"], epsilon: float) -> Float[Tensor, "*l h"]:
    """Hidden states over their root mean square, times a weight (arXiv 1910.07467).

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
    tensor([[0.8485, 1.1314]])
    """
    if hidden.device.type != "cpu" and hidden.dtype == weight.dtype:
        return functional.rms_norm(hidden, weight.shape, weight, epsilon)
    if hidden.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling():
        if not torch.is_grad_enabled():  # a function with a gradient takes as long again to call
            return _normalised(hidden, weight, epsilon)[0]
        return _RMSNorm.apply(hidden, weight, epsilon)
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(hidden.dtype)


def _normalised(hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Normalised states, and what each was multiplied by."""
    square = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).square_()
    scale = square.div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
    return (hidden * scale).mul_(weight), scale


class _RMSNorm(torch.autograd.Function):
    """Normalisation that keeps its input and one number for each position."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normed, scale = _normalised(hidden, weight, epsilon)
        ctx.save_for_backward(hidden, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
        both = upstream * hidden
        # :: (*b, h) -> (l, h) -> (h)
        of_weight = (scale * both).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        share = (both @ weight)[..., None].mul_(scale.pow(3)).div_(-hidden.shape[-1])
        return (upstream * weight).mul_(scale).addcmul_(hidden, share), of_weight, None


def rotate(
    vectors: Float[Tensor, "l n d"], cosine: Float[Tensor, "l k"], sine: Float[Tensor, "l k"]
) -> Float[Tensor, "l n d"]:
    """Turn channel i and channel i + d/2 of each head by the angle of the position (arXiv 2104.09864)."""
    cosine, sine = cosine[:, None], sine[:, None]
    if vectors.dtype == cosine.dtype and not torch.compiler.is_compiling():
        if not torch.is_grad_enabled():
            return _turned(vectors, cosine, sine)
        return _Rotate.apply(vectors, cosine, sine)
    first, second = vectors.to(torch.promote_types(vectors.dtype, cosine.dtype)).chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(vectors.dtype)


class _Rotate(torch.autograd.Function):
    """Rotation; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(vectors, cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(upstream, cosine, -sine), None, None


def _turned(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    out = torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)
    (first, second), (new_first, new_second) = vectors.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cosine, out=new_first).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=new_second).addcmul_(first, sine)
    return out


def score_targets(
    hidden: Float[Tensor, "m h"], head: nn.Linear, target: Int[Tensor, " m"], logits: bool = False
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, "m v"] | None]:
    """Log-probability of each target under a linear head, a block of positions at a time.

    For a gradient the logits are kept, in the type of the product, and nothing else of their size.

    Args:
        hidden: states that predict the targets.
        head: gives the logits.
        target: ids.
        logits: whether to return them.

    Returns:
        Log-probabilities and, in float32 at least, the logarithms of the sums that normalise them; the logits if
        asked for.
    """
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    if half := autocast_type(hidden.device.type):
        hidden, weight, bias = hidden.to(half), weight.to(half), None if bias is None else bias.to(half)
    keep = logits or torch.is_grad_enabled()
    logp, normaliser, kept = _Head.apply(hidden, weight, bias, target, keep)
    return logp, normaliser, kept if logits else None


class _Head(torch.autograd.Function):
    """Linear layer, logarithm of the sum of exponentials, and the target's share, in blocks of positions."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = max(_BLOCK.get(hidden.device.type, _BLOCK["cuda"]) // len(weight), 1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.new_empty(len(hidden) if keep else 0, len(weight))
        normaliser = hidden.new_empty(len(hidden), dtype=wide)
        logp = torch.empty_like(normaliser)
        for start in range(0, len(hidden), size):
            block = slice(start, start + size)
            found = functional.linear(hidden[block], weight, bias)
            if keep:
                logits[block] = found
            normaliser[block] = found.to(wide).logsumexp(-1)
            logp[block] = found.gather(1, target[block, None])[:, 0].to(wide) - normaliser[block]
        ctx.save_for_backward(hidden, weight, target, logits, normaliser)
        ctx.size, ctx.has_bias = size, bias is not None
        ctx.mark_non_differentiable(normaliser)
        ctx.set_materialize_grads(False)
        return logp, normaliser, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, upstream: Tensor | None, _: None, of_logits: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, target, logits, normaliser = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        into_hidden = torch.zeros_like(hidden) if wants_hidden else None
        into_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if wants_weight else None
        into_bias = normaliser.new_zeros(len(weight)) if ctx.has_bias and wants_bias else None
        for start in range(0, len(hidden), ctx.size):
            block = slice(start, start + ctx.size)
            slope = _slope(logits[block], normaliser[block], target[block], upstream, of_logits, block)
            if slope is None:
                break
            narrow = slope.to(hidden.dtype)
            if into_hidden is not None:
                torch.mm(narrow, weight, out=into_hidden[block])
            if into_weight is not None and into_weight.dtype == narrow.dtype:
                into_weight.addmm_(narrow.t(), hidden[block])
            elif into_weight is not None:
                into_weight += narrow.t() @ hidden[block]
            if into_bias is not None:
                into_bias += slope.sum(0)
        return (
            into_hidden,
            None if into_weight is None else into_weight.to(weight.dtype),
            None if into_bias is None else into_bias.to(weight.dtype),
            None,
            None,
        )


def _slope(
    logits: Tensor, normaliser: Tensor, target: Tensor, upstream: Tensor | None, of_logits: Tensor | None, block: slice
) -> Tensor | None:
    """Gradient with respect to a block of logits: (one-hot − softmax) · upstream, and what reaches them directly."""
    direct = None if of_logits is None else of_logits[block]
    if upstream is None:
        return direct
    one = upstream[block, None]
    slope = logits.to(normaliser.dtype).sub(normaliser[:, None]).exp_().mul_(-one).scatter_add_(1, target[:, None], one)
    return slope if direct is None else slope.add_(direct)
