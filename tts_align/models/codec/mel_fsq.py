# SPDX-License-Identifier: Apache-2.0
"""A small speech tokenizer that trains: log-mel -> convolutions -> finite scalar quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from tts_align.models.base.tokenizer import Tokenised, TokenizerHead
from tts_align.models.codec.fsq import FSQTokenizer
from tts_align.models.codec.log_mel import LogMel, batches_by_length, log_mel_batch
from tts_align.utils.model_directory import find_model, read_sizes, read_weights_of, write_model

_OWN = "tokenizer."


@dataclass(frozen=True)
class FSQSizes:
    """Sizes of a tokenizer; what ``config.json`` in its directory holds. The defaults are those of the demo's codec.

    Args:
        sample_rate: samples per second.
        window_samples: analysis window of the log-mel.
        hop_samples: samples per frame.
        mel_channels: mel channels.
        frames_per_token: frames that one token stands for.
        levels: levels of each dimension of the quantiser; their product is the size of the codebook.
        embedding_channels: width of a token's vector.
        encoder_channels: width of the encoder.
        encoder_blocks: its blocks.
        encoder_kernel: tokens that one of them sees.
        shrink: factor of the bounded numbers, see :class:`~tts_align.models.codec.fsq.FiniteScalarQuantiser`.
    """

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
    shrink: float | None = None


class MelFSQ(TokenizerHead):
    """Waveform -> log-mel -> tokens, at any size, to be trained.

    Args:
        directory: folder with ``config.json`` and ``model.safetensors``; ``demo:audio/codec``, of which the tokenizer
            is taken, names the embedded codec. Without it a tokenizer of random weights is made from ``sizes``.
        sizes: sizes of a new tokenizer; not together with directory.
        batch_size: utterances that ``encode`` takes together; changes nothing but the last bits of sums.
    """

    def __init__(self, directory: str | None = None, sizes: FSQSizes | None = None, batch_size: int = 64) -> None:
        super().__init__()
        if (directory is None) == (sizes is None):
            raise ValueError("a tokenizer needs exactly one of `directory` (a trained one) and `sizes` (a new one)")
        path = None if directory is None else find_model(directory, "model.tokenizer")
        if path is not None:
            sizes = read_sizes(path, FSQSizes, part=True)  # of a tokenizer, or of the tokenizer of a codec
        assert sizes is not None
        self.directory, self.sizes, self.batch_size = path, sizes, batch_size
        self.log_mel = LogMel(sizes.sample_rate, sizes.window_samples, sizes.hop_samples, sizes.mel_channels)
        self.tokenizer = FSQTokenizer(
            sizes.mel_channels,
            sizes.frames_per_token,
            sizes.levels,
            sizes.encoder_channels,
            sizes.encoder_blocks,
            sizes.encoder_kernel,
            sizes.embedding_channels,
            sizes.shrink,
        )
        self.codebook_size, self.sample_rate = self.tokenizer.codebook_size, sizes.sample_rate
        self.embedding_channels = sizes.embedding_channels
        if path is not None:
            stored = read_weights_of(path)
            own = {key.removeprefix(_OWN): value for key, value in stored.items() if key.startswith(_OWN)}
            self.tokenizer.load_state_dict(own)

    def features(self, waveform: Float[Tensor, " time"]) -> Float[Tensor, "f c"]:
        """Normalised log-mel."""
        log_mel, frames = log_mel_batch(self.log_mel, [waveform])
        return log_mel[0, : int(frames)]

    def count(self, frames: int) -> int:
        """A last, partly filled token counts."""
        return -(-frames // self.sizes.frames_per_token)

    def forward(self, log_mel: Float[Tensor, "b f m"], frames: Int[Tensor, " b"]) -> Tokenised:
        """Tokenise padded log-mel, of which ``frames`` are real."""
        return self.tokenizer(log_mel, frames)

    def embed(self, tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"]) -> Float[Tensor, "b s c"]:
        """Vectors of tokens, or mixed of those of all tokens."""
        return self.tokenizer.embed(tokens)

    def encode(self, waveforms: Sequence[Float[Tensor, " _"]]) -> list[Int[Tensor, " _"]]:
        """Speech tokens of each waveform; what is too short for one frame has none."""
        speech_tokens: dict[int, Tensor] = {}
        for rows in batches_by_length(waveforms, self.batch_size):
            log_mel, frames = log_mel_batch(self.log_mel, [waveforms[row] for row in rows])
            out = self.tokenizer(log_mel, frames)
            speech_tokens |= {row: tokens[mask] for row, tokens, mask in zip(rows, out.tokens, out.mask, strict=True)}
        return [speech_tokens[row] for row in range(len(waveforms))]

    def save(self, directory: Path) -> None:
        """Write config and weights; the directory appears whole or not at all."""
        own = self.tokenizer.state_dict()
        write_model(directory, self.sizes, {f"{_OWN}{key}": value for key, value in own.items()})
