# SPDX-License-Identifier: Apache-2.0
"""CosyVoice2's token encoder: a conformer that looks three tokens ahead and leaves twice as many frames.

Attention scores follow Transformer-XL (arXiv 1901.02860): ``((q + u) · k + (q + v) · p(i - j)) / sqrt(d)``.

The published code embeds padding as well, so that the look-ahead of a short utterance sees whatever its neighbours'
lengths made of it. Here padding is zero after the embedding too: what an utterance becomes depends on nothing but
itself. Alone, or among utterances of its length, it becomes exactly what the published code makes of it.

Axis letters beside those of :mod:`tts_align.models.flow.token_flow`: ``w`` width, ``q`` distances.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from tts_align.models.flow.token_flow import Lookahead, chunk_mask


def relative_positions(length: int, channels: int, device: torch.device | str | None = None) -> Float[Tensor, "q w"]:
    """Sinusoids of the distances i - j from length - 1 down to 1 - length.

    Args:
        length: number of positions.
        channels: width, even; the sine and the cosine of each of the channels / 2 frequencies stand side by side.
        device: where to compute them.

    Returns:
        One row for each of the 2 * length - 1 distances.
    """
    # In float64, as a float32 angle of a thousand is a ten-thousandth of a turn off, and on each processor another one.
    distance = torch.arange(length - 1, -length, -1, device=device, dtype=torch.float64)
    frequency = 10000 ** (-torch.arange(0, channels, 2, device=device, dtype=torch.float64) / channels)
    angle = distance[:, None] * frequency
    # :: (q, w / 2, 2) -> (q, w)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1).float()


def align_distances(scores: Float[Tensor, "*b s q"]) -> Float[Tensor, "*b s s"]:
    """Turn scores by distance into scores by key: entry (i, j) is what row i holds for the distance i - j.

    Args:
        scores: columns in the order of :func:`relative_positions`, q = 2 s - 1.
    """
    length = scores.shape[-2]
    # With one column more, strides of 2 s - 1 from entry (0, s - 1) on move the window one to the left per row.
    # :: (*b, s, q + 1) -> (*b, s * (q + 1)) -> (*b, s * q)
    flat = functional.pad(scores, (0, 1)).flatten(-2)[..., length - 1 : -1]
    # :: (*b, s * q) -> (*b, s, q) -> (*b, s, s)
    return flat.unflatten(-1, (length, 2 * length - 1))[..., :length]


class RelativeAttention(nn.Module):
    """Self-attention that knows how far apart two positions are.

    Args:
        width: channels, a multiple of ``heads``.
        heads: attention heads.
        dropout: of the attention weights, in training only.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, width // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(
        self, vectors: Float[Tensor, "b s w"], positions: Float[Tensor, "q w"], visible: Bool[Tensor, "b s s"]
    ) -> Float[Tensor, "b s w"]:
        """Attend.

        Args:
            vectors: what asks and is asked.
            positions: of :func:`relative_positions`.
            visible: which positions each position sees, at least one.
        """
        # :: (b, s, n * d) -> (b, s, n, d)
        query, key, value = (
            layer(vectors).unflatten(-1, (self.heads, -1)) for layer in (self.linear_q, self.linear_k, self.linear_v)
        )
        # :: (q, n * d) -> (q, n, d)
        distance = self.linear_pos(positions).unflatten(-1, (self.heads, -1))
        by_distance = torch.einsum("bshd,qhd->bhsq", query + self.pos_bias_v, distance)
        scale = query.shape[-1] ** -0.5
        bias = (align_distances(by_distance) * scale).masked_fill(~visible[:, None], float("-inf"))
        # :: (b, s, n, d) -> (b, n, s, d)
        mixed = functional.scaled_dot_product_attention(
            (query + self.pos_bias_u).transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
            scale=scale,
        )
        # :: (b, n, s, d) -> (b, s, n * d)
        return self.linear_out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with SiLU between them; the published files name them ``w_1`` and ``w_2``, hence a class apart.

    Args:
        width: channels outside.
        hidden: channels inside.
        dropout: after SiLU, in training only.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vectors: Float[Tensor, "b s w"]) -> Float[Tensor, "b s w"]:
        """Each position by itself."""
        return self.w_2(self.dropout(functional.silu(self.w_1(vectors))))


class ConformerBlock(nn.Module):
    """Attention and feed-forward, each normalised before and added to what it read; there is no convolution.

    Args:
        width: channels.
        heads: attention heads.
        hidden: channels inside the feed-forward part.
        dropout: inside the feed-forward part and after both parts, in training only.
        attention_dropout: of the attention weights, in training only.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(width, heads, attention_dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.norm_mha = nn.LayerNorm(width, eps=1e-12)
        self.norm_ff = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, vectors: Float[Tensor, "b s w"], positions: Float[Tensor, "q w"], visible: Bool[Tensor, "b s s"]
    ) -> Float[Tensor, "b s w"]:
        """See :class:`RelativeAttention`."""
        vectors = vectors + self.dropout(self.self_attn(self.norm_mha(vectors), positions, visible))
        return vectors + self.dropout(self.feed_forward(self.norm_ff(vectors)))


class ScaledInput(nn.Module):
    """Linear layer and normalisation, brought to the size that sinusoids once asked for.

    Args:
        channels: that come in.
        width: channels that go out; its root is the scale.
        dropout: before the scale, in training only.
        position_dropout: after the scale, where others add positions, in training only.
    """

    def __init__(self, channels: int, width: int, dropout: float, position_dropout: float) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(channels, width), nn.LayerNorm(width), nn.Dropout(dropout))
        self.position_dropout = nn.Dropout(position_dropout)
        self.scale = width**0.5

    def forward(self, vectors: Float[Tensor, "b s e"]) -> Float[Tensor, "b s w"]:
        """Each position by itself."""
        return self.position_dropout(self.out(vectors) * self.scale)


class Upsample(nn.Module):
    """Every vector several times, then a convolution that reads the past only.

    Args:
        channels: width.
        stride: frames per token.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(channels, channels, 2 * stride + 1)

    def forward(self, vectors: Float[Tensor, "b s w"]) -> Float[Tensor, "b f w"]:
        """Frames, f = s * stride."""
        # :: (b, s, w) -> (b, w, s * stride)
        frames = vectors.repeat_interleave(self.stride, 1).transpose(1, 2)
        # :: (b, w, f) -> (b, f, w)
        return self.conv(functional.pad(frames, (2 * self.stride, 0))).transpose(1, 2)


class UpsamplingConformer(nn.Module):
    """Vectors of tokens -> vectors of frames.

    Args:
        channels: width of the token vectors.
        width: width inside and of the frame vectors.
        heads: attention heads.
        hidden: width inside the feed-forward parts.
        blocks: at token rate.
        up_blocks: at frame rate.
        lookahead: how many tokens each token's frames depend on beyond it.
        chunk: tokens of a chunk, which streaming attention does not look beyond.
        stride: frames per token.
        dropout: of the embeddings and of what the blocks add, in training only.
        position_dropout: of the scaled embeddings and of the sinusoids, in training only.
        attention_dropout: of the attention weights, in training only.
    """

    def __init__(
        self,
        channels: int = 512,
        width: int = 512,
        heads: int = 8,
        hidden: int = 2048,
        blocks: int = 6,
        up_blocks: int = 4,
        lookahead: int = 3,
        chunk: int = 25,
        stride: int = 2,
        dropout: float = 0.1,
        position_dropout: float = 0.1,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ValueError(f"the encoder's width must be even and a multiple of its {heads} heads, got {width}")

        def blocks_of(count: int) -> nn.ModuleList:
            return nn.ModuleList(ConformerBlock(width, heads, hidden, dropout, attention_dropout) for _ in range(count))

        self.chunk, self.stride, self.lookahead = chunk, stride, lookahead
        self.embed = ScaledInput(channels, width, dropout, position_dropout)
        self.pre_lookahead_layer = Lookahead(width, width, lookahead)
        self.encoders = blocks_of(blocks)
        self.up_layer = Upsample(width, stride)
        self.up_embed = ScaledInput(width, width, dropout, position_dropout)
        self.up_encoders = blocks_of(up_blocks)
        self.position_dropout = nn.Dropout(position_dropout)
        self.after_norm = nn.LayerNorm(width)

    def forward(
        self,
        vectors: Float[Tensor, "b s e"],
        mask: Bool[Tensor, "b s"],
        streaming: bool = False,
        final: bool = True,
    ) -> Float[Tensor, "b f w"]:
        """Encode.

        Args:
            vectors: of the tokens, padded on the right.
            mask: which tokens are real.
            streaming: attention does not look beyond a token's own chunk.
            final: whether the utterance ends here. If not, the last ``lookahead`` tokens of each utterance are only
                looked at: f is then (s - lookahead) * stride.

        Returns:
            Vectors of the frames, 0 at padding.
        """
        # Zero again after the embedding, whose bias would let the look-ahead see padding.
        return self.encode_embedded(self.embed(vectors) * mask[..., None], mask, streaming, final)

    def encode_embedded(
        self, vectors: Float[Tensor, "b s w"], mask: Bool[Tensor, "b s"], streaming: bool, final: bool
    ) -> Float[Tensor, "b f w"]:
        """Everything after the embedding; see :meth:`forward`."""
        vectors = self.pre_lookahead_layer(vectors)
        if not final:
            vectors, mask = vectors[:, : vectors.shape[1] - self.lookahead], mask[:, self.lookahead :]
        vectors = self._run(self.encoders, vectors, chunk_mask(mask, self.chunk if streaming else None))
        frames = self.up_embed(self.up_layer(vectors))
        mask = mask.repeat_interleave(self.stride, 1)
        frames = self._run(self.up_encoders, frames, chunk_mask(mask, self.chunk * self.stride if streaming else None))
        return self.after_norm(frames) * mask[..., None]

    def _run(
        self, blocks: nn.ModuleList, vectors: Float[Tensor, "b s w"], visible: Bool[Tensor, "b s s"]
    ) -> Float[Tensor, "b s w"]:
        positions = relative_positions(vectors.shape[1], vectors.shape[2], vectors.device).to(vectors.dtype)
        positions = self.position_dropout(positions)
        for block in blocks:
            vectors = block(vectors, positions, visible)
        return vectors
