# SPDX-License-Identifier: Apache-2.0
"""Per-token log-probabilities, divergences and cross-rank means: pure functions of tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tts_align.batch import Mean


def chosen_logp(logits: Float[Tensor, "m v"], target: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Log-probability of each target under its logits, in float32.

    >>> chosen_logp(torch.zeros(2, 4), torch.tensor([0, 3])).exp()
    tensor([0.2500, 0.2500])
    """
    return -torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")


def full_kl(policy: Float[Tensor, "m v"], reference: Float[Tensor, "m v"]) -> Float[Tensor, " m"]:
    """Exact KL(policy || reference) at every position, over the whole vocabulary, in float32.

    Args:
        policy: logits of the policy.
        reference: logits of the reference at the same positions.
    """
    # A block of positions at a time: what stays in the processor's cache costs a quarter, and little memory is needed.
    positions = max(_BLOCK.get(policy.device.type, _BLOCK["cuda"]) // policy.shape[-1], 1)
    blocks = zip(policy.split(positions), reference.split(positions), strict=True)
    return torch.cat([_block_kl(*block) for block in blocks])


_BLOCK = {"cpu": 2**19, "cuda": 2**25}
"""Logits in a block; on a GPU starting a kernel costs more than the memory."""


def _block_kl(policy: Float[Tensor, "m v"], reference: Float[Tensor, "m v"]) -> Float[Tensor, " m"]:
    policy_logp, reference_logp = policy.float().log_softmax(-1), reference.float().log_softmax(-1)
    return (policy_logp.exp() * (policy_logp - reference_logp)).sum(-1)


def masked_sum(values: Float[Tensor, "r t"], mask: Bool[Tensor, "r t"]) -> Float[Tensor, " r"]:
    """Sum of each row over the positions that count; what stands elsewhere, even NaN, does not matter."""
    return torch.where(mask, values, 0.0).sum(-1)


def masked_mean(values: Float[Tensor, "r t"], mask: Bool[Tensor, "r t"]) -> Float[Tensor, " r"]:
    """Mean of each row over the positions that count; 0 for a row without any."""
    return masked_sum(values, mask) / mask.sum(-1).clamp(min=1)


def across_ranks(mean: Mean) -> Mean:
    """The same mean over the values of all ranks; a rank without values takes part with a count of 0."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean
    both = torch.stack([mean.total.float(), mean.count.float()])
    dist.all_reduce(both)
    return Mean(both[0], both[1])
