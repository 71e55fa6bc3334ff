# SPDX-License-Identifier: Apache-2.0
"""Gradients and optimisers where some weights are spread over processes and others are replicated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tts_align.utils.sharded import is_share


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of replicated weights over all processes; once per optimiser step.

    A weight that no process has used keeps no gradient, so that the optimiser leaves it alone.
    """
    trained = [one for one in parameters if one.requires_grad and not is_share(one)]
    if not trained or dist.get_world_size() == 1:
        return
    used = torch.tensor([one.grad is not None for one in trained], dtype=torch.float32).to(
        trained[0].device, non_blocking=True
    )
    pieces = [torch.zeros_like(one) if one.grad is None else one.grad for one in trained]
    flat = torch.cat([*(one.flatten() for one in pieces), used])
    dist.all_reduce(flat)
    *sums, users = flat.split([*(one.numel() for one in trained), len(trained)])
    # Only a process that lacks a gradient has to know whether others have it: the usual one waits for nothing.
    known = [True] * len(trained) if all(one.grad is not None for one in trained) else users.bool().tolist()
    for parameter, total, is_used in zip(trained, sums, known, strict=True):
        if is_used:
            parameter.grad = (total / dist.get_world_size()).view_as(parameter).to(parameter.dtype)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, on their device; of the whole ones where they are sharded.

    Args:
        gradients: sharded and replicated ones; those of replicated weights the same in all processes.
    """
    shares = [one.to_local() for one in gradients if is_share(one)]  # type: ignore[attr-defined]
    square = _square([one for one in gradients if not is_share(one)])
    if shares:
        of_shares = _square(shares)
        dist.all_reduce(of_shares)
        square = of_shares + square.to(of_shares)
    return square.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, by_value: bool = False) -> None:
    """Limit gradients, sharded and replicated ones together.

    Args:
        parameters: whose gradients they are.
        limit: largest norm of all of them; with ``by_value`` the largest number in any.
        by_value: cut each number instead of scaling all.
    """
    gradients = [one.grad for one in parameters if one.grad is not None]
    shares = [one.to_local() for one in gradients if is_share(one)]  # type: ignore[attr-defined]
    replicated = [one for one in gradients if not is_share(one)]
    if by_value:
        for gradient in (*shares, *replicated):
            gradient.clamp_(-limit, limit)
        return
    scale = (limit / (total_norm(gradients) + 1e-6)).clamp(max=1.0)
    for gradient in (*shares, *replicated):
        gradient.mul_(scale.to(gradient.dtype))


def _square(gradients: list[Tensor]) -> Tensor:
    return torch.stack([one.float().square().sum() for one in gradients]).sum() if gradients else torch.zeros(())


def weights(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """What an optimiser updates, in the order of its state."""
    for group in optimizer.param_groups:
        yield from group["params"]


def fused(optimizer: Optimizer) -> Optimizer:
    """The optimiser itself; one of PyTorch's updates all weights in one kernel, unless its settings say otherwise.

    On a CPU it takes a third of the time of weight after weight. Sharded weights are left alone: sharded and replicated
    ones do not share a kernel.
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.SGD | torch.optim.Adagrad):
        return optimizer
    for group in optimizer.param_groups:
        settled = group.get("fused") is not None or any(
            group.get(name) for name in ("foreach", "capturable", "differentiable")
        )
        plain = all(one.is_floating_point() and not is_share(one) for one in group["params"])
        if not settled and plain:
            group["fused"] = True
    return optimizer


def mixed(optimizer: Optimizer) -> bool:
    """Whether it updates sharded and replicated weights."""
    return len({is_share(one) for one in weights(optimizer)}) == 2


@contextmanager
def one_by_one(optimizer: Optimizer) -> Iterator[None]:
    """Within the block it updates each weight by itself, if it has two kinds of them."""
    groups = [group for group in optimizer.param_groups if "foreach" in group] if mixed(optimizer) else []
    chosen = [group["foreach"] for group in groups]
    for group in groups:
        group["foreach"] = False
    try:
        yield
    finally:
        for group, before in zip(groups, chosen, strict=True):
            group["foreach"] = before
