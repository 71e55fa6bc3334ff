# SPDX-License-Identifier: Apache-2.0
"""The speech tokenizer of CosyVoice2 (arXiv 2412.10117) and CosyVoice 3 (arXiv 2505.17589) as a model that trains.

Two strided convolutions bring log-mel frames of 10 ms to 25 positions a second; blocks of attention, each with a long
depth-wise convolution over its values as a memory (DFSMN, arXiv 1803.05030), look at all of them; what comes out is
projected down to a few numbers, rounded to a token, and projected up again. The published files end at the token: the
projection up is made here and learnt by whatever reads the tokens' embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from tts_align.models.base.tokenizer import Tokenised, TokenizerHead
from tts_align.models.codec.fsq import SHRINK, FiniteScalarQuantiser
from tts_align.models.cosyvoice.features import whisper_mel
from tts_align.models.cosyvoice.s3.files import S3Sizes, check_state, published_name, read_state, write_state

_THETA = 10000.0
_WINDOW_SAMPLES = 400


class MemoryAttention(nn.Module):
    """Attention with rotary positions, plus a depth-wise convolution over the values and the values themselves.

    Args:
        width: Channels.
        heads: Attention heads.
        kernel_size: Odd number of positions the convolution sees.
    """

    def __init__(self, width: int, heads: int, kernel_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.memory = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, groups=width, bias=False)

    def forward(
        self, hidden: Float[Tensor, "b s c"], mask: Bool[Tensor, "b s"], rotation: Float[Tensor, "2 s half"]
    ) -> Float[Tensor, "b s c"]:
        """What each position takes from those that `mask` marks.

        Args:
            hidden: One vector per position.
            mask: True at real positions.
            rotation: Cosine and sine of the positions, see `rotation_of`.
        """
        value = self.value(hidden)
        # :: (b, s, n * d) -> (b, s, n, d)
        query, key, by_head = (
            some.unflatten(-1, (self.heads, -1)) for some in (self.query(hidden), self.key(hidden), value)
        )
        # :: (b, s, n, d) -> (b, n, s, d)
        query, key = (rotate(some, rotation).transpose(1, 2) for some in (query, key))
        attended = functional.scaled_dot_product_attention(
            query, key, by_head.transpose(1, 2), attn_mask=mask[:, None, None]
        )
        real = mask[..., None]
        seen = value * real
        # :: (b, s, c) -> (b, c, s) -> (b, s, c)
        remembered = (self.memory(seen.transpose(1, 2)).transpose(1, 2) + seen) * real
        # :: (b, n, s, d) -> (b, s, n * d)
        return self.out(attended.transpose(1, 2).flatten(2)) + remembered


class S3Block(nn.Module):
    """Attention with memory, then a feed-forward layer, each on a normalised input and added to it.

    Args:
        width: Channels.
        heads: Attention heads.
        kernel_size: Positions the memory sees.
        widening: Width inside the feed-forward layer, in widths.
    """

    def __init__(self, width: int, heads: int, kernel_size: int, widening: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = MemoryAttention(width, heads, kernel_size)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, widening * width)
        self.narrow = nn.Linear(widening * width, width)

    def forward(
        self, hidden: Float[Tensor, "b s c"], mask: Bool[Tensor, "b s"], rotation: Float[Tensor, "2 s half"]
    ) -> Float[Tensor, "b s c"]:
        """Residual update; see `MemoryAttention`."""
        hidden = hidden + self.attention(self.attention_norm(hidden), mask, rotation)
        return hidden + self.narrow(functional.gelu(self.widen(self.norm(hidden))))


class S3Tokenizer(TokenizerHead):
    """Log-mel -> convolutions -> attention -> project down -> round -> index -> project up.

    `load` takes published weights. An utterance of f frames has ceil(ceil(f / 2) / 2) tokens, as the published file for
    single utterances gives them, while the one for batches leaves out a partly filled last token. The published models
    heard at most 30 s at once; `forward` takes more, at positions they have not seen, `encode` does not.

    Args:
        sizes: Sizes of all parts.
    """

    sample_rate = 16000
    max_seconds = 30.0
    batch_size = 8
    """Utterances that `encode` takes together; neighbours change nothing but the last bits of sums."""
    fresh: tuple[str, ...]
    """Parameters that no file held and that have to be learnt before the embedding says anything."""

    def __init__(self, sizes: S3Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.conv1 = nn.Conv1d(sizes.mel_channels, sizes.width, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(sizes.width, sizes.width, kernel_size=3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            S3Block(sizes.width, sizes.heads, sizes.kernel_size, sizes.widening) for _ in range(sizes.layers)
        )
        self.down = nn.Linear(sizes.width, len(sizes.levels))
        self.quantiser = FiniteScalarQuantiser(sizes.levels, SHRINK)
        self.up = nn.Linear(len(sizes.levels), sizes.embedding_channels)
        self.codebook_size, self.embedding_channels = self.quantiser.codebook_size, sizes.embedding_channels
        self.fresh = tuple(name for name, _ in self.named_parameters())

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Tensor],
        embedding_channels: int | None = None,
        heads: int | None = None,
        levels: Sequence[int] | None = None,
    ) -> S3Tokenizer:
        """A tokenizer with the weights of an S3 tokenizer of version 2 or 3; sizes follow from the weights.

        Args:
            source: A .safetensors or .pt file with the weights by their published names, as `save` writes it, or the
                weights themselves.
            embedding_channels: Width of the projection up, 512 if not given; a file of `save` brings its own.
            heads: Attention heads, if not one for every 64 channels as in the published models.
            levels: Levels of the quantiser, if not three in each dimension as in the published models.

        Returns:
            The tokenizer; its `fresh` names what had to be made new.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The weights are those of another model, or contradict the arguments.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state(source)
        model = cls(S3Sizes.of(state, embedding_channels, heads, levels))
        own = {name: published_name(name) for name in model.state_dict()}
        check_state(state, {own[name]: tuple(value.shape) for name, value in model.state_dict().items()})
        model.fresh = tuple(name for name, published in own.items() if published not in state)
        found = {name: state[published] for name, published in own.items() if published in state}
        model.load_state_dict(found, strict=False)
        return model

    def save(self, path: str | Path) -> None:
        """Write all weights by their published names, the projection up besides, into a .safetensors file."""
        write_state({published_name(name): value for name, value in self.state_dict().items()}, Path(path))

    def forward(self, log_mel: Float[Tensor, "b f m"], frames: Int[Tensor, " b"]) -> Tokenised:
        """Tokenise a padded batch.

        Args:
            log_mel: What `whisper_mel` makes of each utterance, padded with anything.
            frames: Real frames of each utterance.
        """
        hidden, mask = self.hidden(log_mel, frames)
        latent = self.down(hidden)
        tokens, values = self.quantiser(latent)
        return Tokenised(tokens, self._project_up(values), mask, latent)

    def _project_up(self, values: Float[Tensor, "b s d"]) -> Float[Tensor, "b s c"]:
        """As `up`, number by number: a matrix product sums in an order that depends on how many rows there are.

        So a token has the same vector bit for bit in any company, and there are only a few numbers to add up.
        """
        weight = self.up.weight
        values = values.to(weight.dtype)
        embedding = values[..., :1] * weight[:, 0] + self.up.bias
        for position in range(1, weight.shape[1]):
            embedding = embedding + values[..., position : position + 1] * weight[:, position]
        return embedding

    def hidden(
        self, log_mel: Float[Tensor, "b f m"], frames: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b s c"], Bool[Tensor, "b s"]]:
        """What the encoder makes of a padded batch, before it is projected down, and which positions are real.

        Args:
            log_mel: As `forward` takes it.
            frames: Real frames of each utterance.
        """
        if log_mel.shape[-1] != self.sizes.mel_channels:
            raise ValueError(f"expected log-mel of {self.sizes.mel_channels} channels, got {log_mel.shape[-1]}")
        # :: (b, f, m) -> (b, m, f)
        hidden, lengths = log_mel.transpose(1, 2), frames
        for convolution in (self.conv1, self.conv2):
            real = length_mask(lengths, hidden.shape[-1])[:, None]
            hidden = functional.gelu(convolution(torch.where(real, hidden, 0)))
            lengths = (lengths + 1) // 2
        # :: (b, c, s) -> (b, s, c)
        hidden = hidden.transpose(1, 2)
        mask = length_mask(lengths, hidden.shape[1])
        rotation = rotation_of(hidden.shape[1], self.sizes.width // self.sizes.heads, hidden.device)
        for block in self.blocks:
            hidden = block(hidden, mask, rotation)
        return hidden, mask

    def embed(self, tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"]) -> Float[Tensor, "b s c"]:
        """Embedding of each token: what `forward` hands on for it.

        Args:
            tokens: Indices, or the weights with which each is mixed from all of the codebook; one weight of 1 gives
                exactly what its index gives.
        """
        return self._project_up(self.quantiser.values(tokens).to(self.up.weight.dtype))

    def features(self, waveform: Float[Tensor, " time"]) -> Float[Tensor, "f c"]:
        """Log-mel as Whisper's; no frames of what is shorter than a window of 25 ms."""
        if len(waveform) < _WINDOW_SAMPLES:
            return waveform.new_zeros(0, self.sizes.mel_channels)
        return whisper_mel(waveform.float(), mel_channels=self.sizes.mel_channels).T

    def count(self, frames: int) -> int:
        """Two strided convolutions, each of which keeps a last half."""
        return ((frames + 1) // 2 + 1) // 2

    def encode(self, waveforms: Sequence[Float[Tensor, " _"]]) -> list[Int[Tensor, " _"]]:
        """Speech tokens of each waveform, on the CPU; what is shorter than a window of 25 ms has none.

        Args:
            waveforms: At 16 kHz, in [-1, 1].

        Raises:
            ValueError: One lasts more than 30 s.
        """
        longest = max((len(waveform) for waveform in waveforms), default=0) / self.sample_rate
        if longest > self.max_seconds:
            raise ValueError(f"the speech tokenizer takes at most {self.max_seconds:g} s, got {longest:.1f} s: cut it")
        speech_tokens = [torch.zeros(0, dtype=torch.long)] * len(waveforms)
        heard = [row for row, waveform in enumerate(waveforms) if len(waveform) >= _WINDOW_SAMPLES]
        heard.sort(key=lambda row: len(waveforms[row]))
        for start in range(0, len(heard), self.batch_size):
            rows = heard[start : start + self.batch_size]
            for row, found in zip(rows, self._encode([waveforms[row] for row in rows]), strict=True):
                speech_tokens[row] = found
        return speech_tokens

    def _encode(self, waveforms: list[Tensor]) -> list[Tensor]:
        mels = [whisper_mel(waveform.float(), mel_channels=self.sizes.mel_channels) for waveform in waveforms]
        frames = torch.tensor([mel.shape[1] for mel in mels])
        out = self(pad_sequence([mel.T for mel in mels], batch_first=True).to(self.conv1.weight.dtype), frames)
        return [tokens[mask] for tokens, mask in zip(out.tokens, out.mask, strict=True)]


def length_mask(lengths: Int[Tensor, " b"], width: int) -> Bool[Tensor, "b width"]:
    """True for the first `lengths` of `width` positions."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def rotation_of(positions: int, channels: int, device: torch.device) -> Float[Tensor, "2 s half"]:
    """Cosine and sine of the angles by which `rotate` turns heads of `channels` channels."""
    # In float64, rounded once, so that every processor turns by the same angle.
    rates = _THETA ** (-torch.arange(0, channels, 2, device=device, dtype=torch.float64) / channels)
    angles = torch.arange(positions, device=device)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(by_head: Float[Tensor, "b s h c"], rotation: Float[Tensor, "2 s half"]) -> Float[Tensor, "b s h c"]:
    """Rotary positions: channel i is turned with channel i + c / 2."""
    cosine, sine = rotation[:, :, None]
    left, right = by_head.chunk(2, dim=-1)
    turned = torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)
    return turned.to(by_head.dtype)
