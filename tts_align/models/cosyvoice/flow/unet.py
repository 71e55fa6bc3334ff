# SPDX-License-Identifier: Apache-2.0
"""CosyVoice2's velocity field: a U-Net of one level over mel frames whose convolutions read the past only.

Vectors keep their channels last throughout; only the convolutions turn them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from tts_align.models.flow.dit_layers import Attention
from tts_align.models.flow.token_flow import chunk_mask, time_sinusoids


class CausalConv(nn.Conv1d):
    """A convolution that reads the past only.

    Args:
        channels: that come in.
        out_channels: that go out.
        kernel_size: frames it reads.
    """

    def __init__(self, channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__(channels, out_channels, kernel_size)

    def forward(self, vectors: Float[Tensor, "b f c"]) -> Float[Tensor, "b f d"]:
        """Before the first frame there is zero."""
        # :: (b, f, c) -> (b, c, f), and back at the end
        past = functional.pad(vectors.transpose(1, 2), (self.kernel_size[0] - 1, 0))
        return super().forward(past).transpose(1, 2)


class CausalBlock(nn.Module):
    """Convolution, normalisation over channels, Mish.

    Args:
        channels: that come in.
        out_channels: that go out.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        # In the published model the second entry is a transposition.
        self.block = nn.Sequential(
            CausalConv(channels, out_channels), nn.Identity(), nn.LayerNorm(out_channels), nn.Mish()
        )

    def forward(self, vectors: Float[Tensor, "b f c"], mask: Bool[Tensor, "b f 1"]) -> Float[Tensor, "b f d"]:
        """Frames outside the mask are neither read nor written."""
        return self.block(vectors * mask) * mask


class ResNet(nn.Module):
    """Two blocks with the time added between them, and a straight way around.

    Args:
        channels: that come in.
        out_channels: that go out.
        time_channels: of the embedded time.
    """

    def __init__(self, channels: int, out_channels: int, time_channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_channels, out_channels))
        self.block1 = CausalBlock(channels, out_channels)
        self.block2 = CausalBlock(out_channels, out_channels)
        self.res_conv = CausalConv(channels, out_channels, 1)

    def forward(
        self, vectors: Float[Tensor, "b f c"], mask: Bool[Tensor, "b f 1"], time: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b f d"]:
        """Transform the frames inside the mask."""
        hidden = self.block1(vectors, mask) + self.mlp(time)[:, None]
        return self.block2(hidden, mask) + self.res_conv(vectors * mask)


class GELULinear(nn.Module):
    """A linear layer and GELU.

    Args:
        channels: that come in.
        out_channels: that go out.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, out_channels)

    def forward(self, vectors: Float[Tensor, "b f c"]) -> Float[Tensor, "b f d"]:
        """Each frame by itself."""
        return functional.gelu(self.proj(vectors))


class FeedForward(nn.Module):
    """Out to a wider space and back; its weights have other names in the published files than those of version 3.

    Args:
        channels: outside.
        hidden: channels inside.
        dropout: inside, in training only.
    """

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(GELULinear(channels, hidden), nn.Dropout(dropout), nn.Linear(hidden, channels))

    def forward(self, vectors: Float[Tensor, "b f c"]) -> Float[Tensor, "b f c"]:
        """Each frame by itself."""
        return self.net(vectors)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normalised before and added to what it read.

    Args:
        channels: width.
        heads: attention heads.
        head_channels: of each head.
        hidden: channels inside the feed-forward part.
        dropout: inside the feed-forward part, in training only.
    """

    def __init__(self, channels: int, heads: int, head_channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, head_channels, dropout=0.0, bias=False)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, hidden, dropout)

    def forward(self, vectors: Float[Tensor, "b f c"], visible: Bool[Tensor, "b f f"]) -> Float[Tensor, "b f c"]:
        """See :class:`Attention`."""
        vectors = vectors + self.attn1(self.norm1(vectors), None, visible)
        return vectors + self.ff(self.norm3(vectors))


class TimeMLP(nn.Module):
    """Time -> what the blocks are told of it.

    Args:
        channels: of the sinusoids.
        out_channels: that go out.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b c"]:
        """Embed a time in [0, 1]."""
        sinusoids = time_sinusoids(time, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(functional.silu(self.linear_1(sinusoids)))


class Level(nn.ModuleList):
    """A residual block, transformer blocks, and possibly a convolution: published as entries of a list.

    Args:
        resnet: the residual block.
        transformers: the transformer blocks.
        conv: the convolution that ends the way down and the way up.
    """

    def __init__(self, resnet: ResNet, transformers: nn.ModuleList, conv: CausalConv | None = None) -> None:
        super().__init__((resnet, transformers) if conv is None else (resnet, transformers, conv))

    def forward(
        self,
        vectors: Float[Tensor, "b f c"],
        mask: Bool[Tensor, "b f 1"],
        time: Float[Tensor, "b k"],
        visible: Bool[Tensor, "b f f"],
    ) -> Float[Tensor, "b f d"]:
        """Everything but the convolution."""
        vectors = self[0](vectors, mask, time)
        for block in self[1].children():
            vectors = block(vectors, visible)
        return vectors


class CausalUNet(nn.Module):
    """Velocity of noisy mel frames, given what they should become.

    Args:
        mel: mel channels of each input: noisy frames, their mean, the speaker and the known frames.
        channels: width.
        time_channels: of the embedded time.
        blocks: transformer blocks of each level.
        mid_blocks: levels between the way down and the way up.
        heads: attention heads.
        head_channels: of each head.
        hidden: width inside the feed-forward parts.
        chunk: frames of a chunk, which streaming attention does not look beyond.
        dropout: inside the feed-forward parts, in training only.
    """

    def __init__(
        self,
        mel: int = 80,
        channels: int = 256,
        time_channels: int = 1024,
        blocks: int = 4,
        mid_blocks: int = 12,
        heads: int = 8,
        head_channels: int = 64,
        hidden: int = 1024,
        chunk: int = 50,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()

        def level(channels_in: int, conv: bool) -> Level:
            transformers = nn.ModuleList(
                TransformerBlock(channels, heads, head_channels, hidden, dropout) for _ in range(blocks)
            )
            resnet = ResNet(channels_in, channels, time_channels)
            return Level(resnet, transformers, CausalConv(channels, channels) if conv else None)

        self.chunk = chunk
        self.time_mlp = TimeMLP(4 * mel, time_channels)
        self.down_blocks = nn.ModuleList([level(4 * mel, conv=True)])
        self.mid_blocks = nn.ModuleList(level(channels, conv=False) for _ in range(mid_blocks))
        self.up_blocks = nn.ModuleList([level(2 * channels, conv=True)])
        self.final_block = CausalBlock(channels, channels)
        self.final_proj = CausalConv(channels, mel, 1)

    def forward(
        self,
        noisy: Float[Tensor, "b f m"],
        mean: Float[Tensor, "b f m"],
        speaker: Float[Tensor, "b m"],
        known: Float[Tensor, "b f m"],
        time: Float[Tensor, " b"],
        mask: Bool[Tensor, "b f"],
        streaming: bool = False,
    ) -> Float[Tensor, "b f m"]:
        """Velocity, 0 outside the mask.

        Args:
            noisy: frames on the way from noise to mel.
            mean: what the speech tokens say of each frame.
            speaker: projected speaker vector.
            known: mel of the frames that are given, 0 elsewhere.
            time: how far on the way, 0 noise to 1 mel.
            mask: which frames are real.
            streaming: attention does not look beyond a frame's own chunk.
        """
        visible = chunk_mask(mask, self.chunk if streaming else None)
        real = mask[..., None]
        embedded = self.time_mlp(time)
        vectors = torch.cat((noisy, mean, speaker[:, None].expand_as(mean), known), -1)
        down, up = self.down_blocks[0], self.up_blocks[0]
        skip = down(vectors, real, embedded, visible)
        vectors = down[2](skip * real)  # type: ignore[index]
        for level in self.mid_blocks:
            vectors = level(vectors, real, embedded, visible)
        vectors = up(torch.cat((vectors, skip), -1), real, embedded, visible)
        vectors = up[2](vectors * real)  # type: ignore[index]
        return self.final_proj(self.final_block(vectors, real)) * real
