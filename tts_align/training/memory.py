# SPDX-License-Identifier: Apache-2.0
"""How much memory a training will need beyond what it holds before its first step, and whether the device has it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tts_align.models.policy.backbone import Backbone

STATES = {
    **dict.fromkeys(("AdamW", "Adam", "NAdam", "RAdam", "Adamax"), 2),
    **dict.fromkeys(("RMSprop", "Adagrad", "Lion"), 1),
    **dict.fromkeys(("SGD", "Adafactor"), 0),
}
"""Numbers that an optimiser keeps for each weight; two for those that are not known."""
_OF_LOGITS = 4
"""Tensors of the logits' size beside them where an objective uses whole distributions: the reference's, the gradient,
and two of the divergence or the sample."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Args:
        gradients: of all weights that train.
        optimizer: states of the optimiser.
        activations: what the policy's layers keep for the backward pass of the largest micro-batch, and work space.
        logits: scores of its targets, and what the objective makes of them.
        tokens: positions of the largest micro-batch.
        recomputed: what the activations would be with ``recompute``; the same as ``activations`` if it is on.
    """

    gradients: int
    optimizer: int
    activations: int
    logits: int
    tokens: int
    recomputed: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.optimizer + self.activations + self.logits

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("gradients", "optimizer", "activations", "logits")}
        listed = ", ".join(f"{name} {gigabytes(value)}" for name, value in parts.items())
        return f"about {gigabytes(self.total)} beside the weights ({listed}; {self.tokens:,} tokens at once)"

    def advice(self, available: int) -> str:
        """What to change so that it fits into the available bytes; empty if it fits."""
        if self.total <= available:
            return ""
        found = []
        if self.activations + self.logits > 0.2 * self.total:
            found.append("lower data.tokens_per_micro_batch or raise trainer.accumulate_grad_batches")
        if self.activations - self.recomputed > 0.1 * self.total:
            saved = gigabytes(self.activations - self.recomputed)
            found.append(f"set model.policy.init_args.recompute, which saves {saved} and costs a third more time")
        if self.gradients + self.optimizer > 0.5 * available:
            found.append("train adapters (recipes/lora.yaml) or share the weights (recipes/strategy/fsdp.yaml)")
        return f"only {gigabytes(available)} are free: {'; '.join(found)}"


def gigabytes(count: int) -> str:
    """Bytes for people.

    >>> gigabytes(2_340_000_000), gigabytes(12_300_000)
    ('2.3 GB', '12 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def estimate(
    policy: nn.Module,
    trained: Iterable[nn.Parameter],
    optimizers: Iterable[Optimizer],
    tokens: int,
    wants_logits: bool = False,
    half: bool = False,
    copies: int = 1,
) -> MemoryEstimate | None:
    """Estimate what training needs beside the weights; ``None`` for a policy whose layers are not known here.

    Args:
        policy: scores the rows.
        trained: weights that train.
        optimizers: what updates them; states that are there already are not counted again.
        tokens: positions of the largest micro-batch, all of them counted as scored.
        wants_logits: the objective uses whole distributions.
        half: products are computed in half precision.
        copies: of the gradients; 2 where a strategy keeps buckets of them.
    """
    backbone, head = getattr(policy, "backbone", None), getattr(policy, "llm_decoder", None)
    if not isinstance(backbone, Backbone) or not isinstance(head, nn.Linear):
        return None
    kept = {True: _kept(backbone, tokens, half, True), False: _kept(backbone, tokens, half, False)}
    logits = tokens * head.out_features * (2 if half else 4)
    if wants_logits:
        logits += _OF_LOGITS * tokens * head.out_features * 4
    return MemoryEstimate(
        gradients=copies * sum(map(_bytes, trained)),
        optimizer=sum(_missing_states(one) for one in optimizers),
        activations=kept[backbone.recompute],
        logits=logits,
        tokens=tokens,
        recomputed=kept[True],
    )


def _kept(backbone: Backbone, tokens: int, half: bool, recompute: bool) -> int:
    """Bytes that the layers keep, and that the backward pass of one of them works with."""
    config = backbone.config
    hidden, inner, narrow = config.hidden_size, config.intermediate_size, 2 if half else 4
    heads = config.num_key_value_heads or config.num_attention_heads
    shared = 2 * heads * (hidden // config.num_attention_heads)  # keys and values
    # Inputs of both norms and what they give; queries, what was read, in pieces and as one; four of the feed-forward.
    attention = 2 * hidden * 4 + (3 * hidden + shared) * narrow
    feed = 2 * hidden * 4 + 4 * inner * narrow
    work = (2 * hidden * 4 + 3 * inner * narrow) * tokens
    each = (attention + feed) * tokens
    layers = config.num_hidden_layers
    if recompute:
        return layers * hidden * 4 * tokens + each + work
    return layers * each + work


def _missing_states(optimizer: Optimizer) -> int:
    """Bytes of an optimiser's states that are not there yet."""
    found = 0
    for group in optimizer.param_groups:
        count = STATES.get(type(optimizer).__name__, 2)
        if type(optimizer).__name__ in ("SGD", "RMSprop") and group.get("momentum"):
            count += 1
        count += bool(group.get("amsgrad"))
        for weight in group["params"]:
            there = [one for one in optimizer.state.get(weight, {}).values() if isinstance(one, Tensor) and one.ndim]
            found += 0 if there else count * _bytes(weight)
    return found


def _bytes(weight: Tensor) -> int:
    """Of this process's share of a weight."""
    share: Tensor = weight.to_local() if isinstance(weight, DTensor) else weight
    return share.nbytes


def available(device: torch.device) -> int | None:
    """Bytes that a training on this device may still take; ``None`` where that is not known."""
    if device.type == "cuda" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory() if device.type == "cpu" else None


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of the machine's memory that are free, or of this process's share of it if there is a limit.

    Args:
        root: of the file system.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        return None
    try:
        limit = (root / "sys/fs/cgroup/memory.max").read_text().strip()
        used = int((root / "sys/fs/cgroup/memory.current").read_text())
    except OSError:  # no group
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))
