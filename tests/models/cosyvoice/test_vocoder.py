# SPDX-License-Identifier: Apache-2.0
"""From tokens to sound: nobody hears his neighbours, nothing is read too early, and errors name what is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sources import sound_file
from tiny import SIZES
from tiny_directory import FAMILIES, make_directory
from torch import Tensor

from tts_align.models.cosyvoice import vocoder as place
from tts_align.models.cosyvoice.lm import CosyVoiceLM
from tts_align.models.cosyvoice.vocoder import LONGEST_SILENCE, SILENT, CosyVoiceVocoder, thin_silence
from tts_align.models.policy.qwen2 import Qwen2CodecLM

FRAME = 480
SPEAKERS = ["known", "cloned", "cloned", "known", "known", "cloned"]
LENGTHS = [9, 3, 17, 1, 0, 6]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each family, with two voices: a vector, and a recording."""
    root = tmp_path_factory.mktemp("vocoder")
    return {family: make_directory(root / family, family, voices=True) for family in FAMILIES}


def utterances(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (length,), generator=random) for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_utterance_sounds_the_same_in_any_company(family: str, directories: dict[str, Path]):
    speech, directory = utterances(), str(directories[family])
    together = CosyVoiceVocoder(directory).speak(speech, SPEAKERS)
    in_pairs = CosyVoiceVocoder(directory, batch_size=2).speak(speech, SPEAKERS)
    lonely = CosyVoiceVocoder(directory)
    alone = [lonely.speak([one], [name])[0] for one, name in zip(speech, SPEAKERS, strict=True)]
    for speech_tokens, wave, *others in zip(speech, together, in_pairs, alone, strict=True):
        assert len(wave) == len(speech_tokens) * 2 * FRAME
        assert wave.isfinite().all()
        assert not len(speech_tokens) or wave.abs().max() > 1e-3
        for other in others:
            torch.testing.assert_close(other, wave, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_the_same_again_and_something_else_in_another_voice(family: str, directories: dict[str, Path]):
    speech = utterances([8])
    first, second = (CosyVoiceVocoder(str(directories[family])) for _ in range(2))
    torch.manual_seed(1)
    wave = first.speak(speech, ["known"])[0]
    torch.manual_seed(2)
    assert torch.equal(second.speak(speech, ["known"])[0], wave)
    assert torch.equal(first.speak(speech, ["known"])[0], wave)
    assert (first.speak(speech, ["cloned"])[0] - wave).abs().max() > 1e-3
    assert (first.speak(utterances([8], seed=1), ["known"])[0] - wave).abs().max() > 1e-3


@pytest.mark.parametrize("change", [{"steps": 3}, {"guidance": 0.0}])
def test_settings_are_heard(change: dict[str, Any], directories: dict[str, Path]):
    plain, other = (CosyVoiceVocoder(str(directories["cosyvoice3"]), **knobs) for knobs in ({}, change))
    one, two = (vocoder.speak(utterances([5]), ["known"])[0] for vocoder in (plain, other))
    assert (one - two).abs().max() > 1e-4
    assert plain.digest() != other.digest()


def test_nothing_to_say_is_no_sound(directories: dict[str, Path]):
    vocoder = CosyVoiceVocoder(str(directories["cosyvoice2"]))
    assert vocoder.speak([], []) == []
    [wave] = vocoder.speak([torch.zeros(0, dtype=torch.long)], ["known"])
    assert wave.shape == (0,)
    assert not vocoder._nets  # nor was anything read for it


def test_silence_is_thinned_in_version_3_only(directories: dict[str, Path]):
    speech_tokens = torch.tensor([7, *[1, 2, 28, 29] * 3, 8])  # twelve silent ones
    for family, expected in (("cosyvoice2", 14), ("cosyvoice3", 2 + LONGEST_SILENCE)):
        [wave] = CosyVoiceVocoder(str(directories[family])).speak([speech_tokens], ["known"])
        assert len(wave) == expected * 2 * FRAME


@pytest.mark.parametrize(
    ("speech_tokens", "kept"),
    [
        ([], []),
        ([1] * 5, [1] * 5),
        ([1] * 6, [1] * 5),
        ([2322, 1, 55, 248, 494, 2241, 9, 1, 1], [2322, 1, 55, 248, 494, 9, 1, 1]),
        ([3] * 9, [3] * 9),
        ([3, *[2] * 7, 3, *[2] * 7], [3, *[2] * 5, 3, *[2] * 5]),
    ],
)
def test_thin_silence(speech_tokens: list[int], kept: list[int]):
    assert thin_silence(torch.tensor(speech_tokens, dtype=torch.long)).tolist() == kept


def test_thin_silence_against_text():
    """The same rule as a regular expression over letters."""
    random = torch.Generator().manual_seed(0)
    table = torch.tensor([*sorted(SILENT), *range(3000, 3006)])
    for length in range(0, 60, 3):
        speech_tokens = table[torch.randint(len(table), (length,), generator=random)]
        letters = "".join("s" if code in SILENT else "." for code in speech_tokens.tolist())
        kept = [
            at
            for run in re.finditer(r"s+|\.+", letters)
            for at in range(run.start(), min(run.end(), run.start() + 5) if run[0][0] == "s" else run.end())
        ]
        assert thin_silence(speech_tokens).tolist() == speech_tokens[kept].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_adversarial_training_will_do(family: str, directories: dict[str, Path], tmp_path: Path):
    copy = tmp_path / family
    shutil.copytree(directories[family], copy)
    state = torch.load(copy / "hift.pt", weights_only=True)
    trained = {f"generator.{key}": value for key, value in state.items()}
    trained |= {"discriminator.mpd.discriminators.0.convs.0.bias": torch.zeros(3)}
    torch.save({**trained, "epoch": 3, "step": 700}, copy / "hift.pt")
    plain, other = (
        CosyVoiceVocoder(str(path)).speak(utterances([6]), ["known"])[0] for path in (directories[family], copy)
    )
    assert torch.equal(plain, other)


@pytest.fixture
def voices(tmp_path: Path) -> str:
    """A file of one voice that has half a second to be imitated."""
    (tmp_path / "a.wav").write_bytes(sound_file(1))
    (tmp_path / "voices.jsonl").write_text(json.dumps({"speaker": "anna", "audio": "a.wav"}) + "\n")
    return str(tmp_path / "voices.jsonl")


def test_what_the_recipe_leaves_out_comes_from_the_policy(
    directories: dict[str, Path], voices: str, monkeypatch: pytest.MonkeyPatch
):
    def unread(*_: Any) -> None:
        raise AssertionError("nobody has listened yet")

    policy = CosyVoiceLM(str(directories["cosyvoice3"]), voices=voices)
    with monkeypatch.context() as patch:
        for name in ("load_state", "load_flow", "load_hift"):
            patch.setattr(place, name, unread)
        vocoder = CosyVoiceVocoder()
        assert not vocoder.state_dict()
        assert not list(vocoder.parameters())
        vocoder.bind(policy)
        assert vocoder.sample_rate == 24_000
        assert set(vocoder.voices) == {"known", "cloned", "anna"}
    assert vocoder.directory.path == directories["cosyvoice3"]
    assert len(vocoder.speak(utterances([4]), ["anna"])[0]) == 4 * 2 * FRAME
    assert not vocoder.state_dict()  # nor do checkpoints hold it now


def test_what_the_recipe_says_stays(directories: dict[str, Path], voices: str):
    vocoder = CosyVoiceVocoder(str(directories["cosyvoice2"]), voices)
    vocoder.bind(CosyVoiceLM(str(directories["cosyvoice3"]), voices="others.jsonl"))
    assert vocoder.directory.path == directories["cosyvoice2"]
    assert vocoder.voices_path == voices


def test_without_a_directory_anywhere_it_says_so():
    with pytest.raises(ValueError, match=r"model\.vocoder\.directory is missing: the policy is not a CosyVoice"):
        CosyVoiceVocoder().bind(Qwen2CodecLM(sizes=SIZES))
    with pytest.raises(ValueError, match=r"model\.vocoder\.directory is missing: name a CosyVoice directory"):
        CosyVoiceVocoder().speak(utterances([2]), ["known"])


def test_voices_that_are_not_there_are_named(directories: dict[str, Path]):
    vocoder = CosyVoiceVocoder(str(directories["cosyvoice2"]))
    for ask in (lambda: vocoder.speak(utterances([2]), ["knwon"]), lambda: vocoder.check_speakers(["cloned", "knwon"])):
        with pytest.raises(ValueError, match="no voice 'knwon': did you mean 'known'"):
            ask()
    vocoder.check_speakers(["cloned", "known"])


@pytest.mark.parametrize("knobs", [{"steps": 0}, {"batch_size": 0}, {"guidance": -0.1}])
def test_settings_that_cannot_work(knobs: dict[str, Any]):
    with pytest.raises(ValueError, match="steps and batch_size must be at least 1 and guidance not negative"):
        CosyVoiceVocoder(**knobs)


def test_the_digest_follows_the_files(tmp_path: Path, voices: str):
    directory = make_directory(tmp_path / "model", "cosyvoice2")
    seen = {digest := CosyVoiceVocoder(str(directory)).digest()}
    assert CosyVoiceVocoder(str(directory), batch_size=1).digest() == digest  # which changes nothing
    seen.add(CosyVoiceVocoder(str(directory), voices).digest())
    for name in ("flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v2.batch.onnx", "cosyvoice2.yaml"):
        stat = (directory / name).stat()
        os.utime(directory / name, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        seen.add(CosyVoiceVocoder(str(directory)).digest())
    (tmp_path / "a.wav").write_bytes(sound_file(2, 0.7))
    seen.add(CosyVoiceVocoder(str(directory), voices).digest())
    assert len(seen) == 8
    before = CosyVoiceVocoder(str(directory)).digest()
    (directory / "llm.pt").touch()  # is not heard
    assert CosyVoiceVocoder(str(directory)).digest() == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_no_precision_of_a_trainer_is_heard(family: str, precision: str, directories: dict[str, Path], tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(sound_file(1, seconds=1.0))
    (tmp_path / "voices.jsonl").write_text(json.dumps({"speaker": "a", "audio": "a.wav"}) + "\n")
    speech, speakers = utterances([7, 4]), ["known", "a"]

    def spoken() -> list[Tensor]:
        vocoder = CosyVoiceVocoder(str(directories[family]), str(tmp_path / "voices.jsonl"))
        vocoder.voices._known.clear()
        return vocoder.speak(speech, speakers)

    expected = spoken()
    if precision == "bf16-mixed":
        with torch.autocast("cpu", torch.bfloat16):
            found = spoken()
    else:
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = spoken()
            assert torch.get_default_dtype() == torch.bfloat16
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_noise_is_the_voices_own(directories: dict[str, Path]) -> None:
    """The same tokens in two voices are not told apart by the flow alone: version 2's noise is drawn for each."""
    vocoder = CosyVoiceVocoder(str(directories["cosyvoice2"]))
    speech_tokens = torch.arange(6)
    mel = vocoder._mels([speech_tokens], [vocoder.voices["known"]])[0]
    one, again, other = (vocoder._wave(mel, speech_tokens, speaker) for speaker in ("known", "known", "cloned"))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
