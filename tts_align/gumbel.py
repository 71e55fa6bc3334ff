# SPDX-License-Identifier: Apache-2.0
"""Differentiable samples of speech tokens: the Gumbel-softmax (arXiv 1611.01144), straight-through or soft.

The gradient is written by hand, so that beside the logits only the sample and its soft probabilities are held, and the
forward of the straight-through sample is exactly one-hot instead of one-hot up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        # -log of a standard exponential number is a standard Gumbel number.
        return self.exponential(codebook_size, device, dtype).log_().neg_()

    def exponential(
        self, codebook_size: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "m c"]:
        """Standard exponential numbers above 0 for all rows, one after the other; advances the generators."""
        numbers = torch.empty(sum(self.lengths), codebook_size, device=device, dtype=dtype)
        for part, generator in zip(numbers.split(self.lengths), self.generators, strict=True):
            part.exponential_(generator=generator)
        return numbers.clamp_(min=torch.finfo(dtype).tiny)


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
    positions = sum(noise.lengths) if isinstance(noise, RowNoise) else len(noise)
    width = codebook_size if isinstance(noise, RowNoise) else noise.shape[-1]
    _check(logits, codebook_size, positions, width, temperature)
    return _GumbelSoftmax.apply(logits, codebook_size, noise, temperature, hard)


def _check(logits: Tensor, codebook_size: int, positions: int, width: int, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not 0 < codebook_size <= logits.shape[-1]:
        raise ValueError(
            f"expected speech tokens in 1..{logits.shape[-1]}, the width of the logits, got {codebook_size}"
        )
    if (positions, width) != (len(logits), codebook_size):
        raise ValueError(f"expected noise of shape {(len(logits), codebook_size)}, got {(positions, width)}")


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
        return _through_softmax(ctx, soft, iter(gradient.split(_positions(soft)))), None, None, None, None


def _positions(soft: Tensor) -> int:
    """How many positions are worked on at a time."""
    return max(_BLOCK.get(soft.device.type, _BLOCK["cuda"]) // soft.shape[1], 1)


def _through_softmax(ctx: Any, soft: Tensor, upstream: Iterator[Tensor]) -> Tensor:
    """Gradient of the logits, given that of the soft samples, a piece at a time; special ids get none."""
    out = torch.zeros(len(soft), ctx.width, device=soft.device, dtype=ctx.dtype)
    rows = _positions(soft)
    for into, share, pull in zip(out.split(rows), soft.split(rows), upstream, strict=True):
        weighted = share * pull
        change = weighted.addcmul_(share, weighted.sum(-1, keepdim=True), value=-1).div_(ctx.temperature)
        into[:, : soft.shape[1]] = change
    return out


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


def sampled_vectors(
    logits: Float[Tensor, "m v"],
    table: Float[Tensor, "c h"],
    rows: RowNoise,
    temperature: float = 1.0,
    chosen: Int[Tensor, " m"] | None = None,
) -> Float[Tensor, "m h"]:
    """Vectors of straight-through samples: what ``relaxed_tokens(..., hard=True) @ table`` is, at less cost.

    The forward looks the drawn tokens up and never forms the one-hots; one tensor of shape (m, c) is held. The draws
    and the gradient are those of :func:`gumbel_softmax_st` and :func:`posterior_noise` with the same generators. They
    are written as a race of exponential clocks instead: a token of probability p rings at E / p for a standard
    exponential number E, minus the log of that time is its score plus Gumbel noise, and the first one is the sample.
    That the first was a given token, and when it rang, moves all others behind that moment.

    Args:
        logits: scores at the real targets.
        table: vectors of the speech tokens.
        rows: the rows' generators.
        temperature: of the Gumbel-softmax.
        chosen: stored token at each position, to get the gradient that it would have had; drawn anew by default.

    Example:
        >>> from tts_align import RowNoise, row_generators
        >>> logits, table = torch.zeros(3, 5, requires_grad=True), torch.eye(4)
        >>> sampled_vectors(logits, table, RowNoise(row_generators([7]), (3,))).sum(-1)  # rows of the table
        tensor([1., 1., 1.], grad_fn=<SumBackward1>)
    """
    _check(logits, len(table), sum(rows.lengths), len(table), temperature)
    return _SampledVectors.apply(logits, table, rows, temperature, chosen)


class _SampledVectors(torch.autograd.Function):
    """A look-up of drawn tokens with the gradient of the softmax they were drawn from."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, table: Tensor, rows: RowNoise, temperature: float, chosen: Tensor | None
    ) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        time = rows.exponential(len(table), logits.device, dtype)
        if chosen is None:
            time.div_(logits[:, : len(table)].softmax(-1, dtype=dtype))
            first, chosen = time.min(-1, keepdim=True)
        else:
            chosen = chosen.clamp(max=len(table) - 1)[:, None]
            first = time.gather(1, chosen)
            time.div_(logits[:, : len(table)].softmax(-1, dtype=dtype)).add_(first).scatter_(1, chosen, first)
        soft = torch.div(first, time, out=time)  # of the first 1, of one that never rings 0
        if temperature != 1:
            soft.pow_(1 / temperature)
        soft.div_(soft.sum(-1, keepdim=True))
        ctx.save_for_backward(soft, chosen, table)
        ctx.temperature, ctx.width, ctx.dtype = temperature, logits.shape[-1], logits.dtype
        return table.index_select(0, chosen[:, 0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        soft, chosen, table = ctx.saved_tensors
        into = torch.zeros_like(table).index_add_(0, chosen[:, 0], gradient) if ctx.needs_input_grad[1] else None
        # :: (m, h) @ (h, c) -> (m, c), some positions at a time
        blocks = (share @ table.T.to(share.dtype) for share in gradient.to(soft.dtype).split(_positions(soft)))
        return _through_softmax(ctx, soft, blocks), into, None, None, None


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
