# SPDX-License-Identifier: Apache-2.0
"""Layers of the reward model: masked pre-norm transformer blocks, a text decoder, attention pooling, and what they say.

Nothing here lets a padded position reach a real one, and every dropout acts in training mode only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tts_align.models.reward.config import END, UNKNOWN, Attribute, mos_bin


def visible(mask: Bool[Tensor, "r s"]) -> Bool[Tensor, "r s"]:
    """What is attended to: the real positions, or the first one of a row without any, so that no softmax is empty."""
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return mask | (first & ~mask.any(-1, keepdim=True))


def sinusoids(length: int, like: Float[Tensor, "r _ h"]) -> Float[Tensor, "length h"]:
    """Sines and cosines of the position at wavelengths from 2 pi to 20000 pi (arXiv 1706.03762)."""
    half = like.shape[-1] // 2
    # In float32 whatever the default type is: in bfloat16 a quarter of 512 positions would be another's.
    frequency = torch.arange(half, device=like.device, dtype=torch.float32)
    rates = torch.exp(frequency * (-math.log(1e4) / max(half - 1, 1)))
    angles = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * rates  # :: (length, h / 2)
    return torch.cat([angles.sin(), angles.cos()], -1).to(like.dtype)


def soft_lookup(tokens: Float[Tensor, "*r c"], table: Float[Tensor, "c h"]) -> Float[Tensor, "*r h"]:
    """Mixed rows of a table; of an exact one-hot exactly its row, because every other product is 0.

    So the product must not be left to TF32 or to autocast, which would round the table.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(tokens.device.type, enabled=False):
            return tokens.to(table.dtype) @ table
    finally:
        torch.set_float32_matmul_precision(before)


def log_softmax(logits: Float[Tensor, "*r k"]) -> Float[Tensor, "*r k"]:
    """Log-probabilities, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def target_logp(logp: Float[Tensor, "*r k"], target: Int[Tensor, "*r"], smoothing: float = 0.0) -> Float[Tensor, "*r"]:
    """Log-probability of each target; a share ``smoothing`` of the target is spread over all classes."""
    chosen = logp.gather(-1, target[..., None])[..., 0]
    return chosen if smoothing == 0 else (1 - smoothing) * chosen + smoothing * logp.mean(-1)


class Attention(nn.Module):
    """Multi-head attention.

    Args:
        width: of the vectors.
        heads: number of heads.
        dropout: of attention weights.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, hidden: Float[Tensor, "r q h"], memory: Float[Tensor, "r l h"], mask: Bool[Tensor, "#r 1 #q l"]
    ) -> Float[Tensor, "r q h"]:
        """Mix ``memory`` for each position of ``hidden``, where ``mask`` is ``True``."""
        query = self._split(self.query(hidden))
        key, value = (self._split(part) for part in self.key_value(memory).chunk(2, -1))
        share = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, mask, dropout_p=share)
        # :: (r, n, q, d) -> (r, q, n * d)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, vectors: Tensor) -> Tensor:
        # :: (r, s, n * d) -> (r, n, s, d)
        return vectors.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block: attention to itself, optionally to a memory, and a feed-forward layer.

    Args:
        width: of the vectors.
        heads: attention heads.
        feed_forward: width inside the feed-forward layer.
        dropout: of attention weights and of what each layer adds.
        reads_memory: whether it attends to a memory.
    """

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float, reads_memory: bool = False) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.memory_attention = Attention(width, heads, dropout) if reads_memory else None
        self.memory_norm = nn.LayerNorm(width) if reads_memory else None
        inner = nn.Linear(width, feed_forward), nn.GELU(), nn.Dropout(dropout), nn.Linear(feed_forward, width)
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), *inner)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Float[Tensor, "r q h"],
        mask: Bool[Tensor, "#r 1 #q q"],
        memory: Float[Tensor, "r s h"] | None = None,
        memory_mask: Bool[Tensor, "r 1 1 s"] | None = None,
    ) -> Float[Tensor, "r q h"]:
        """Refine ``hidden``; masks say what may be attended to."""
        normed = self.attention_norm(hidden)
        hidden = hidden + self.dropout(self.attention(normed, normed, mask))
        if self.memory_attention is not None and self.memory_norm is not None:
            hidden = hidden + self.dropout(self.memory_attention(self.memory_norm(hidden), memory, memory_mask))
        return hidden + self.dropout(self.feed_forward(hidden))


class TextDecoder(nn.Module):
    """Predicts each text token from those before it and from the speech.

    Args:
        vocabulary: text ids k.
        width: of the vectors.
        heads: attention heads.
        feed_forward: width inside the feed-forward layers.
        layers: number of blocks.
        dropout: in training.
    """

    def __init__(self, vocabulary: int, width: int, heads: int, feed_forward: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, feed_forward, dropout, True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(
        self, hidden: Float[Tensor, "r s h"], mask: Bool[Tensor, "r s"], text: Int[Tensor, "r n"]
    ) -> Float[Tensor, "r n_plus_1 k"]:
        """Log-probabilities of every next token: after the start, and after each token of ``text``."""
        inputs = self.embedding(functional.pad(text, (1, 0), value=END))
        length = inputs.shape[1]
        causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=text.device).tril()
        state = inputs + sinusoids(length, inputs)
        for block in self.blocks:
            state = block(state, causal, hidden, visible(mask)[:, None, None])
        return log_softmax(self.head(self.norm(state)))


class PooledHead(nn.Module):
    """Attention pooling over an utterance, then a linear layer.

    Args:
        width: of the vectors.
        outputs: how many numbers are predicted.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.attention, self.head = nn.Linear(width, 1), nn.Linear(width, outputs)

    def forward(self, hidden: Float[Tensor, "r s h"], mask: Bool[Tensor, "r s"]) -> Float[Tensor, "r e"]:
        """Logits of each row, in float32 at least."""
        scores = self.attention(hidden)[..., 0].masked_fill(~visible(mask), -torch.inf)
        pooled = (scores.softmax(-1)[..., None] * hidden).sum(1)
        logits = self.head(pooled)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def ctc_logp(
    log_probs: Float[Tensor, "r s k"],
    mask: Bool[Tensor, "r s"],
    text: Int[Tensor, "r n"],
    text_mask: Bool[Tensor, "r n"],
    known: tuple[Sequence[int], Sequence[int]] | None = None,
) -> tuple[Float[Tensor, " r"], Bool[Tensor, " r"]]:
    """Exact log P(text | speech), summed over alignments, and whether the speech is long enough for any.

    Where it is not, the log-probability is given as 0 and has no gradient.

    Args:
        log_probs: of blank, unknown and characters at each position.
        mask: which positions are real.
        text: ids.
        text_mask: which are real.
        known: the lengths of speech and text where they are known on the CPU; otherwise a device is waited for.
    """
    lengths, counts = mask.sum(-1), text_mask.sum(-1)
    # Between equal neighbours a blank is needed.
    repeats = ((text[:, 1:] == text[:, :-1]) & text_mask[:, 1:]).sum(-1)
    possible = (counts + repeats).clamp(min=1) <= lengths
    targets = functional.pad(text.where(text_mask, UNKNOWN), (0, 1), value=UNKNOWN)
    frames, letters = (lengths, counts) if known is None else map(list, known)
    losses = functional.ctc_loss(
        log_probs.transpose(0, 1),  # :: (r, s, k) -> (s, r, k)
        targets,
        frames,  # type: ignore[arg-type]  # plain numbers serve as well
        letters,  # type: ignore[arg-type]
        blank=END,
        reduction="none",
        zero_infinity=True,
    )
    return torch.where(possible, -losses, 0.0), possible


def attribute_logp(
    attribute: Attribute, logits: Float[Tensor, "r e"], target: Tensor, smoothing: float = 0.0
) -> Float[Tensor, " r"]:
    """Log-probability of each row's label, summed over events; of a regression the negative squared error.

    Args:
        attribute: which.
        logits: of its head.
        target: labels as in :class:`~tts_align.models.base.reward_records.AttributeLabels`, none of them missing.
        smoothing: share of each target that is spread over all classes.
    """
    if attribute.kind == "regression":
        return -((logits[:, 0] - (target - attribute.centre) / attribute.spread) ** 2)
    if attribute.kind == "events":
        wanted = target.to(logits) * (1 - smoothing) + smoothing / 2
        return -functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(-1)
    return target_logp(log_softmax(logits), mos_bin(target) if attribute.kind == "mos" else target, smoothing)
