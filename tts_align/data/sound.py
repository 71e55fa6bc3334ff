# SPDX-License-Identifier: Apache-2.0
"""Rows as sound: features of recordings, for objectives that make the speech tokens themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tts_align.batch import Recordings
from tts_align.data.records import Fault, Manifest, ManifestError, Pair, Sound
from tts_align.data.select import Item, LabelledUtterance
from tts_align.models.base.tokenizer import TokenizerHead
from tts_align.models.base.vocoder import Vocoder
from tts_align.utils.audio import AudioError, load_audio
from tts_align.utils.progress import Bar

PLACEHOLDER = 0
"""Stands for every token until the tokenizer has made it."""


@dataclass(frozen=True)
class AcousticMel:
    """Mel that a flow model makes, where it is not what the tokenizer hears; the defaults are those of Fun-CosyVoice3.

    Args:
        sample_rate: samples per second.
        fft_samples: length of the transform and of its window.
        hop_samples: samples per frame.
        mel_channels: mel channels.
        fmax: upper edge of the highest channel in hertz, 8000 for CosyVoice2; half the sample rate by default.
    """

    sample_rate: int = 24000
    fft_samples: int = 1920
    hop_samples: int = 480
    mel_channels: int = 80
    fmax: float | None = None

    def __call__(self, waveform: Float[Tensor, " time"]) -> Float[Tensor, "f m"]:
        """Frames of a waveform."""
        from tts_align.models.cosyvoice.features import acoustic_mel

        sizes = self.sample_rate, self.fft_samples, self.hop_samples, self.mel_channels
        return acoustic_mel(waveform[None], self.fmax, *sizes)[0]


@dataclass(frozen=True)
class RecordingFeatures:
    """One recording.

    Args:
        features: what the tokenizer reads, in half precision.
        mel: what a flow model is to make, likewise; ``None`` when it is the same.
        token_count: how many speech tokens the tokenizer makes of it.
        speaker: vector of the voice; may be empty.
    """

    features: Float[Tensor, "f m"]
    mel: Float[Tensor, "g k"] | None
    token_count: int
    speaker: tuple[float, ...] = ()


@dataclass(frozen=True)
class FeatureExtractor:
    """What rows are recordings with.

    Args:
        tokenizer: whose features and speech tokens are wanted.
        vocoder: speaks rows that have speech tokens, of another tokenizer, and no recording.
        acoustic: mel of the flow model; by default the tokenizer's features.
        batch_size: rows that the vocoder speaks at once.
    """

    tokenizer: TokenizerHead
    vocoder: Vocoder | None = None
    acoustic: AcousticMel | None = None
    batch_size: int = 64

    def extract(
        self, items: Sequence[Item], manifest: Manifest
    ) -> tuple[tuple[Item, ...], tuple[RecordingFeatures, ...]]:
        """Features of every utterance, and the same utterances with as many placeholders as they will have tokens.

        Args:
            items: utterances as they were selected.
            manifest: where their recordings lie.

        Raises:
            ManifestError: an utterance has no recording and cannot be spoken, or cannot be used.
        """
        utterances = [utterance for item in items for utterance in item]
        recordings = self._features(utterances, manifest)
        faults = [
            Fault(f"row {utterance.row.id!r}", "too short to give a speech token")
            for utterance, one in zip(utterances, recordings, strict=True)
            if not one.token_count
        ]
        if faults:
            raise ManifestError(manifest.path, faults)
        rest = iter(recordings)
        return tuple(
            tuple(_with_placeholders(one, next(rest).token_count) for one in item) for item in items
        ), recordings

    def _features(self, utterances: Sequence[LabelledUtterance], manifest: Manifest) -> tuple[RecordingFeatures, ...]:
        known: dict[tuple[Sound, str], RecordingFeatures] = {}
        keys = tuple(dict.fromkeys((one.sound, one.row.speaker) for one in utterances))
        faults: list[Fault] = []
        if direct := self._direct([key for key in keys if not key[0].audio]):
            known |= direct
            keys = tuple(key for key in keys if key[0].audio)
        for key, waveforms in self._waveforms(keys, manifest, faults):
            known[key] = self._features_of(*waveforms)
        if faults:
            raise ManifestError(manifest.path, faults)
        return tuple(replace(known[one.sound, one.row.speaker], speaker=one.row.speaker_vector) for one in utterances)

    def _direct(self, keys: Sequence[tuple[Sound, str]]) -> dict[tuple[Sound, str], RecordingFeatures]:
        """Features of rows without a recording as the vocoder has them before they become sound; none if it cannot."""
        if self.vocoder is None or self.acoustic is not None or not keys:
            return {}
        speech, speakers = [torch.tensor(key[0].speech) for key in keys], [key[1] for key in keys]
        with torch.no_grad():
            rows = self.vocoder.features(self.tokenizer, speech, speakers)
        if rows is None:
            return {}
        made = [RecordingFeatures(row.half(), None, self.tokenizer.count(len(row))) for row in rows]
        return dict(zip(keys, made, strict=True))

    def _features_of(self, sound: Tensor, for_flow: Tensor | None) -> RecordingFeatures:
        features = self.tokenizer.features(sound)
        mel = None if self.acoustic is None or for_flow is None else self.acoustic(for_flow).half()
        return RecordingFeatures(features.half(), mel, self.tokenizer.count(len(features)))

    def _waveforms(
        self, keys: Sequence[tuple[Sound, str]], manifest: Manifest, faults: list[Fault]
    ) -> Iterator[tuple[tuple[Sound, str], tuple[Tensor, Tensor | None]]]:
        """Each recording at the tokenizer's rate, and at the flow model's where that is another."""
        spoken = [key for key in keys if not key[0].audio]
        if spoken and self.vocoder is None:
            what = "has speech tokens of another tokenizer only: give data.vocoder, which speaks them, or recordings"
            raise ManifestError(manifest.path, [Fault(f"{len(spoken)} utterances", what)])
        for key in Bar([key for key in keys if key[0].audio], desc="read recordings", leave=False):
            try:
                path = manifest.find(key[0].audio)
                longest = self.tokenizer.max_seconds
                yield key, (load_audio(path, self.tokenizer.sample_rate, longest), self._load_for_flow(path))
            except AudioError as error:
                faults.append(Fault(error.name, error.what))
        starts = range(0, len(spoken), self.batch_size)
        for start in Bar(starts, desc="speak speech tokens", unit="batch", leave=False):
            part = spoken[start : start + self.batch_size]
            yield from zip(part, self._speak(part), strict=True)

    def _load_for_flow(self, path: object) -> Tensor | None:
        return None if self.acoustic is None else load_audio(str(path), self.acoustic.sample_rate)

    def _speak(self, keys: Sequence[tuple[Sound, str]]) -> list[tuple[Tensor, Tensor | None]]:
        assert self.vocoder is not None
        rate = self.vocoder.sample_rate
        with torch.no_grad():
            sounds = self.vocoder.speak([torch.tensor(key[0].speech) for key in keys], [key[1] for key in keys])
        wanted = None if self.acoustic is None else self.acoustic.sample_rate
        return [
            (
                _resampled(sound, rate, self.tokenizer.sample_rate),
                None if wanted is None else _resampled(sound, rate, wanted),
            )
            for sound in sounds
        ]


def _resampled(sound: Tensor, before: int, after: int) -> Tensor:
    if before == after:
        return sound
    import torchaudio

    return torchaudio.functional.resample(sound, before, after)


def _with_placeholders(utterance: LabelledUtterance, token_count: int) -> LabelledUtterance:
    """The same utterance, of a number of speech tokens that are not known yet."""
    sound = replace(utterance.sound, speech=(PLACEHOLDER,) * token_count)
    row = utterance.row
    if row.pair is None:
        row = replace(row, speech=sound.speech)
    else:  # which of the two it is must stay visible
        chosen = utterance.sound is row.pair.chosen
        row = replace(row, pair=Pair(sound, row.pair.rejected) if chosen else Pair(row.pair.chosen, sound))
    return LabelledUtterance(row, sound, utterance.desirable)


def collate_recordings(recordings: Sequence[RecordingFeatures]) -> Recordings:
    """Recordings of a micro-batch, padded with zeros."""
    features = [one.features.float() for one in recordings]
    mel = [one.features.float() if one.mel is None else one.mel.float() for one in recordings]
    lengths = torch.tensor([len(one) for one in mel])
    widths = {len(one.speaker) for one in recordings}
    if len(widths) > 1:
        raise ValueError(
            f"expected speaker_vector in all rows, of one length, or in none; got lengths {sorted(widths)}"
        )
    return Recordings(
        features=pad_sequence(features, batch_first=True),
        frames=torch.tensor([len(one) for one in features]),
        mel=pad_sequence(mel, batch_first=True),
        mel_mask=torch.arange(int(lengths.max())) < lengths[:, None],
        # :: (b * h) -> (b, h)
        speaker=torch.tensor([one.speaker for one in recordings], dtype=torch.float32).view(len(recordings), -1),
        token_counts=tuple(one.token_count for one in recordings),
    )
