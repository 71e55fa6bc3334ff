# SPDX-License-Identifier: Apache-2.0
"""Listen to the recordings of rows: speech tokens, speech tokens of prompts, speaker vectors; or say why not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from tts_align.data.cosyvoice import NoRecording
from tts_align.data.manifest import to_dict
from tts_align.data.parse import Rules, parse
from tts_align.data.recordings import Loaded
from tts_align.data.records import Row, Sound
from tts_align.models.base.tokenizer import SpeechTokenizer
from tts_align.utils.audio import SILENCE, AudioError
from tts_align.utils.shards import digest

Made = TypeVar("Made")
_FLOAT32_DIGITS = 9


@runtime_checkable
class VoiceEncoder(Protocol):
    """Gives the vector of a voice."""

    def encode(self, waveforms: Sequence[Tensor]) -> Tensor:
        """Vectors, shape (b, d), of waveforms at the tokenizer's rate."""


@dataclass(frozen=True)
class RecordingEncoder:
    """What listens.

    Args:
        tokenizer: gives speech tokens.
        speaker_encoder: gives speaker vectors; without it there are none.
        identity: differs between recording_encoder that hear differently.
    """

    tokenizer: SpeechTokenizer
    speaker_encoder: VoiceEncoder | None
    identity: str

    @classmethod
    def of(cls, directory: str, batch_size: int, speaker_vectors: bool) -> RecordingEncoder:
        """Those of a CosyVoice directory.

        Args:
            directory: of the model.
            batch_size: utterances encoded together.
            speaker_vectors: whether there shall be speaker vectors.
        """
        from tts_align.models.cosyvoice.frontend import CosyVoiceTokenizer, SpeakerEncoder

        tokenizer = CosyVoiceTokenizer(directory, batch_size)
        encoder = SpeakerEncoder(directory) if speaker_vectors else None
        files = [part.model.path for part in (tokenizer, encoder) if part is not None]
        return cls(tokenizer, encoder, digest(tokenizer.batch_size, *map(_content, files)))

    def try_out(self) -> None:
        """Raise what a model that cannot run at all raises, before it is taken for the fault of a recording."""
        rate = self.tokenizer.sample_rate
        sound = 0.1 * torch.sin(torch.arange(rate) * (440 * torch.pi / rate))
        self.tokenizer.encode([sound])
        if self.speaker_encoder is not None:
            self.speaker_encoder.encode([sound])


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


@dataclass(frozen=True)
class Refused:
    """A row that cannot be prepared.

    Args:
        id: of the row.
        where: the recording at fault, or the row.
        what: is wrong with it.
    """

    id: str
    where: str
    what: str


def unencoded(row: Row) -> tuple[str, ...]:
    """Recordings of a row whose speech tokens are to be made."""
    sounds = (*row.sounds, Sound(row.prompt_speech, row.prompt_audio))
    return tuple(dict.fromkeys(sound.audio for sound in sounds if sound.audio and not sound.speech))


def voice(row: Row) -> str:
    """The recording that a row's speaker vector is to be made of, if it needs one and has one."""
    return "" if row.speaker_vector else row.sounds[0].audio or row.prompt_audio


def needed(row: Row, speaker_vectors: bool) -> tuple[str, ...]:
    """Every recording of a row that must be encoded."""
    voices = (voice(row),) if speaker_vectors else ()
    return tuple(dict.fromkeys(name for name in (*unencoded(row), *voices) if name))


def encode_recordings(rows: Sequence[Row], sounds: Loaded, recording_encoder: RecordingEncoder) -> list[Row | Refused]:
    """The rows with everything that could be encoded.

    Args:
        rows: from a source.
        sounds: the recordings they need.
        recording_encoder: what listens.
    """
    audible = {name: sound for name, sound in sounds.items() if not isinstance(sound, AudioError)}
    speech_tokens = _each(
        recording_encoder.tokenizer.encode, _chosen(audible, (name for row in rows for name in unencoded(row)))
    )
    vectors: Mapping[str, Tensor | str] = {}
    if recording_encoder.speaker_encoder is not None:
        vectors = _each(recording_encoder.speaker_encoder.encode, _chosen(audible, map(voice, rows)))
    encoded: list[Row | Refused] = []
    for row in rows:
        try:
            encoded.append(
                _checked(
                    _filled(row, sounds, speech_tokens, vectors, recording_encoder.speaker_encoder is not None),
                    recording_encoder,
                )
            )
        except AudioError as error:
            encoded.append(Refused(row.id, error.name, error.what))
    return encoded


def _chosen(sounds: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: sounds[name] for name in dict.fromkeys(names) if name in sounds}


def _each(
    encode: Callable[[Sequence[Tensor]], Iterable[Tensor]], sounds: Mapping[str, Tensor]
) -> dict[str, Tensor | str]:
    """What an encoder makes of each recording, or what it says of it; one at fault leaves the others alone."""
    if not sounds:
        return {}
    try:
        return dict(zip(sounds, encode(list(sounds.values())), strict=True))
    except (MemoryError, torch.OutOfMemoryError):
        raise  # says nothing about the recording
    except Exception as error:
        if len(sounds) == 1:
            return dict.fromkeys(sounds, f"cannot be encoded: {type(error).__name__}: {error}")
    return {name: value for one in sounds for name, value in _each(encode, {one: sounds[one]}).items()}


def _filled(
    row: Row,
    sounds: Loaded,
    speech_tokens: Mapping[str, Tensor | str],
    vectors: Mapping[str, Tensor | str],
    speaker_vectors: bool,
) -> Row:
    """The row with speech tokens and vector; raises :class:`AudioError` for what cannot be had."""
    may_be_silent = {row.audio} if row.desirable is False else {row.pair.rejected.audio} if row.pair else set()

    def speech(sound: Sound) -> Sound:
        if sound.speech or not sound.audio:
            return sound
        waveform = _found(sound.audio, sounds)
        if sound.audio not in may_be_silent and waveform.abs().max() <= SILENCE:
            raise AudioError(sound.audio, "is silent")
        found = _found(sound.audio, speech_tokens)
        if not len(found):
            raise AudioError(sound.audio, "is too short to give a speech token")
        return replace(sound, speech=tuple(found.tolist()))

    prompt = speech(Sound(row.prompt_speech, row.prompt_audio))
    row = replace(row, prompt_speech=prompt.speech)
    if row.pair is None:
        row = replace(row, speech=speech(row.sounds[0]).speech)
    else:
        row = replace(row, pair=replace(row.pair, chosen=speech(row.pair.chosen), rejected=speech(row.pair.rejected)))
    name = voice(row)
    if not speaker_vectors or not name or isinstance(sounds[name], NoRecording):
        return row
    _found(name, sounds)
    return replace(row, speaker_vector=_numbers(_found(name, vectors), name))


def _found(name: str, made: Mapping[str, Tensor | AudioError] | Mapping[str, Tensor | str]) -> Tensor:
    """What was made of a recording; raises why nothing was."""
    value = made[name]
    if isinstance(value, AudioError):
        raise value
    if isinstance(value, str):
        raise AudioError(name, value)
    return value


def _numbers(vector: Tensor, name: str) -> tuple[float, ...]:
    """The shortest decimals that are the same single-precision numbers again."""
    if not vector.isfinite().all():
        raise AudioError(name, "gave a speaker vector that is not finite")
    return tuple(float(f"{value:.{_FLOAT32_DIGITS}g}") for value in vector.tolist())


def _checked(row: Row, recording_encoder: RecordingEncoder) -> Row:
    """The row, if training would take it: tokens that were just made can turn out to be those of the other side."""
    _, faults, _ = parse(to_dict(row), row.id, Rules(recording_encoder.tokenizer.codebook_size))
    if faults:
        raise AudioError(f"row {row.id!r}", "; ".join(faults))
    return row
