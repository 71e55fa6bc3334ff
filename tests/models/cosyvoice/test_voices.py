# SPDX-License-Identifier: Apache-2.0
"""Voices come from recordings or from the model's own file; speech tokens and mel of each cover the same time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from onnx_models import save_directory

from tts_align.models.cosyvoice.directory import ModelDirectory
from tts_align.models.cosyvoice.features import acoustic_mel
from tts_align.models.cosyvoice.frontend import CosyVoiceTokenizer, SpeakerEncoder
from tts_align.models.cosyvoice.text import TextTokenizer
from tts_align.models.cosyvoice.voices import Voices, open_voices
from tts_align.utils.audio import load_audio

ASSISTANT = "You are a helpful assistant.<|endofprompt|>"


@pytest.fixture(scope="module", params=["cosyvoice2", "cosyvoice3"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    return ModelDirectory.find(save_directory(tmp_path_factory.mktemp("models") / "model", request.param))


def record(path: Path, seconds: float = 1.0, rate: int = 16000, channels: int = 1, seed: int = 0) -> Path:
    samples = np.random.default_rng(seed).normal(size=(round(seconds * rate), channels)) / 9
    soundfile.write(path, samples, rate)
    return path


def listed(folder: Path, *rows: dict) -> Path:
    path = folder / "voices.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 22051, 24000, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_recording_becomes_a_voice(directory: ModelDirectory, tmp_path: Path, rate: int, channels: int):
    audio = record(tmp_path / "a.wav", 1.27, rate, channels)
    path = listed(tmp_path, {"speaker": "Ann", "audio": "a.wav", "text": "Hello there."})
    voice = Voices(directory, path)["Ann"]
    assert (voice.name, voice.mode, voice.prompt_text, voice.instruct) == ("Ann", "zero_shot", "Hello there.", "")
    assert len(voice.mel) == 2 * len(voice.speech)
    assert len(voice.speech) == 31  # 63 frames of mel are the shorter side; 127 frames gave 32 speech tokens
    fine, coarse = load_audio(audio, 24000), load_audio(audio, 16000)
    mel = acoustic_mel(fine[None], fmax=8000.0 if directory.family == "cosyvoice2" else None)[0]
    assert torch.equal(voice.mel, mel[:62])
    speech_tokens = CosyVoiceTokenizer(str(directory.path), batch_size=1).encode([coarse])[0]
    assert voice.speech == tuple(speech_tokens[:31].tolist())
    assert torch.equal(voice.vector, SpeakerEncoder(str(directory.path)).encode([coarse])[0])


@pytest.mark.parametrize("samples", [1280, 1599, 1600, 1919, 1920, 2000, 9737])
def test_codes_and_mel_cover_the_same_time(directory: ModelDirectory, tmp_path: Path, samples: int):
    record(tmp_path / "a.wav", samples / 16000)
    voice = Voices(directory, listed(tmp_path, {"speaker": "a", "audio": "a.wav"}))["a"]
    mel_frames, tokens = -(-samples * 3 // 2) // 480, -(-(samples // 160) // 4)
    assert len(voice.speech) == min(mel_frames // 2, tokens)
    assert len(voice.mel) == 2 * len(voice.speech)


@pytest.mark.parametrize(
    ("columns", "mode", "text", "instruct"),
    [
        ({}, "cross_lingual", "", ""),
        ({"text": ""}, "cross_lingual", "", ""),
        ({"text": "Hi."}, "zero_shot", "Hi.", ""),
        ({"text": f"{ASSISTANT}Hi."}, "zero_shot", "Hi.", ""),
        ({"text": "Hi.", "mode": "cross_lingual"}, "cross_lingual", "", ""),
        ({"instruct": "Whisper."}, "instruct", "", "Whisper."),
        ({"instruct": "Whisper.", "text": "Hi."}, "instruct", "", "Whisper."),
        ({"instruct": None, "text": "Hi.", "mode": None}, "zero_shot", "Hi.", ""),
    ],
)
def test_what_the_language_model_gets(
    directory: ModelDirectory, tmp_path: Path, columns: dict, mode: str, text: str, instruct: str
):
    record(tmp_path / "a.wav")
    voice = Voices(directory, listed(tmp_path, {"speaker": "a", "audio": "a.wav"} | columns))["a"]
    assert (voice.mode, voice.prompt_text, voice.instruct) == (mode, text, instruct)
    assert len(voice.speech) == 25  # the flow gets them in every mode


WRONG_ROWS = [
    ({"audio": "a.wav"}, "speaker must be given"),
    ({"speaker": "b", "text": "Hi."}, "audio must be given"),
    ({"speaker": "b", "audio": "a.wav", "txt": "Hi."}, "unknown column 'txt': did you mean 'text'"),
    ({"speaker": "b", "audio": "a.wav", "zzzzzz": "Hi."}, "unknown column 'zzzzzz': expected speaker, audio"),
    ({"speaker": 3, "audio": "a.wav"}, "speaker: expected words, got 3"),
    ({"speaker": "b", "audio": "none.wav"}, "there is no recording .*none.wav"),
    ({"speaker": "b", "audio": "a.wav", "mode": "loud"}, "mode 'loud': expected zero_shot, cross_lingual, instruct"),
    ({"speaker": "b", "audio": "a.wav", "mode": "sft"}, "mode 'sft': voices of sft come from spk2info.pt"),
    ({"speaker": "b", "audio": "a.wav", "mode": "zero_shot"}, "needs text, the transcript"),
    ({"speaker": "b", "audio": "a.wav", "mode": "instruct"}, "mode instruct needs an instruct"),
    ({"speaker": "b", "audio": "a.wav", "mode": "cross_lingual", "instruct": "x"}, "takes no instruct"),
    ({"speaker": "b", "audio": "a.wav", "text": "Be brief.<|endofprompt|>Hi."}, "is the transcript only"),
    ({"speaker": "a", "audio": "a.wav"}, r"speaker 'a' is taken by .*voices\.jsonl:1"),
]


@pytest.mark.parametrize(("row", "what"), WRONG_ROWS, ids=[str(i) for i in range(len(WRONG_ROWS))])
def test_wrong_lines_are_named_at_once(directory: ModelDirectory, tmp_path: Path, row: dict, what: str):
    record(tmp_path / "a.wav")
    path = listed(tmp_path, {"speaker": "a", "audio": "a.wav"}, row)
    with pytest.raises(ValueError, match=rf"voices\.jsonl:2: .*{what}"):
        Voices(directory, path)


def test_files_without_voices_are_named(directory: ModelDirectory, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no file of voices .*voices\.jsonl"):
        Voices(directory, tmp_path / "voices.jsonl")
    with pytest.raises(ValueError, match=r"voices\.jsonl holds no voices"):
        Voices(directory, listed(tmp_path))


@pytest.mark.parametrize(
    ("seconds", "rate", "what"),
    [
        (30.1, 16000, r"lasts 30\.1 s, expected at most 30 s"),
        (0.0, 16000, "is empty"),
        (0.035, 16000, "too short to give a speech token"),
        (0.01, 16000, "expected at least"),
    ],
)
def test_recordings_that_cannot_be_used(
    directory: ModelDirectory, tmp_path: Path, seconds: float, rate: int, what: str
):
    record(tmp_path / "a.wav", seconds, rate)
    voices = Voices(directory, listed(tmp_path, {"speaker": "a", "audio": "a.wav"}))
    with pytest.raises(ValueError, match=rf"voices\.jsonl:1: \S*a\.wav: .*{what}"):
        _ = voices["a"]


def test_silent_and_unreadable_recordings(directory: ModelDirectory, tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    (tmp_path / "b.wav").write_bytes(b"no sound")
    rows = [{"speaker": name, "audio": f"{name}.wav"} for name in "ab"]
    voices = Voices(directory, listed(tmp_path, *rows))
    with pytest.raises(ValueError, match=r"voices\.jsonl:1: .*a\.wav: is silent"):
        _ = voices["a"]
    with pytest.raises(ValueError, match=r"voices\.jsonl:2: .*b\.wav: cannot be read"):
        _ = voices["b"]


def test_a_voice_is_computed_once_and_only_if_asked_for(directory: ModelDirectory, tmp_path: Path):
    record(tmp_path / "a.wav")
    (tmp_path / "b.wav").write_bytes(b"no sound")
    voices = Voices(directory, listed(tmp_path, *({"speaker": name, "audio": f"{name}.wav"} for name in "ab")))
    first = voices["a"]
    (tmp_path / "a.wav").unlink()
    assert voices["a"] is first
    assert (list(voices), len(voices), "a" in voices, "c" in voices) == (["a", "b"], 2, True, False)


def test_an_unknown_speaker_is_told_who_is_there(directory: ModelDirectory, tmp_path: Path):
    record(tmp_path / "a.wav")
    rows = [{"speaker": name, "audio": "a.wav"} for name in ("Hanako", "Taro")]
    voices = Voices(directory, listed(tmp_path, *rows))
    with pytest.raises(ValueError, match=r"^no voice 'Hanaka': did you mean 'Hanako'\? There are Hanako, Taro$"):
        _ = voices["Hanaka"]
    with pytest.raises(ValueError, match="no voice 'x': There are Hanako, Taro"):
        _ = voices["x"]
    with pytest.raises(ValueError, match=r"no voice 'x': .* has no spk2info\.pt, so name a file of voices"):
        _ = Voices(directory)["x"]
    assert voices.get("x") is None


def stored(**others: object) -> dict[str, object]:
    """An entry as the published frontend keeps it for later zero-shot use."""
    chance = torch.Generator().manual_seed(3)
    speech_tokens = torch.randint(0, 300, (1, 12), generator=chance, dtype=torch.int32)
    entry: dict[str, object] = {}
    for part in ("llm", "flow"):
        entry[f"{part}_prompt_speech_token"] = speech_tokens
        entry[f"{part}_prompt_speech_token_len"] = torch.tensor([12], dtype=torch.int32)
        entry[f"{part}_embedding"] = torch.randn(1, 192, generator=chance)
    entry["prompt_speech_feat"] = torch.randn(1, 24, 80, generator=chance)
    entry["prompt_speech_feat_len"] = torch.tensor([24], dtype=torch.int32)
    return entry | others


@pytest.fixture(params=["cosyvoice2", "cosyvoice3"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> ModelDirectory:
    return ModelDirectory.find(save_directory(tmp_path / "model", request.param))


def test_voices_stored_with_the_model(fresh: ModelDirectory, tmp_path: Path):
    text = f"{ASSISTANT}Hello." if fresh.family == "cosyvoice3" else "Hello."
    ids = torch.tensor([TextTokenizer(fresh.backbone, fresh.family).encode(text)], dtype=torch.int32)
    full, plain = stored(prompt_text=ids), torch.randn(1, 192)
    torch.save({"full": full, "plain": {"embedding": plain}, "mute": stored()}, fresh.path / "spk2info.pt")
    record(tmp_path / "a.wav")
    voices = Voices(fresh, listed(tmp_path, {"speaker": "a", "audio": "a.wav"}))
    assert list(voices) == ["a", "full", "plain", "mute"]
    voice = voices["full"]
    assert (voice.mode, voice.prompt_text, voice.instruct) == ("zero_shot", "Hello.", "")
    assert voice.speech == tuple(full["flow_prompt_speech_token"][0].tolist())
    assert torch.equal(voice.mel, full["prompt_speech_feat"][0])
    assert torch.equal(voice.vector, full["flow_embedding"][0])
    voice = voices["plain"]
    assert (voice.mode, voice.speech, voice.mel, voice.prompt_text) == ("sft", (), None, "")
    assert torch.equal(voice.vector, plain[0])
    assert (voices["mute"].mode, voices["mute"].prompt_text) == ("cross_lingual", "")


def test_stored_codes_and_mel_are_cut_too(fresh: ModelDirectory):
    torch.save({"a": stored(prompt_speech_feat=torch.zeros(1, 21, 80))}, fresh.path / "spk2info.pt")
    voice = Voices(fresh)["a"]
    assert (len(voice.speech), len(voice.mel)) == (10, 20)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([1], "expected a dictionary of names"),
        ({"a": torch.ones(192)}, "expected a dictionary of names"),
        ({"a": {}}, "speaker 'a': expected a tensor embedding, got nothing; it has none"),
        ({"a": {"embedding": [0.1]}}, "speaker 'a': expected a tensor embedding, got .* list; it has embedding"),
        ({"a": {"flow_embedding": torch.ones(1, 192)}}, "expected a tensor flow_prompt_speech_token, got nothing"),
        (
            {"a": stored(prompt_speech_feat=torch.zeros(1, 80, 24))},
            r"expected mel frames last .* got shape \(1, 80, 24\)",
        ),
    ],
)
def test_damaged_stores_are_named(fresh: ModelDirectory, content: object, what: str):
    torch.save(content, fresh.path / "spk2info.pt")
    with pytest.raises(ValueError, match=rf"spk2info\.pt: {what}|spk2info\.pt: .*{what}"):
        _ = Voices(fresh)["a"]


def test_names_are_not_taken_twice(fresh: ModelDirectory, tmp_path: Path):
    torch.save({"a": {"embedding": torch.ones(192)}}, fresh.path / "spk2info.pt")
    record(tmp_path / "a.wav")
    with pytest.raises(ValueError, match=r"names 'a', which .*spk2info\.pt has too: rename it"):
        Voices(fresh, listed(tmp_path, {"speaker": "a", "audio": "a.wav"}))


def test_policy_and_vocoder_share_voices(fresh: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record(tmp_path / "a.wav")
    path = listed(tmp_path, {"speaker": "a", "audio": "a.wav"})
    opened = open_voices(str(fresh.path), str(path))
    monkeypatch.chdir(tmp_path)
    assert open_voices("model", "voices.jsonl") is opened
    assert open_voices("model") is not opened
    assert open_voices("model") is open_voices(str(fresh.path), None)
    listed(tmp_path, {"speaker": "b", "audio": "a.wav"})
    os.utime(path, ns=(1, 1))  # two writes may fall into one tick of the clock
    assert list(open_voices("model", "voices.jsonl")) == ["b"]
