# SPDX-License-Identifier: Apache-2.0
"""Weights as decoding multiplies by them: joined, adapters merged, and in the number format that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tts_align.models.policy.backbone import Block, Turn
from tts_align.models.policy.kernels import rms_norm, rotate

Matrix = Callable[[Tensor], Tensor]
"""A linear layer: vectors (b, i) to vectors (b, o)."""


def half_type(name: str) -> torch.dtype | None:
    """The type of a format that halves what keys, values and products take; ``None`` for the others."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)


def matrix(layers: Sequence[nn.Module], name: str) -> Matrix:
    """One linear layer that gives the outputs of several ones side by side.

    Args:
        layers: of the same inputs; adapters of theirs that are on are merged.
        name: number format: own (as the weights are stored), bfloat16, float16, or int8 (on a CPU).

    Raises:
        ValueError: int8 elsewhere than on a CPU.
    """
    parts = [_merged(layer) for layer in layers]
    weight = parts[0][0] if len(parts) == 1 else torch.cat([weight for weight, _ in parts])
    biases = [weight.new_zeros(len(one)) if bias is None else bias for one, bias in parts]
    bias = torch.cat(biases) if any(bias is not None for _, bias in parts) else None
    if half := half_type(name):
        return _Half(weight.to(half), None if bias is None else bias.to(half))
    if name == "int8":
        if weight.device.type != "cpu":
            raise ValueError(f"model.sampling.weights: int8 is for a CPU, got {weight.device}: use own, or bfloat16")
        return _Int8.of(weight, bias)
    return _Own(weight, bias)


def _merged(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, with its adapter if that is on."""
    if not hasattr(layer, "get_delta_weight"):
        return layer.weight, layer.bias  # type: ignore[return-value]
    base: nn.Linear = layer.base_layer  # type: ignore[assignment]
    if layer.disable_adapters:
        return base.weight, base.bias
    # In float32, as a small update would vanish in a coarser weight.
    delta: Tensor = layer.get_delta_weight("policy")  # type: ignore[operator]
    return (base.weight.float() + delta.float()).to(base.weight.dtype), base.bias


@dataclass(frozen=True)
class _Own:
    """Weights as they are stored."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, vectors: Tensor) -> Tensor:
        return functional.linear(vectors, self.weight, self.bias)


@dataclass(frozen=True)
class _Half:
    """Weights and products in half precision; what comes out is as wide as what came in."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, vectors: Tensor) -> Tensor:
        return functional.linear(vectors.to(self.weight.dtype), self.weight, self.bias).to(vectors.dtype)


@dataclass(frozen=True)
class _Int8:
    """Weights in 8 bits with a scale for each output, inputs in 8 bits with a scale for each vector.

    Args:
        weight: (i, o), transposed as the product wants it.
        scale: of each output.
        bias: of each output.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None) -> _Int8:
        """Round weights, each output by its largest."""
        weight = weight.float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return cls((weight / scale[:, None]).round().to(torch.int8).t(), scale, bias)

    def __call__(self, vectors: Tensor) -> Tensor:
        wide = vectors.float()
        scale = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        product = torch._int_mm((wide / scale).round().to(torch.int8), self.weight)
        out = product.to(torch.float32).mul_(scale).mul_(self.scale)
        return (out if self.bias is None else out.add_(self.bias)).to(vectors.dtype)


@dataclass(frozen=True)
class LayerMatrices:
    """One layer of the backbone, for one position of each utterance at a time.

    Args:
        block: whose weights they are; its norms are read.
        joint: queries, keys and values side by side.
        out: behind attention.
        gate: of the feed-forward layer.
        up: likewise.
        down: likewise.
        value_width: outputs of ``joint`` that are values.
    """

    block: Block
    joint: Matrix
    out: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    value_width: int

    def project(self, hidden: Float[Tensor, "b h"], turn: Turn) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys (b, n + k, d), and values (b, k, d)."""
        norm = self.block.input_layernorm
        joint = self.joint(rms_norm(hidden, norm.weight, norm.variance_epsilon))
        both, value = joint.split([joint.shape[1] - self.value_width, self.value_width], 1)
        channels = self.block.self_attn.head_dim
        # :: (b, (n + k) * d) -> (b, n + k, d)
        return rotate(both.unflatten(1, (-1, channels)), turn.cosine, turn.sine), value.unflatten(1, (-1, channels))

    def combine(self, hidden: Float[Tensor, "b h"], mixed: Float[Tensor, "b w"]) -> Float[Tensor, "b h"]:
        """Add what attention has read and what the feed-forward layer makes of it."""
        hidden = hidden + self.out(mixed.to(hidden.dtype))
        norm = self.block.post_attention_layernorm
        normed = rms_norm(hidden, norm.weight, norm.variance_epsilon)
        return hidden + self.down(functional.silu(self.gate(normed)).mul_(self.up(normed)))


def layer_matrices(block: Block, name: str) -> LayerMatrices:
    """The weights of a block in a number format; see :func:`matrix`."""
    attention, mlp = block.self_attn, block.mlp
    joint = (attention.q_proj, attention.k_proj, attention.v_proj)
    return LayerMatrices(
        block,
        matrix(joint, name),
        matrix([attention.o_proj], name),
        matrix([mlp.gate_proj], name),
        matrix([mlp.up_proj], name),
        matrix([mlp.down_proj], name),
        value_width=attention.v_proj.out_features,
    )
