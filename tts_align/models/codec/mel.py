# SPDX-License-Identifier: Apache-2.0
"""A codec of log-mel frames: features, tokenizer and decoder; and its tokenizer alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tts_align.models.base.tokenizer import SpeechTokenizer
from tts_align.models.codec.fsq import FSQTokenizer, MaskedBlock
from tts_align.models.codec.log_mel import LogMel, batches_by_length, log_mel_batch
from tts_align.utils.model_directory import find_model, half_parameters, load_parameters, read_sizes, write_model


class MelDecoder(nn.Module):
    """Token embeddings and a speaker -> log-mel. The speaker is given here, so that tokens need to carry content only.

    Args:
        embedding_channels: Width of the token embeddings.
        mel_channels: Mel channels.
        frames_per_token: Frames to make of each token.
        speakers: Number of speakers.
        hidden_channels: Width.
        blocks: Number of convolution blocks at token rate.
        kernel_size: Tokens that one block sees.
    """

    def __init__(
        self,
        embedding_channels: int,
        mel_channels: int,
        frames_per_token: int,
        speakers: int,
        hidden_channels: int,
        blocks: int,
        kernel_size: int,
    ) -> None:
        super().__init__()
        self.mel_channels = mel_channels
        self.stem = nn.Linear(embedding_channels, hidden_channels)
        self.speaker = nn.Embedding(speakers, hidden_channels)
        self.blocks = nn.ModuleList(MaskedBlock(hidden_channels, kernel_size) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden_channels)
        self.frames = nn.Linear(hidden_channels, frames_per_token * mel_channels)
        self.frames_per_token = frames_per_token

    def forward(
        self, embedding: Float[Tensor, "b s c"], mask: Bool[Tensor, "b s"], speaker: Int[Tensor, " b"]
    ) -> Float[Tensor, "b f m"]:
        """Decode; f is s * frames_per_token.

        Args:
            embedding: Token embeddings.
            mask: True at real tokens.
            speaker: Speaker index of each utterance.
        """
        hidden = self.stem(embedding) + self.speaker(speaker)[:, None]
        for block in self.blocks:
            hidden = block(hidden, mask)
        frames: Tensor = self.frames(self.norm(hidden))
        # :: (b, s, frames_per_token * m) -> (b, s * frames_per_token, m)
        return frames.reshape(frames.shape[0], -1, self.mel_channels)


@dataclass(frozen=True)
class CodecSizes:
    """Sizes of a codec; what `config.json` in its directory holds.

    Args:
        speakers: Names of the voices it can speak with.
        sample_rate: Samples per second.
        window_samples: Analysis window of the log-mel.
        hop_samples: Samples per log-mel frame.
        mel_channels: Mel channels.
        frames_per_token: Log-mel frames per speech token.
        levels: Levels of the quantiser; their product is the codebook size.
        embedding_channels: Width of a token's embedding.
        encoder_channels: Width of the encoder.
        encoder_blocks: Blocks of the encoder.
        encoder_kernel: Tokens that one block of the encoder sees.
        decoder_channels: Width of the decoder.
        decoder_blocks: Blocks of the decoder.
        decoder_kernel: Tokens that one block of the decoder sees.
    """

    speakers: tuple[str, ...]
    sample_rate: int = 16000
    window_samples: int = 512
    hop_samples: int = 160
    mel_channels: int = 48
    frames_per_token: int = 8
    levels: tuple[int, ...] = (6, 6, 6, 5)
    embedding_channels: int = 128
    encoder_channels: int = 192
    encoder_blocks: int = 2
    encoder_kernel: int = 3
    decoder_channels: int = 224
    decoder_blocks: int = 4
    decoder_kernel: int = 5

    @property
    def token_samples(self) -> int:
        """Samples per speech token."""
        return self.frames_per_token * self.hop_samples


class MelCodec(nn.Module):
    """Features, tokenizer and decoder, which are trained, stored and loaded together.

    Args:
        sizes: Sizes of all three.
    """

    def __init__(self, sizes: CodecSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.features = LogMel(sizes.sample_rate, sizes.window_samples, sizes.hop_samples, sizes.mel_channels)
        self.tokenizer = FSQTokenizer(
            sizes.mel_channels,
            sizes.frames_per_token,
            sizes.levels,
            sizes.encoder_channels,
            sizes.encoder_blocks,
            sizes.encoder_kernel,
            sizes.embedding_channels,
            shrink=None,  # the stored codecs were trained without
        )
        self.decoder = MelDecoder(
            sizes.embedding_channels,
            sizes.mel_channels,
            sizes.frames_per_token,
            len(sizes.speakers),
            sizes.decoder_channels,
            sizes.decoder_blocks,
            sizes.decoder_kernel,
        )

    def forward(
        self, log_mel: Float[Tensor, "b f m"], frames: Int[Tensor, " b"], speaker: Int[Tensor, " b"]
    ) -> Float[Tensor, "b f m"]:
        """Log-mel through the tokens and back."""
        tokenised = self.tokenizer(log_mel, frames)
        return self.decoder(tokenised.embedding, tokenised.mask, speaker)[:, : log_mel.shape[1]]

    def speaker_index(self, names: Sequence[str]) -> Int[Tensor, " b"]:
        """Index of each speaker name.

        Raises:
            ValueError: A name that this codec does not know.
        """
        if unknown := sorted(set(names) - set(self.sizes.speakers)):
            raise ValueError(f"unknown speakers {unknown}: this codec speaks as {list(self.sizes.speakers)}")
        return torch.tensor([self.sizes.speakers.index(name) for name in names], dtype=torch.long)

    def save(self, directory: Path) -> None:
        """Write `config.json` and `model.safetensors` (half precision); the directory appears whole or not at all."""
        write_model(directory, self.sizes, half_parameters(self))

    @classmethod
    def load(cls, directory: str | Path) -> MelCodec:
        """The codec stored in `directory` (`demo:audio/codec` names the embedded one), for inference."""
        path = find_model(directory, "model.vocoder")
        codec = cls(read_sizes(path, CodecSizes))
        load_parameters(codec, path)
        return codec.eval().requires_grad_(False)


class MelTokenizer(SpeechTokenizer):
    """Waveform -> log-mel -> speech tokens.

    Args:
        directory: directory of a codec; `demo:audio/codec` names the embedded one.
        batch_size: utterances encoded together; does not change the result.
    """

    def __init__(self, directory: str = "demo:audio/codec", batch_size: int = 64) -> None:
        super().__init__()
        self.codec, self.batch_size = MelCodec.load(directory), batch_size
        self.codebook_size = self.codec.tokenizer.codebook_size
        self.sample_rate = self.codec.sizes.sample_rate

    def encode(self, waveforms: Sequence[Float[Tensor, " _"]]) -> list[Int[Tensor, " _"]]:
        """Speech tokens of each waveform; what is too short for one frame has none."""
        return encode(self.codec, waveforms, self.batch_size)


@torch.no_grad()
def encode(codec: MelCodec, waveforms: Sequence[Tensor], batch_size: int = 64) -> list[Int[Tensor, " _"]]:
    """Speech tokens of waveforms, in batches of like length; see `MelTokenizer`."""
    speech_tokens: dict[int, Tensor] = {}
    for rows in batches_by_length(waveforms, batch_size):
        log_mel, frames = log_mel_batch(codec.features, [waveforms[row] for row in rows])
        out = codec.tokenizer(log_mel, frames)
        speech_tokens |= {row: tokens[mask] for row, tokens, mask in zip(rows, out.tokens, out.mask, strict=True)}
    return [speech_tokens[row] for row in range(len(waveforms))]
