# SPDX-License-Identifier: Apache-2.0
"""Voices to speak in: recordings that CosyVoice continues or imitates, and those stored with the model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.models.base.precision import full_precision
from tts_align.models.cosyvoice.directory import ModelDirectory
from tts_align.models.cosyvoice.features import acoustic_mel
from tts_align.models.cosyvoice.frontend import MAX_SECONDS, SAMPLE_RATE, CosyVoiceTokenizer, SpeakerEncoder
from tts_align.models.cosyvoice.text import TextTokenizer
from tts_align.models.cosyvoice.voice_rows import STORED, Mode, VoiceRow, bare_transcript, read_voice_rows
from tts_align.utils.audio import AudioError, load_audio
from tts_align.utils.readers import load_tensors

_COMPLETE = {"speech": "flow_prompt_speech_token", "mel": "prompt_speech_feat", "vector": "flow_embedding"}


@dataclass(frozen=True)
class Voice:
    """One voice.

    The flow gets tokens, mel and vector in every mode. The language model gets transcript and tokens in zero_shot, the
    instruction in instruct, and nothing in cross_lingual and sft.

    Args:
        name: of the speaker.
        mode: what the language model gets.
        prompt_text: transcript of the recording, in zero_shot only; version 3's assistant line is not part of it.
        instruct: how to speak, in instruct only.
        speech: speech tokens of the recording; none in sft.
        mel: of the recording at the flow's rate, exactly as long as the speech tokens; none in sft.
        vector: what the speaker encoder gives, not normalised.
    """

    name: str
    mode: Mode
    prompt_text: str
    instruct: str
    speech: tuple[int, ...]
    mel: Float[Tensor, "f m"] | None
    vector: Float[Tensor, " d"]


class UnknownSpeaker(KeyError, ValueError):
    """A speaker that is asked for, but not there."""

    def __str__(self) -> str:
        return str(self.args[0])


class Voices(Mapping[str, Voice]):
    """The voices of a model directory, and of a file of recordings; each is computed when it is first asked for.

    The file has a JSON object on each line: ``speaker``, ``audio`` (a path, relative to the file), ``text`` (its
    transcript), ``instruct`` (how to speak) and ``mode``. Without a mode it is instruct if there is an instruction,
    zero_shot if there is a transcript, and else cross_lingual. Recordings last at most 30 s, at any rate;
    below 16 kHz a voice sounds dull.

    Args:
        directory: of the model.
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its lines, or ``spk2info.pt`` in the directory, are not as expected.
    """

    def __init__(self, directory: ModelDirectory, path: str | Path | None = None) -> None:
        self.directory, self.path = directory, None if path is None else Path(path)
        self._known: dict[str, Voice] = {}
        self._makers: dict[str, Callable[[], Voice]] = {}
        if self.path is not None:
            self._makers |= {row.speaker: partial(self._record, row) for row in read_voice_rows(self.path)}
        stored = _read_stored(directory)
        if twice := sorted(stored.keys() & self._makers.keys()):
            raise ValueError(f"{self.path} names {twice[0]!r}, which {directory.path / STORED} has too: rename it")
        self._makers |= {name: partial(self._unpack, name, entry) for name, entry in stored.items()}

    def __getitem__(self, name: str) -> Voice:
        if name not in self._makers:
            raise UnknownSpeaker(self._unknown(name))
        if name not in self._known:
            with full_precision(), torch.device("cpu"):
                self._known[name] = self._makers[name]()
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def _unknown(self, name: str) -> str:
        if not self._makers:
            return f"no voice {name!r}: {self.directory.path} has no {STORED}, so name a file of voices in the recipe"
        near = difflib.get_close_matches(name, self._makers, 1)
        names = ", ".join(list(self._makers)[:20]) + (", ..." if len(self._makers) > 20 else "")
        return f"no voice {name!r}: {f'did you mean {near[0]!r}? ' if near else ''}There are {names}"

    @cached_property
    def _tokenizer(self) -> CosyVoiceTokenizer:
        return CosyVoiceTokenizer(str(self.directory.path), batch_size=1)

    @cached_property
    def _encoder(self) -> SpeakerEncoder:
        return SpeakerEncoder(str(self.directory.path))

    def _record(self, row: VoiceRow) -> Voice:
        """The voice of a recording."""
        frames = self.directory.frames
        try:
            # From the file to each rate in one step, as resampling twice would lose twice.
            fine, coarse = (load_audio(row.audio, rate, MAX_SECONDS) for rate in (frames.sample_rate, SAMPLE_RATE))
            mel = acoustic_mel(
                fine[None],
                fmax=frames.fmax,
                sample_rate=frames.sample_rate,
                fft_samples=frames.fft_samples,
                hop_samples=frames.hop_samples,
                mel_channels=frames.mel_channels,
                fmin=frames.fmin,
            )[0]
            speech = tuple(self._tokenizer.encode([coarse])[0].tolist())
            voice = Voice(row.speaker, row.mode, row.text, row.instruct, speech, mel, self._encoder.encode([coarse])[0])
            return aligned(voice, frames.frames_per_token)
        except AudioError as error:  # which names the file
            raise ValueError(f"{row.where}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{row.where}: {row.audio}: {error}") from None

    def _unpack(self, name: str, entry: Mapping[str, Any]) -> Voice:
        """The voice of an entry of ``spk2info.pt``: just a vector, or all that a recording gives."""
        where = f"{self.directory.path / STORED}: speaker {name!r}"
        if not any(key in entry for key in _COMPLETE.values()):
            return Voice(name, "sft", "", "", (), None, _tensor(entry, "embedding", where).float().flatten())
        speech, mel, vector = (_tensor(entry, key, where) for key in _COMPLETE.values())
        ids = _tensor(entry, "prompt_text", where).flatten().tolist() if "prompt_text" in entry else []
        text = bare_transcript(TextTokenizer(self.directory.backbone, self.directory.family).decode(ids)) if ids else ""
        mode: Mode = "zero_shot" if text else "cross_lingual"
        speech_tokens = tuple(map(int, speech.flatten().tolist()))
        if mel.shape[-1] != self.directory.frames.mel_channels:
            raise ValueError(f"{where}: expected mel frames last in {_COMPLETE['mel']}, got shape {tuple(mel.shape)}")
        frames = mel.float().reshape(-1, mel.shape[-1])  # :: (1, f, m) -> (f, m)
        voice = Voice(name, mode, text, "", speech_tokens, frames, vector.float().flatten())
        return aligned(voice, self.directory.frames.frames_per_token)


def aligned(voice: Voice, frames_per_token: int) -> Voice:
    """The voice with speech tokens and mel cut to the same time.

    Args:
        voice: as its recording gives it.
        frames_per_token: mel frames for each token.

    Raises:
        ValueError: nothing is left.
    """
    assert voice.mel is not None
    count = min(len(voice.mel) // frames_per_token, len(voice.speech))
    if not count:
        raise ValueError(f"the recording of {voice.name!r} is too short to give a speech token")
    return replace(voice, speech=voice.speech[:count], mel=voice.mel[: count * frames_per_token])


def open_voices(directory: str, path: str | None = None) -> Voices:
    """The voices of a directory and a file; asked again, the same object, unless a file has changed.

    Args:
        directory: of the model.
        path: of a file of voices.
    """
    folder = Path(directory).resolve()
    file = None if path is None else Path(path).resolve()
    return _opened(folder, file, _changed(folder / STORED), _changed(file))


@lru_cache(maxsize=8)
def _opened(directory: Path, path: Path | None, *changed: int) -> Voices:
    return Voices(ModelDirectory.find(directory), path)


def _changed(path: Path | None) -> int:
    return path.stat().st_mtime_ns if path is not None and path.is_file() else 0


def _read_stored(directory: ModelDirectory) -> dict[str, Mapping[str, Any]]:
    path = directory.path / STORED
    if not path.is_file():
        return {}
    stored = load_tensors(path)
    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and isinstance(entry, Mapping) for name, entry in stored.items()
    ):
        raise ValueError(f"{path}: expected a dictionary of names and what is known of each voice")
    return stored


def _tensor(entry: Mapping[str, Any], key: str, where: str) -> Tensor:
    value = entry.get(key)
    if not isinstance(value, Tensor) or not value.numel():
        what = "nothing" if value is None else f"an empty one or {type(value).__name__}"
        raise ValueError(f"{where}: expected a tensor {key}, got {what}; it has {', '.join(map(str, entry)) or 'none'}")
    return value
