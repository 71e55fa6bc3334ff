# SPDX-License-Identifier: Apache-2.0
"""Differentiable samples of speech tokens: the Gumbel-softmax (arXiv 1611.01144), straight-through or soft.

The gradient is written by hand, so that beside the logits only the sample and its soft probabilities are held, and the
forward of the straight-through sample is exactly one-hot instead of one-hot up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = {"cpu": 2**19, "cuda": 2**25}
"""Numbers worked on at a time in the backward pass."""


@dataclass(frozen=True)
class RowNoise:
    """Gumbel noise that belongs to rows: a row's noise does not depend on its neighbours.

    Args:
        generators: of each row, on the device of the logits; see :func:`row_generators`.
        lengths: how many positions of the flat logits each row has, in their order.
    """

    generators: tuple[torch.Generator, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that there is one of each."""
        if len(self.generators) != len(self.lengths):
            raise ValueError(
                f"expected one generator for each of the {len(self.lengths)} rows, got {len(self.generators)}"
            )

    def draw(
        self, codebook_size: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "m c"]:
        """Standard Gumbel numbers for all rows, one after the other; advances the generators."""
        noise = torch.empty(sum(self.lengths), codebook_size, device=device, dtype=dtype)
        for part, generator in zip(noise.split(self.lengths), self.generators, strict=True):
            # -log of a standard exponential number is a standard Gumbel number; exactly 0 would become infinite.
            part.exponential_(generator=generator).clamp_(min=torch.finfo(dtype).tiny).log_().neg_()
        return noise


def row_generators(seeds: Sequence[int], device: torch.device | str = "cpu") -> tuple[torch.Generator, ...]:
    """One generator per row, made of the row's own seed."""
    return tuple(torch.Generator(device).manual_seed(seed) for seed in seeds)


def gumbel_softmax_st(
    logits: Float[Tensor, "m v"],
    codebook_size: int,
    noise: RowNoise | Float[Tensor, "m c"],
    temperature: float = 1.0,
    hard: bool = True,
) -> Float[Tensor, "m c"]:
    """Sample speech tokens so that gradients reach the logits.

    Ids from ``codebook_size`` on are end-of-speech and other special tokens; they are left out before the sampling, so
    that the result is a distribution over tokens alone, c of them. Beside the logits two tensors of shape (m, c) are
    held when ``hard``, one when not; noise given as a tensor is not changed, and comes on top.

    Args:
        logits: scores at the real targets.
        codebook_size: speech tokens; the leading ids of the vocabulary.
        noise: standard Gumbel numbers, or the rows' generators to draw them with.
        temperature: divides logits plus noise.
        hard: exactly one-hot samples whose gradient is that of the soft ones (straight-through); otherwise soft ones.

    Returns:
        Samples in float32 (float64 for float64 logits).

    Example:
        >>> from tts_align import RowNoise, gumbel_softmax_st, row_generators
        >>> logits = torch.zeros(3, 5, requires_grad=True)  # three positions: four speech tokens, end-of-speech
        >>> noise = RowNoise(row_generators([7, 8]), lengths=(2, 1))  # two rows, each with a seed of its own
        >>> sample = gumbel_softmax_st(logits, codebook_size=4, noise=noise, temperature=1.0)
        >>> (sample @ torch.arange(4.0)).sum().backward()  # any differentiable reward of the tokens
        >>> sample.sum(-1), logits.grad.abs().sum(-1) > 0
        (tensor([1., 1., 1.], grad_fn=<SumBackward1>), tensor([True, True, True]))
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not 0 < codebook_size <= logits.shape[-1]:
        raise ValueError(
            f"expected speech tokens in 1..{logits.shape[-1]}, the width of the logits, got {codebook_size}"
        )
    positions = sum(noise.lengths) if isinstance(noise, RowNoise) else len(noise)
    width = codebook_size if isinstance(noise, RowNoise) else noise.shape[-1]
    if (positions, width) != (len(logits), codebook_size):
        raise ValueError(f"expected noise of shape {(len(logits), codebook_size)}, got {(positions, width)}")
    return _GumbelSoftmax.apply(logits, codebook_size, noise, temperature, hard)


class _GumbelSoftmax(torch.autograd.Function):
    """softmax((logits + noise) / temperature), or the one-hot of its largest entry with the same gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, codebook_size: int, noise: RowNoise | Tensor, temperature: float, hard: bool
    ) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        # From here on everything happens in this one buffer.
        if isinstance(noise, RowNoise):
            soft = noise.draw(codebook_size, logits.device, dtype)
        else:
            soft = noise.to(logits.device, dtype, copy=True)
        soft.add_(logits[:, :codebook_size])
        top, chosen = soft.max(-1, keepdim=True)
        soft.sub_(top).div_(temperature).exp_()
        soft.div_(soft.sum(-1, keepdim=True))
        ctx.save_for_backward(soft)
        ctx.temperature, ctx.width, ctx.dtype = temperature, logits.shape[-1], logits.dtype
        return torch.zeros_like(soft).scatter_(1, chosen, 1.0) if hard else soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (soft,) = ctx.saved_tensors
        positions, codebook_size = soft.shape
        out = torch.zeros(positions, ctx.width, device=soft.device, dtype=ctx.dtype)
        rows = max(_BLOCK.get(soft.device.type, _BLOCK["cuda"]) // codebook_size, 1)
        for into, share, upstream in zip(out.split(rows), soft.split(rows), gradient.split(rows), strict=True):
            weighted = share * upstream
            into[:, :codebook_size] = weighted.addcmul_(share, weighted.sum(-1, keepdim=True), value=-1).div_(
                ctx.temperature
            )
        return out, None, None, None, None


def posterior_noise(
    logits: Float[Tensor, "m v"], codebook_size: int, chosen: Int[Tensor, " m"], noise: RowNoise
) -> Float[Tensor, "m c"]:
    """Gumbel numbers under which the token at each position was the one that was chosen.

    Distributed as standard ones are, given that ``logits + noise`` is largest at ``chosen``: so a sample that is
    already there gets the gradient that it would have had when it was drawn.

    Args:
        logits: scores at the real targets.
        codebook_size: speech tokens; the leading ids of the vocabulary.
        chosen: token at each position; where there is none, such as at end-of-speech, anything may come out.
        noise: the rows' generators.

    Example:
        >>> from tts_align import RowNoise, gumbel_softmax_st, posterior_noise, row_generators
        >>> logits, spoken = torch.zeros(3, 5), torch.tensor([2, 0, 3])  # what was spoken is to be scored
        >>> rows = RowNoise(row_generators([7]), lengths=(3,))
        >>> noise = posterior_noise(logits, 4, spoken, rows)
        >>> gumbel_softmax_st(logits, 4, noise).argmax(-1)  # the same tokens, now with a gradient
        tensor([2, 0, 3])
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores, chosen = logits.detach()[:, :codebook_size].to(dtype), chosen.clamp(max=codebook_size - 1)[:, None]
    found = noise.draw(codebook_size, logits.device, dtype)
    # The largest of all is a Gumbel number around the log of their sum, whichever it is; the others are cut off there.
    top = scores.logsumexp(-1, keepdim=True) + found.gather(1, chosen)
    found.add_(scores)
    torch.logaddexp(found.neg_(), -top, out=found)
    found = torch.minimum(found.neg_(), top - _APART).scatter_(1, chosen, top)
    return found.sub_(scores)


def relaxed_tokens(
    logits: Float[Tensor, "m v"],
    codebook_size: int,
    target: Int[Tensor, " m"],
    rows: RowNoise,
    temperature: float = 1.0,
    hard: bool = True,
    resample: bool = True,
) -> Float[Tensor, "m c"]:
    """Speech tokens with gradients, drawn anew at each position or the stored ones as if they had just been drawn.

    Args:
        logits: scores at the real targets.
        codebook_size: speech tokens; the leading ids of the vocabulary.
        target: stored token at each position, for ``resample=False``.
        rows: the rows' generators.
        temperature: of the Gumbel-softmax.
        hard: see :func:`gumbel_softmax_st`.
        resample: draw anew; otherwise see :func:`posterior_noise`.
    """
    noise = rows if resample else posterior_noise(logits, codebook_size, target, rows)
    return gumbel_softmax_st(logits, codebook_size, noise, temperature, hard)


_APART = 1e-4
"""How much the chosen token is ahead at least, so that rounding cannot make it a draw."""


def annealed(step: int, steps: int, start: float = 2.0, end: float = 0.8) -> float:
    """Temperature after ``step`` of ``steps`` optimiser steps: from ``start`` linearly to ``end``, and then constant.

    >>> [round(annealed(step, 4), 2) for step in (0, 1, 4, 9)]
    [2.0, 1.7, 0.8, 0.8]
    """
    if steps < 1 or step < 0:
        raise ValueError(f"expected steps of at least 1 and a step of at least 0, got {steps} and {step}")
    return start + (end - start) * min(step / steps, 1.0)
