# SPDX-License-Identifier: Apache-2.0
"""The Qwen2 transformer over rows without padding: transformers' weights, configuration and adapters, our forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)

from tts_align.models.policy.attention import Attend
from tts_align.models.policy.kernels import rms_norm, rotate


@dataclass(frozen=True)
class Turn:
    """Cosines and sines of the rotary positions, in float32.

    Args:
        cosine: of each position and pair of channels.
        sine: likewise.
    """

    cosine: Float[Tensor, "l k"]
    sine: Float[Tensor, "l k"]

    @classmethod
    def of(cls, position: Int[Tensor, " l"], frequency: Float[Tensor, " k"]) -> Turn:
        """Of positions, counted from 0."""
        angle = position[:, None].float() * frequency.float()
        return cls(angle.cos(), angle.sin())


class Block(Qwen2DecoderLayer):
    """One layer: attention inside each row, then the feed-forward layer, each on normalised inputs.

    What lies before and behind attention can be compiled; attention itself depends on the rows.
    """

    compiled = False

    def forward(  # type: ignore[override]  # flat rows instead of padded ones
        self, hidden: Float[Tensor, "l h"], turn: Turn, attend: Attend, kept: Int[Tensor, " m"] | None = None
    ) -> Float[Tensor, "m h"]:
        """Refine states.

        Args:
            hidden: states of all rows, one behind the other.
            turn: of their positions.
            attend: mixes values by queries and keys.
            kept: the states that are still wanted behind attention; all by default.
        """
        project, combine = (_project(), _combine()) if self.compiled else (Block.project, Block.combine)
        query, key, value = project(self, hidden, turn)
        mixed = attend(query, key, value)
        if kept is not None:
            hidden, mixed = hidden.index_select(0, kept), mixed.index_select(0, kept)
        return combine(self, hidden, mixed)

    def project(self, hidden: Float[Tensor, "l h"], turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (l, n, d) and keys (l, k, d), and values (l, k, d)."""
        normed = _normed(hidden, self.input_layernorm)
        layer = self.self_attn
        query, key, value = (
            one(normed).unflatten(-1, (-1, layer.head_dim))  # :: (l, n * d) -> (l, n, d)
            for one in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        return rotate(query, turn.cosine, turn.sine), rotate(key, turn.cosine, turn.sine), value

    def combine(self, hidden: Float[Tensor, "l h"], mixed: Float[Tensor, "l n d"]) -> Float[Tensor, "l h"]:
        """Add what attention has read and what the feed-forward layer makes of it."""
        hidden = hidden + self.self_attn.o_proj(mixed.flatten(1))  # :: (l, n, d) -> (l, n * d)
        normed = _normed(hidden, self.post_attention_layernorm)
        return hidden + self.mlp.down_proj(functional.silu(self.mlp.gate_proj(normed)) * self.mlp.up_proj(normed))


@cache
def _project() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """:meth:`Block.project`, compiled once for all layers and lengths."""
    return torch.compile(Block.project, dynamic=True)


@cache
def _combine() -> Callable[..., Tensor]:
    """:meth:`Block.combine`, likewise."""
    return torch.compile(Block.combine, dynamic=True)


def compile_blocks(backbone: Backbone) -> None:
    """Let the layers of a backbone run compiled (``torch.compile``); the first step of a process then takes longer."""
    for block in backbone.blocks:
        block.compiled = True


def _normed(hidden: Tensor, norm: Qwen2RMSNorm) -> Tensor:
    return rms_norm(hidden, norm.weight, norm.variance_epsilon)


class Backbone(Qwen2Model):
    """A stack of :class:`Block`.

    Names of weights, their initialisation, ``from_pretrained`` and adapters are those of transformers' ``Qwen2Model``.

    Args:
        config: sizes.
    """

    layers: nn.ModuleList

    def __init__(self, config: Qwen2Config) -> None:
        Qwen2PreTrainedModel.__init__(self, config)  # as Qwen2Model, but for the class of the layers
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = False
        self.recompute = False
        self.post_init()

    def forward(
        self,
        vectors: Float[Tensor, "l h"],
        position: Int[Tensor, " l"],
        attend: Attend,
        kept: Int[Tensor, " m"] | None = None,
    ) -> Float[Tensor, "m h"]:
        """States behind the last layer.

        Args:
            vectors: of the inputs of all rows, one behind the other.
            position: of each input in its row.
            attend: attention inside the rows.
            kept: positions whose states are wanted; the last layer computes little else.
        """
        turn, hidden = self.turn(position), vectors
        for block in self.blocks:
            wanted = kept if block is self.layers[-1] else None
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, turn, attend, wanted, use_reentrant=False)
            else:
                hidden = block(hidden, turn, attend, wanted)
        return _normed(hidden, self.norm)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The layers, in order."""
        return tuple(self.layers)  # type: ignore[arg-type]  # a ModuleList has no type of its own

    def turn(self, position: Int[Tensor, " l"]) -> Turn:
        """Rotation of positions."""
        return Turn.of(position, self.rotary_emb.inv_freq)
