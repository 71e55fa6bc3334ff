# SPDX-License-Identifier: Apache-2.0
"""Speech tokens -> log-mel -> waveform through Griffin-Lim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
import torchaudio
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tts_align.models.base.tokenizer import TokenizerHead
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.codec.log_mel import LogMel, batches_by_length
from tts_align.models.codec.mel import MelCodec
from tts_align.models.codec.mel_fsq import MelFSQ


class MelVocoder(Vocoder):
    """Speech tokens -> waveform: embed, decode to log-mel in a voice, Griffin-Lim.

    Args:
        directory: directory of a codec; `demo:audio/codec` names the embedded one.
        iterations: rounds of Griffin-Lim; more is slower and a little cleaner.
        batch_size: Utterances decoded together; changes nothing but the last bits of sums.
    """

    on_own_device: ClassVar[tuple[str, ...]] = ("speak", "log_mel")

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

    @property
    def speakers(self) -> tuple[str, ...]:
        """Voices of the codec."""
        return self.codec.sizes.speakers

    def check_speakers(self, speakers: Iterable[str]) -> None:
        """Raise ``ValueError`` for a speaker the codec does not know."""
        self.codec.speaker_index(list(speakers))

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
        padded = pad_sequence([row.long() for row in speech], batch_first=True)
        mask = torch.arange(padded.shape[1]) < counts[:, None]
        embedding = self.codec.tokenizer.embed(padded)
        return self.codec.decoder(embedding, mask, speaker), counts * self.codec.sizes.frames_per_token

    def features(
        self, tokenizer: TokenizerHead, speech: Sequence[Int[Tensor, " _"]], speakers: Sequence[str]
    ) -> list[Float[Tensor, "_ m"]] | None:
        """The decoder's log-mel, for a tokenizer that reads such: Griffin-Lim would only blur it."""
        own = self.codec.features
        theirs = tokenizer.log_mel if isinstance(tokenizer, MelFSQ) else None
        if theirs is None or theirs.settings != own.settings:
            return None
        speaker, rows = self.codec.speaker_index(speakers), [torch.zeros(0, own.mel_channels)] * len(speech)
        for batch in batches_by_length(speech, self.batch_size):
            spoken = [row for row in batch if len(speech[row])]
            if not spoken:
                continue
            log_mel, frames = self.log_mel([speech[row] for row in spoken], speaker[spoken])
            for row, mel, count in zip(spoken, log_mel, frames.tolist(), strict=True):
                rows[row] = mel[:count].cpu()
        return rows

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
    real = torch.arange(log_mel.shape[1] + tail, device=frames.device) < frames[:, None]
    magnitude = torch.nn.functional.pad(features.magnitude(log_mel), (0, 0, 0, tail)) * real[..., None]
    # :: (b, f, k) -> (b, k, f) -> (b, time)
    waveforms = griffin_lim(magnitude.transpose(1, 2)).clamp(-1, 1)
    samples = (frames * features.hop_samples).tolist()
    return [waveform[:count] for waveform, count in zip(waveforms, samples, strict=True)]
