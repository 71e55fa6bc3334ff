# SPDX-License-Identifier: Apache-2.0
"""Sound beside the speech tokens: a CosyVoice model speaks to files, the same however the work is cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from sources import sound
from talker import Module, Talker, make_prompts
from tiny_directory import FAMILIES, make_directory

from tts_align.cli.sample import WRITTEN, remove_stale, sample
from tts_align.data.manifest import read_manifest
from tts_align.evaluation.parts import Parts
from tts_align.models.base.generation import Context, Sampling
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.cosyvoice.lm import CosyVoiceLM
from tts_align.models.cosyvoice.vocoder import CosyVoiceVocoder
from tts_align.utils.files import read_json_lines

pytestmark = pytest.mark.whole_runs

SAMPLING = Sampling(min_ratio=0.5, max_ratio=3.0)
VOICES = ("known", "cloned", "clear", "hushed", "foreign")
SAMPLES_PER_CODE = 960


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Many small products wait for each other otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_voices(folder: Path) -> Path:
    """Recordings in three modes, at three rates, one of them with two channels."""
    lines = (
        ("clear.wav", 16_000, 1, {"speaker": "clear", "text": "Hello."}),
        ("hushed.flac", 44_100, 2, {"speaker": "hushed", "instruct": "Whisper."}),
        ("foreign.wav", 22_050, 1, {"speaker": "foreign"}),
    )
    rows = []
    for seed, (name, rate, channels, columns) in enumerate(lines):
        wave = np.stack([sound(seed + channel, 0.6, rate) for channel in range(channels)], 1)
        soundfile.write(folder / name, wave, rate)
        rows.append(columns | {"audio": name})
    (folder / "voices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "voices.jsonl"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both families' directories, voices and sentences."""
    folder = tmp_path_factory.mktemp("speaking")
    for family in FAMILIES:
        make_directory(folder / family, family, voices=True)
    save_voices(folder)
    rows = [
        {"id": "a", "text": "Hello"},
        {"id": "b", "text": "Bye."},
        {"id": "c/d", "text": "Well", "speaker": "known"},
    ]
    (folder / "sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def parts(place: Path, family: str) -> Parts:
    """What a recipe would build."""
    policy, vocoder = CosyVoiceLM(str(place / family), voices=str(place / "voices.jsonl")), CosyVoiceVocoder()
    vocoder.bind(policy)
    return Parts(policy, None, SAMPLING, vocoder)


def speak(module: Parts, place: Path, out: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Rows by name, with their sound."""
    sentences = place / "sentences.jsonl"
    sample(module, sentences, out, 1, VOICES, audio=True, **options)
    return heard(out) if out.exists() else {}


def heard(out: Path) -> dict[str, dict[str, Any]]:
    rows = {}
    for _, row in read_json_lines(out):
        if row["speech"]:
            row["wave"], row["rate"] = soundfile.read(out.parent / row["audio"])
        rows[row["id"]] = row
    return rows


def same(one: Mapping[str, dict[str, Any]], other: Mapping[str, dict[str, Any]]) -> None:
    assert one.keys() == other.keys()
    for name, row in one.items():
        assert row["speech"] == other[name]["speech"], name
        if row["speech"]:  # 16 bit: one step is 3e-5
            np.testing.assert_allclose(row["wave"], other[name]["wave"], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_speech_and_sound_depend_on_neither_batches_nor_processes(family: str, place: Path, tmp_path: Path):
    module = parts(place, family)
    together = speak(module, place, tmp_path / "one" / "out.jsonl", batch_rows=8)
    assert len(together) == 2 * len(VOICES) + 1
    for row in together.values():
        assert row["rate"] == 24_000
        assert len(row["wave"]) == SAMPLES_PER_CODE * len(row["speech"])
        assert np.abs(row["wave"]).max() > 1e-3
    same(together, speak(parts(place, family), place, tmp_path / "two" / "out.jsonl", batch_rows=1))
    for rank in (1, 0):
        shared = speak(module, place, tmp_path / "three" / "out.jsonl", batch_rows=5, rank=rank, world=2)
    same(together, shared)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_voice_reaches_the_language_model_as_its_mode_says(family: str, place: Path):
    policy = parts(place, family).policy
    assert policy.speakers == ("clear", "hushed", "foreign", "known", "cloned")
    told = {name: policy.encode_text("Bye.", Context(name)) for name in VOICES}
    assert isinstance(policy, CosyVoiceLM)
    before = {name: policy.text.decode(one.text[: one.prefix]) for name, one in told.items()}
    assistant = {"cosyvoice2": "", "cosyvoice3": "You are a helpful assistant.<|endofprompt|>"}[family]
    whisper = {"cosyvoice2": "", "cosyvoice3": "You are a helpful assistant. "}[family] + "Whisper.<|endofprompt|>"
    hello = f"{assistant}Hello."
    expected = {"known": assistant, "cloned": hello, "clear": hello, "hushed": whisper, "foreign": assistant}
    assert before == expected
    assert [name for name in VOICES if told[name].prompt_speech] == ["cloned", "clear"]
    assert {policy.text.decode(one.text[one.prefix :]) for one in told.values()} == {"Bye."}


def test_with_labels_it_is_a_manifest(place: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    speak(parts(place, "cosyvoice2"), place, out)
    spoken = [row for _, row in read_json_lines(out) if row["speech"]]
    lines = [json.dumps(row | {"label": bool(i % 2)}) for i, row in enumerate(spoken)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(lines))
    manifest = read_manifest(tmp_path / "labelled.jsonl")
    assert [(row.id, list(row.speech)) for row in manifest.rows] == [(row["id"], row["speech"]) for row in spoken]
    assert [row.desirable for row in manifest.rows] == [bool(i % 2) for i in range(len(spoken))]
    assert not manifest.ignored


def test_names_of_files_stay_in_the_folder(place: Path, tmp_path: Path):
    rows = speak(parts(place, "cosyvoice2"), place, tmp_path / "out.jsonl")
    assert rows["c/d-known-0"]["audio"] == "out.jsonl.audio/c%2Fd-known-0.wav"  # from where the file is
    assert {path.parent for path in tmp_path.rglob("*.wav")} == {tmp_path / "out.jsonl.audio"}


def test_what_was_made_with_another_vocoder_is_not_mixed(place: Path, tmp_path: Path):
    module = parts(place, "cosyvoice3")
    speak(module, place, tmp_path / "out.jsonl")
    speak(module, place, tmp_path / "out.jsonl")  # finished: nothing to do
    vocoder = CosyVoiceVocoder(steps=2)
    vocoder.bind(module.policy)
    with pytest.raises(ValueError, match="made with other settings or inputs"):
        speak(Parts(module.policy, None, SAMPLING, vocoder), place, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="made with other settings or inputs"):
        sample(module, place / "sentences.jsonl", tmp_path / "out.jsonl", 1, VOICES)  # without sound


@pytest.mark.parametrize(
    ("speakers", "message"),
    [
        (("knwon",), "unknown voices knwon: the policy speaks as clear, hushed"),
        ((), "no voice is named, and there are 5: clear, hushed"),
    ],
)
def test_a_voice_that_is_missing_is_told_before_anything_is_spoken(
    speakers: tuple[str, ...], message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = parts(place, "cosyvoice2")
    monkeypatch.setattr(module.policy, "generate", None)
    with pytest.raises(ValueError, match=message):
        sample(module, place / "sentences.jsonl", tmp_path / "out.jsonl", 1, speakers, audio=True)


def test_sound_needs_a_vocoder(tmp_path: Path):
    with pytest.raises(ValueError, match=r"the recipe must set model\.vocoder, or leave out --audio"):
        sample(Module(vocoder=None), make_prompts(tmp_path), tmp_path / "out.jsonl", audio=True)


class Quiet(Talker):
    """Has nothing to say now and then."""

    def say(self, prompt: Any) -> Any:
        said = super().say(prompt)
        return replace(said, speech=said.speech[:0]) if prompt.seed % 2 else said


class Counting(Vocoder):
    """Counts what it speaks."""

    sample_rate = 8000

    def __init__(self) -> None:
        super().__init__()
        self.spoken = 0

    def speak(self, speech: Any, speakers: Any) -> Any:
        self.spoken += len(speech)
        return [speech_tokens / 100 for speech_tokens in speech]


def test_empty_utterances_get_no_file(tmp_path: Path):
    vocoder, folder = Counting(), tmp_path / "out.jsonl.audio"
    out = sample(Module(Quiet(), vocoder=vocoder), make_prompts(tmp_path), tmp_path / "out.jsonl", 4, audio=True)
    rows = heard(out)
    assert {bool(row["speech"]) for row in rows.values()} == {True, False}
    assert {name for name, row in rows.items() if "audio" in row} == {
        name for name, row in rows.items() if row["speech"]
    }
    assert vocoder.spoken == len(list(folder.glob("*.wav"))) == sum(bool(row["speech"]) for row in rows.values())
    assert {row["rate"] for row in rows.values() if row["speech"]} == {8000}


def test_a_killed_run_goes_on_and_keeps_its_sounds(tmp_path: Path):
    folder, prompts, first, second = tmp_path / "out.jsonl.audio", make_prompts(tmp_path), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        sample(Module(Talker(2), vocoder=first), prompts, tmp_path / "out.jsonl", 3, batch_rows=5, audio=True)
    sample(Module(vocoder=second), prompts, tmp_path / "out.jsonl", 3, batch_rows=5, audio=True)
    assert (first.spoken, second.spoken) == (10, 2)
    assert len(heard(tmp_path / "out.jsonl")) == len(list(folder.glob("*.wav"))) == 12


def test_recordings_belong_to_their_file_of_candidates(tmp_path: Path):
    """Two commands of the README in one folder: neither takes the other's recordings."""
    prompts = make_prompts(tmp_path)
    waves = {}
    for name, seed in (("drawn", 0), ("spoken", 1)):
        out = sample(Module(vocoder=Counting()), prompts, tmp_path / f"{name}.jsonl", 2, seed=seed, audio=True)
        waves[name] = {key: row["wave"] for key, row in heard(out).items() if row["speech"]}
    assert waves["drawn"].keys() == waves["spoken"].keys()
    for name, before in waves.items():
        for key, row in heard(tmp_path / f"{name}.jsonl").items():
            np.testing.assert_array_equal(row["wave"], before[key])


@pytest.mark.parametrize("audio", [True, False])
def test_recordings_of_earlier_candidates_do_not_stay(audio: bool, tmp_path: Path):
    prompts, out = make_prompts(tmp_path), tmp_path / "out.jsonl"
    sample(Module(vocoder=Counting()), prompts, out, 3, audio=True)
    before = {path.name for path in (tmp_path / "out.jsonl.audio").glob("*.wav")}
    (tmp_path / "out.jsonl.audio/of-the-user.wav").write_bytes(b"")
    sample(Module(vocoder=Counting()), prompts, out, 2, audio=audio, overwrite=True)
    named = {Path(row["audio"]).name for _, row in read_json_lines(out) if "audio" in row}
    there = {path.name for path in (tmp_path / "out.jsonl.audio").glob("*.wav")}
    assert there == named | {"of-the-user.wav"}
    assert named < before
    assert bool(named) is audio


@pytest.mark.parametrize(
    "note",
    ["7", '{"a.wav": 1}', "[1", "[[1], 2]", '["", "..", "kept", "/x", "\\u0000"]', f'["{"x" * 300}"]', "[" * 100_000],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_note_that_lists_no_names_removes_nothing(named: bool, note: str, tmp_path: Path):
    folder = tmp_path / "out.jsonl.audio"
    (folder / "kept").mkdir(parents=True)
    (folder / WRITTEN).write_text(note)
    remove_stale(folder, [{"audio": "out.jsonl.audio/a.wav"}] if named else [])
    assert (folder / "kept").is_dir()
    assert (folder / WRITTEN).is_file() is named
    assert not named or json.loads((folder / WRITTEN).read_text()) == ["a.wav"]


def test_another_voice_of_the_same_name_is_spoken_anew(place: Path, tmp_path: Path):
    listed = tmp_path / "voices.jsonl"
    rows = [json.loads(line) for line in (place / "voices.jsonl").read_text().splitlines()]
    audio = str((place / rows[0]["audio"]).resolve())
    (tmp_path / "s.jsonl").write_text(json.dumps({"id": "a", "text": "Bye."}) + "\n")
    for text in ("One.", "Two."):
        listed.write_text(json.dumps({"speaker": "me", "audio": audio, "text": text}) + "\n")
        policy = CosyVoiceLM(str(place / "cosyvoice2"), voices=str(listed))
        module = Parts(policy, None, SAMPLING, None)
        if text == "One.":
            sample(module, tmp_path / "s.jsonl", tmp_path / "out.jsonl", 1, ("me",))
    with pytest.raises(ValueError, match="other settings"):
        sample(module, tmp_path / "s.jsonl", tmp_path / "out.jsonl", 1, ("me",))
