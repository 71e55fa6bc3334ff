# SPDX-License-Identifier: Apache-2.0
"""Per-token log-probabilities, divergences and cross-rank means: pure functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def chosen_logp(logits: Float[Tensor, "m v"], target: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Log-probability of each target under its logits, in float32 at least.

    >>> chosen_logp(torch.zeros(2, 4), torch.tensor([0, 3])).exp()
    tensor([0.2500, 0.2500])
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -torch.nn.functional.cross_entropy(wide, target, reduction="none")


def full_kl(
    policy: Float[Tensor, "m v"],
    reference: Float[Tensor, "m v"],
    policy_normaliser: Float[Tensor, " m"] | None = None,
    reference_normaliser: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, " m"]:
    """Exact KL(policy || reference) at every position, over the whole vocabulary, in float32.

    Gradients reach the policy only; for them one tensor of the shape of the logits is held, in their type. Where none
    are wanted (``torch.no_grad()``) none is.

    Args:
        policy: logits of the policy.
        reference: logits of the reference at the same positions.
        policy_normaliser: logarithm of the sum of the policy's exponentials, where it is known already.
        reference_normaliser: likewise of the reference.

    Example:
        >>> from tts_align import full_kl
        >>> policy = torch.tensor([[0.0, 0.0], [2.0, 0.0]], requires_grad=True)
        >>> kl = full_kl(policy, torch.zeros(2, 2))
        >>> kl.sum().backward()
        >>> kl.detach(), policy.grad
        (tensor([0.0000, 0.3278]), tensor([[ 0.0000,  0.0000],
                [ 0.2100, -0.2100]]))
    """
    # A custom function does not see that nobody asks for a gradient.
    wanted = policy if torch.is_grad_enabled() else policy.detach()
    return _FullKL.apply(wanted, reference, policy_normaliser, reference_normaliser)


_BLOCK = {"cpu": 2**19, "cuda": 2**25}
"""Logits in a block; on a GPU starting a kernel costs more than the memory."""


class _FullKL(torch.autograd.Function):
    """The divergence, and with it its gradient p (log p - log q - KL) where one is wanted."""

    @staticmethod
    def forward(
        ctx: Any, policy: Tensor, reference: Tensor, policy_sum: Tensor | None, reference_sum: Tensor | None
    ) -> Tensor:
        # A block of positions at a time: what stays in the processor's cache costs a quarter, and little memory is
        # needed.
        positions = max(_BLOCK.get(policy.device.type, _BLOCK["cuda"]) // policy.shape[-1], 1)
        gradient = torch.empty_like(policy) if ctx.needs_input_grad[0] else None
        found = []
        for start in range(0, max(len(policy), 1), positions):
            block = slice(start, start + positions)
            ours, theirs = policy[block], reference[block]
            dtype = torch.promote_types(ours.dtype, torch.float32)
            logp = _log_softmax(ours.to(dtype), None if policy_sum is None else policy_sum[block])
            ratio = logp - _log_softmax(theirs.to(dtype), None if reference_sum is None else reference_sum[block])
            share = logp.exp_()
            # A token that neither model can say, such as a forbidden one at -inf, has no part in the sum.
            ratio.masked_fill_(share == 0, 0.0)
            found.append(torch.linalg.vecdot(share, ratio))
            if gradient is not None:
                gradient[block] = ratio.sub_(found[-1][:, None]).mul_(share)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None


def _log_softmax(logits: Tensor, normaliser: Tensor | None) -> Tensor:
    return logits.log_softmax(-1) if normaliser is None else logits - normaliser[:, None]


def masked_sum(values: Float[Tensor, "r t"], mask: Bool[Tensor, "r t"]) -> Float[Tensor, " r"]:
    """Sum of each row over the positions that count; what stands elsewhere, even NaN, does not matter."""
    return torch.where(mask, values, 0.0).sum(-1)


def masked_mean(values: Float[Tensor, "r t"], mask: Bool[Tensor, "r t"]) -> Float[Tensor, " r"]:
    """Mean of each row over the positions that count; 0 for a row without any."""
    return masked_sum(values, mask) / mask.sum(-1).clamp(min=1)


def by_label(desirable: Bool[Tensor, " r"], yes: float, no: float, like: Float[Tensor, "*rest"]) -> Float[Tensor, " r"]:
    """One number for desirable rows and another for the rest, in the type of other numbers: float64 beside float64.

    >>> by_label(torch.tensor([True, False]), 1.0, -0.1, torch.zeros(1, dtype=torch.float64))
    tensor([ 1.0000, -0.1000], dtype=torch.float64)
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.where(desirable, like.new_full((), yes, dtype=wide), like.new_full((), no, dtype=wide))
