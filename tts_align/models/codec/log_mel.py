# SPDX-License-Identifier: Apache-2.0
"""Log-mel features, of one waveform or of a batch, and back to magnitudes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchaudio
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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

    @property
    def settings(self) -> tuple[int, int, int, int]:
        """Sample rate, window, hop and mel channels: features of equal ones are the same."""
        return self.sample_rate, self.window_samples, self.hop_samples, self.mel_channels

    def forward(self, audio: Float[Tensor, "b time"]) -> Float[Tensor, "b f m"]:
        """Normalised log-mel; one frame more than time // hop_samples: the first window is centred on sample 0."""
        # :: (*b, time) -> (*b, m, f) -> (*b, f, m)
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
    samples = torch.tensor([len(clip) for clip in audio], dtype=torch.long, device=audio[0].device)
    # Three windows of silence behind the longest: the padding of one clip is then like that of every other.
    padded = torch.nn.functional.pad(pad_sequence(list(audio), batch_first=True), (0, 3 * features.window_samples))
    frames = features.frames(samples)
    return features(padded)[:, : max(1, int(frames.max()))], frames


def batches_by_length(sequences: Sequence[Tensor], batch_size: int) -> list[list[int]]:
    """Positions of sequences in batches of like length, shortest first, so that there is little padding."""
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
