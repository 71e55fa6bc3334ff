# SPDX-License-Identifier: Apache-2.0
"""What a diffusion transformer over mel frames is made of. Modules carry the names they have in published weights."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from tts_align.models.flow.token_flow import time_sinusoids


class TimeEmbedding(nn.Module):
    """Time -> what the blocks are told of it.

    Args:
        channels: sinusoids.
        dim: that go out.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.channels = channels

    def forward(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b c"]:
        """Embed a time in [0, 1]."""
        weight: Tensor = self.time_mlp[0].weight  # type: ignore[assignment]
        return self.time_mlp(time_sinusoids(time, self.channels).to(weight.dtype))


class ConvolvedPositions(nn.Module):
    """Two convolutions that read the past only: how a frame knows where it is.

    Args:
        dim: width.
        kernel: frames that each reads.
        groups: of channels that do not see each other.
    """

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.past = kernel - 1
        self.conv1 = nn.Sequential(nn.Conv1d(dim, dim, kernel, groups=groups), nn.Mish())
        self.conv2 = nn.Sequential(nn.Conv1d(dim, dim, kernel, groups=groups), nn.Mish())

    def forward(self, vectors: Float[Tensor, "b f c"]) -> Float[Tensor, "b f c"]:
        """Before the first frame there is zero."""
        # :: (b, f, c) -> (b, c, f), and back at the end
        hidden = vectors.transpose(1, 2)
        for layer in (self.conv1, self.conv2):
            hidden = layer(functional.pad(hidden, (self.past, 0)))
        return hidden.transpose(1, 2)


class InputEmbedding(nn.Module):
    """Noisy frames and what is known of them -> vectors.

    Args:
        channels: all that comes in.
        dim: that go out.
        kernel: of the convolutions.
        groups: of the convolutions.
    """

    def __init__(self, channels: int, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, dim)
        self.conv_pos_embed = ConvolvedPositions(dim, kernel, groups)

    def forward(self, frames: Float[Tensor, "b f k"]) -> Float[Tensor, "b f c"]:
        """Embed."""
        vectors = self.proj(frames)
        return self.conv_pos_embed(vectors) + vectors


class Rotary(nn.Module):
    """Angles of the rotary positions (arXiv 2104.09864).

    Args:
        head_dim: channels that turn, in pairs of neighbours.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))

    def forward(self, length: int) -> Float[Tensor, "f k"]:
        """Angle of each pair at each position, in float32."""
        position = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
        return position[:, None] * self.inv_freq.float()


def rotate(vectors: Float[Tensor, "*b f c"], angle: Float[Tensor, "f k"]) -> Float[Tensor, "*b f c"]:
    """Turn each pair of channels (2 k, 2 k + 1) by its angle."""
    cosine, sine = angle.cos().to(vectors.dtype), angle.sin().to(vectors.dtype)
    even, odd = vectors[..., 0::2], vectors[..., 1::2]
    # :: (*b, f, k, 2) -> (*b, f, 2 * k)
    return torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1).flatten(-2)


class Attention(nn.Module):
    """Self-attention of both published flows: without positions, or of which only the first head knows them.

    The reward model's attention reads a memory under names of its own, and the conformer's knows distances: they share
    no more with this one than PyTorch's own function.

    Args:
        dim: width.
        heads: attention heads.
        head_dim: channels of each.
        dropout: behind the output, in training only.
        bias: of queries, keys and values.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_k = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_v = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim), nn.Dropout(dropout))

    def forward(
        self,
        vectors: Float[Tensor, "b f c"],
        angle: Float[Tensor, "f k"] | None,
        visible: Bool[Tensor, "b f f"],
        mask: Bool[Tensor, "b f"] | None = None,
    ) -> Float[Tensor, "b f c"]:
        """Attend.

        Args:
            vectors: what asks and is asked.
            angle: of :class:`Rotary`; ``None`` for no positions.
            visible: which frames each frame sees, at least one.
            mask: which frames are real; the others get 0.
        """
        # :: (b, f, n * d) -> (b, n, f, d)
        query, key, value = (
            layer(vectors).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        if angle is not None:
            query, key = (torch.cat((rotate(x[:, :1], angle), x[:, 1:]), 1) for x in (query, key))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None])
        out = self.to_out(mixed.transpose(1, 2).flatten(2))  # :: (b, n, f, d) -> (b, f, n * d)
        return out if mask is None else out * mask[..., None]


class FeedForward(nn.Module):
    """Out to a wider space and back.

    Version 2's flow has two of its own: names of weights and activations in the published files differ.

    Args:
        dim: channels outside.
        hidden: channels inside.
        dropout: inside, in training only.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        widen = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"))
        self.ff = nn.Sequential(widen, nn.Dropout(dropout), nn.Linear(hidden, dim))

    def forward(self, vectors: Float[Tensor, "b f c"]) -> Float[Tensor, "b f c"]:
        """Each frame by itself."""
        return self.ff(vectors)


class Modulation(nn.Module):
    """Time -> scales, shifts and gates.

    Args:
        dim: width of the time and of each of them.
        parts: how many.
    """

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, parts * dim)
        self.parts = parts

    def forward(self, time: Float[Tensor, "b c"]) -> tuple[Float[Tensor, "b 1 c"], ...]:
        """The parts, each for all frames."""
        return self.linear(functional.silu(time))[:, None].chunk(self.parts, -1)


def modulate(
    vectors: Float[Tensor, "b f c"], scale: Float[Tensor, "b 1 c"], shift: Float[Tensor, "b 1 c"]
) -> Float[Tensor, "b f c"]:
    """Normalise over channels, then scale and shift."""
    return functional.layer_norm(vectors, vectors.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Attention and feed-forward, each modulated by the time before and gated by it behind.

    A new block starts with everything gated off (adaLN-Zero), so that a new transformer of any depth trains.

    Args:
        dim: width.
        heads: attention heads.
        head_dim: channels of each.
        hidden: width inside the feed-forward layers.
        dropout: behind attention and inside the feed-forward layers, in training only.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attn_norm = Modulation(dim, 6)
        self.attn = Attention(dim, heads, head_dim, dropout)
        self.ff = FeedForward(dim, hidden, dropout)
        nn.init.zeros_(self.attn_norm.linear.weight)
        nn.init.zeros_(self.attn_norm.linear.bias)

    def forward(
        self,
        vectors: Float[Tensor, "b f c"],
        time: Float[Tensor, "b c"],
        angle: Float[Tensor, "f k"],
        visible: Bool[Tensor, "b f f"],
        mask: Bool[Tensor, "b f"],
    ) -> Float[Tensor, "b f c"]:
        """See :class:`Attention`; ``time`` is embedded."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.attn_norm(time)
        vectors = vectors + gate * self.attn(modulate(vectors, scale, shift), angle, visible, mask)
        return vectors + gate_ff * self.ff(modulate(vectors, scale_ff, shift_ff))
