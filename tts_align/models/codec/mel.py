# SPDX-License-Identifier: Apache-2.0
"""Log-mel features, the mel decoder behind the speech tokenizer, and tokens -> waveform through Griffin-Lim."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchaudio
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tts_align.models.base.tokenizer import SpeechTokenizer
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.codec.fsq import FSQTokenizer, MaskedBlock
from tts_align.utils.assets import resolve

# Natural log of the smallest magnitude told apart from silence, and the scale that brings log-mel near [-1, 1].
_FLOOR = 1e-3
_CENTRE, _SCALE = -2.5, 3.0


class LogMel(nn.Module):
    """Waveform -> normalised log-mel, and back to magnitudes.

    Args:
        sample_rate: Samples per second.
        window_samples: Length of the analysis window and of the transform.
        hop_samples: Samples per frame.
        mel_channels: Mel channels.
    """

    inverse: Tensor

    def __init__(
        self, sample_rate: int = 16000, window_samples: int = 512, hop_samples: int = 160, mel_channels: int = 48
    ) -> None:
        super().__init__()
        self.sample_rate, self.hop_samples, self.mel_channels = sample_rate, hop_samples, mel_channels
        self.window_samples = window_samples
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate, n_fft=window_samples, hop_length=hop_samples, n_mels=mel_channels, power=1.0, f_min=40.0
        )
        # Least squares, once, instead of torchaudio's InverseMelScale, which solves it anew for every utterance.
        self.register_buffer("inverse", torch.linalg.pinv(self.mel.mel_scale.fb), persistent=False)

    def forward(self, audio: Float[Tensor, "b time"]) -> Float[Tensor, "b f m"]:
        """Normalised log-mel; one frame more than time // hop_samples: the first window is centred on sample 0."""
        log_mel: Tensor = self.mel(audio).clamp_min(_FLOOR).log().transpose(-1, -2)
        return (log_mel - _CENTRE) / _SCALE

    def frames(self, samples: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Frames of audio of these lengths."""
        return samples // self.hop_samples

    def magnitude(self, log_mel: Float[Tensor, "b f m"]) -> Float[Tensor, "b f q"]:
        """Spectral magnitudes (q frequency bins) whose mel is nearest to `log_mel`."""
        mel = (log_mel * _SCALE + _CENTRE).exp() - _FLOOR
        return (mel.clamp_min(0) @ self.inverse).clamp_min(0)


def log_mel_batch(features: LogMel, audio: Sequence[Tensor]) -> tuple[Float[Tensor, "b f m"], Int[Tensor, " b"]]:
    """Features of utterances of different lengths.

    Args:
        features: The feature extractor.
        audio: Waveforms (time,).

    Returns:
        Padded log-mel and the number of real frames of each utterance.
    """
    samples = torch.tensor([len(clip) for clip in audio], dtype=torch.long)
    # Three windows of silence behind the longest: the padding of one clip is then like that of every other.
    padded = torch.nn.functional.pad(pad_sequence(list(audio), batch_first=True), (0, 3 * features.window_samples))
    frames = features.frames(samples)
    return features(padded)[:, : max(1, int(frames.max()))], frames


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
        """Write `config.json` and `model.safetensors` (half precision) into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        save_half(self, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(dataclasses.asdict(self.sizes), indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> MelCodec:
        """The codec stored in `directory` (`demo:audio/codec` names the embedded one), for inference."""
        path = resolve(directory)
        config = json.loads((path / "config.json").read_text())
        lists = {key: tuple(value) for key, value in config.items() if isinstance(value, list)}
        codec = cls(CodecSizes(**config | lists))
        load_half(codec, path / "model.safetensors")
        return codec.eval().requires_grad_(False)


def save_half(module: nn.Module, path: Path) -> None:
    """Write a module's parameters in half precision; buffers are made again by the constructor."""
    save_file({name: value.detach().half().contiguous() for name, value in module.named_parameters()}, path)


def load_half(module: nn.Module, path: Path) -> None:
    """Read what `save_half` wrote, as float32."""
    stored = load_file(path)
    parameters = dict(module.named_parameters())
    if stored.keys() != parameters.keys():
        raise ValueError(f"{path} holds other weights than its config.json describes")
    with torch.no_grad():
        for name, value in stored.items():
            parameters[name].copy_(value)


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

    @torch.no_grad()
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


def batches_by_length(sequences: Sequence[Tensor], batch_size: int) -> list[list[int]]:
    """Positions of sequences in batches of like length, shortest first, so that there is little padding."""
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class MelVocoder(Vocoder):
    """Speech tokens -> waveform: embed, decode to log-mel in a voice, Griffin-Lim.

    Args:
        directory: directory of a codec; `demo:audio/codec` names the embedded one.
        iterations: rounds of Griffin-Lim; more is slower and a little cleaner.
        batch_size: utterances decoded together; does not change the result.
    """

    def __init__(self, directory: str = "demo:audio/codec", iterations: int = 8, batch_size: int = 16) -> None:
        super().__init__()
        self.codec, self.batch_size = MelCodec.load(directory), batch_size
        features = self.codec.features
        self.sample_rate = features.sample_rate
        # Starting from zero phase instead of a random one makes the waveform a function of the tokens.
        self.griffin_lim = torchaudio.transforms.GriffinLim(
            n_fft=features.window_samples,
            n_iter=iterations,
            hop_length=features.hop_samples,
            power=1.0,
            rand_init=False,
        )

    def check_speakers(self, speakers: Iterable[str]) -> None:
        """Raise ``ValueError`` for a speaker the codec does not know."""
        self.codec.speaker_index(list(speakers))

    @torch.no_grad()
    def speak(self, speech: Sequence[Int[Tensor, " _"]], speakers: Sequence[str]) -> list[Float[Tensor, " _"]]:
        """Waveforms of token sequences, frames_per_token * hop_samples samples for each token.

        Args:
            speech: Speech tokens of each utterance; none gives an empty waveform.
            speakers: Speaker name of each utterance.

        Raises:
            ValueError: A speaker the codec does not know.
        """
        speaker = self.codec.speaker_index(speakers)
        waveforms = [torch.zeros(0)] * len(speech)
        for rows in batches_by_length(speech, self.batch_size):
            spoken = [row for row in rows if len(speech[row])]
            for row, waveform in zip(
                spoken, self._speak([speech[row] for row in spoken], speaker[spoken]), strict=True
            ):
                waveforms[row] = waveform
        return waveforms

    def log_mel(
        self, speech: Sequence[Int[Tensor, " _"]], speaker: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b f m"], Int[Tensor, " b"]]:
        """Padded log-mel of token sequences, and the number of real frames of each."""
        counts = torch.tensor([len(row) for row in speech])
        padded = pad_sequence([row.long().cpu() for row in speech], batch_first=True)
        mask = torch.arange(padded.shape[1]) < counts[:, None]
        embedding = self.codec.tokenizer.embed(padded)
        return self.codec.decoder(embedding, mask, speaker), counts * self.codec.sizes.frames_per_token

    def _speak(self, speech: list[Tensor], speaker: Int[Tensor, " b"]) -> list[Tensor]:
        if not speech:
            return []
        log_mel, frames = self.log_mel(speech, speaker)
        return sound_of(self.codec.features, self.griffin_lim, log_mel, frames)


def sound_of(
    features: LogMel,
    griffin_lim: torchaudio.transforms.GriffinLim,
    log_mel: Float[Tensor, "b f m"],
    frames: Int[Tensor, " b"],
) -> list[Float[Tensor, " _"]]:
    """Waveforms of padded log-mel, hop_samples samples for each real frame.

    Args:
        features: what made such log-mel.
        griffin_lim: finds the phases.
        log_mel: of each utterance.
        frames: how many are real.
    """
    # Silence, as long as two windows, behind the longest: so the end of an utterance sounds the same in any batch.
    tail = -(-2 * features.window_samples // features.hop_samples)
    real = torch.arange(log_mel.shape[1] + tail) < frames[:, None]
    magnitude = torch.nn.functional.pad(features.magnitude(log_mel), (0, 0, 0, tail)) * real[..., None]
    waveforms = griffin_lim(magnitude.transpose(1, 2)).clamp(-1, 1)
    samples = (frames * features.hop_samples).tolist()
    return [waveform[:count] for waveform, count in zip(waveforms, samples, strict=True)]
