# SPDX-License-Identifier: Apache-2.0
"""What a listening test asks, how loud its clips are, and what its page gives away."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from places import ROOT
from studio import READINGS, scored, sentences, sound, wavs

from tts_align.cli.listen import make
from tts_align.evaluation.listening_test.design import Plan
from tts_align.evaluation.listening_test.records import KINDS, Key, ListeningTestError
from tts_align.evaluation.listening_test.sound import (
    common_loudness,
    degraded,
    k_weighting,
    loudness,
    tones,
)
from tts_align.evaluation.listening_test.sources import read_systems


def made(
    folder: Path, *systems: Path | str, out: str = "test.html", **plan: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The key, and what the page knows."""
    named = {"sentences": str(plan.pop("file"))} if "file" in plan else {}
    test = make(list(map(str, systems)), folder / out, plan=Plan(**plan), **named)
    return json.loads(test.key.read_text("utf-8")), of_page(test.page)


def of_page(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="test">(.*?)</script>', path.read_text("utf-8"))
    assert found is not None
    return json.loads(found[1])


def clip(page: dict[str, Any], name: str) -> tuple[np.ndarray, int]:
    start, _, data = page["clips"][name].partition(",")
    assert start == "data:audio/flac;base64"
    return soundfile.read(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """A test of a run that asks everything."""
    folder = tmp_path_factory.mktemp("everything")
    return *made(folder, scored(folder / "run"), kinds=KINDS, sentences=3), folder


def test_every_utterance_is_asked_about_once_for_each_system_or_pair(everything: Any):
    key, page, _ = everything
    for section in page["sections"]:
        kind, single = section["kind"], section["kind"] in ("nmos", "reading")
        trials = [key["trials"][trial["id"]] for trial in section["trials"]]
        real = [one for one in trials if not any(key["clips"][name].get("check") for name in one["clips"])]
        assert len(trials) - len(real) == 2, kind  # the checks
        asked = [
            tuple(key["clips"][name]["recording"][what] for name in one["clips"] for what in ("id", "system"))
            for one in real
        ]
        ids = ("s0", "s1", "s3")  # evenly spread
        expected = [(name, system) for name in ids for system in ("base", "aligned")]
        assert sorted(asked) == sorted(expected if single else [(name, "base", name, "aligned") for name in ids])
        assert len(section["training"]) == 1
        taught = key["trials"][section["training"][0]["id"]]
        assert key["clips"][taught["clips"][0]]["recording"]["id"] == "s2"  # of those that do not count
        assert taught["training"]


def test_the_page_gives_nothing_away(everything: Any):
    key, page, folder = everything
    text = (folder / "test.html").read_text("utf-8")
    shown = re.sub(r'"data:audio/flac;base64,[^"]*"', "", text)
    for word in ("aligned", "base", "utterances", str(folder), "run/", "s0", "expected", "check", ".wav", "gain"):
        assert word not in shown.partition('id="test">')[2].partition("</script>")[0], word
    sounds = [clip(page, name) for name in page["clips"]]
    assert {rate for _, rate in sounds} == {16000} == {key["sample_rate"]}
    systems = [key["clips"][name].get("recording", {}).get("system") for name in sorted(page["clips"])]
    assert systems != sorted(systems, key=str)  # the numbers of clips are shuffled
    for trial in page["sections"][0]["trials"]:
        assert set(trial) <= {"id", "kind", "clips", "group", "text", "language"}
    assert "src=" not in text.replace("audio.src = ", "")
    assert "http" not in shown.replace("https://", "http://") or "http://www.w3.org" in shown


def test_a_question_for_a_reading_shows_the_word_and_its_readings(everything: Any):
    key, page, _ = everything
    section = next(one for one in page["sections"] if one["kind"] == "reading")
    for trial in section["trials"]:
        known = key["trials"][trial["id"]]
        if trial.get("tones"):
            assert trial["choices"] == ["2", "3", "4"]
            heard, _ = clip(page, trial["clips"][0])
            loud = np.abs(heard) > 0.05 * np.abs(heard).max()
            blocks = loud[: len(loud) // 160 * 160].reshape(-1, 160).any(1)
            count = int((np.diff(blocks.astype(int)) == 1).sum() + blocks[0])
            assert trial["choices"][int(known["expected"][0])] == str(count)
            continue
        number = int(key["clips"][trial["clips"][0]]["recording"]["id"][1:])
        assert trial["text"][slice(*trial["mark"])] in trial["text"][2:4]
        assert (tuple(trial["choices"]), tuple(known["right"])) == (READINGS[number], READINGS[number][:1])


def test_checks_have_a_known_answer(everything: Any):
    key, page, _ = everything
    for name, trial in key["trials"].items():
        bad = [one for one in trial["clips"] if key["clips"][one].get("check")]
        if not bad or trial["kind"] == "reading":
            continue
        if trial["kind"] == "nmos":
            assert trial["expected"] == ["1", "2"]
        else:
            assert trial["clips"][1] == bad[0]
            assert trial.get("expected", []) == ([] if trial["kind"] == "abx" else [trial["clips"][0]])
            good, spoilt = (clip(page, one)[0] for one in trial["clips"])
            assert abs(np.corrcoef(good, spoilt)[0, 1]) < 0.9, name


def test_clips_are_equally_loud_by_gains_that_the_key_holds(everything: Any):
    key, page, folder = everything
    level = key["loudness_lufs"]
    for name, one in key["clips"].items():
        heard, rate = clip(page, name)
        assert loudness(torch.from_numpy(heard), rate) == pytest.approx(level, abs=0.1)
        assert np.abs(heard).max() <= 10 ** (-1 / 20) + 1e-3
        if not one.get("check"):
            original, _ = soundfile.read(folder / one["recording"]["audio"])
            np.testing.assert_allclose(heard, original * 10 ** (one["gain_db"] / 20), atol=2e-4)
    systems = {one["recording"]["system"]: one["gain_db"] for one in key["clips"].values() if not one.get("check")}
    assert systems["base"] - systems["aligned"] == pytest.approx(20 * math.log10(4), abs=1.5)


def test_the_same_input_gives_the_same_files(everything: Any, tmp_path: Path):
    _, _, folder = everything
    for seed in (0, 1):
        make(
            [str(folder / "run")], folder / "again.html", plan=Plan(kinds=KINDS, sentences=3, seed=seed), overwrite=True
        )
        assert ((folder / "again.html").read_bytes() == (folder / "test.html").read_bytes()) == (seed == 0)


def test_the_key_is_read_as_it_was_written(everything: Any):
    key, _, folder = everything
    again = Key.from_json(key, folder.resolve())
    assert json.loads(json.dumps(again.to_json(folder.resolve()))) == key
    recording = next(one.recording for one in again.clips.values() if not one.check)
    assert recording.audio.is_file()
    assert recording.speech[-1] == 7


# --- loudness ---


def test_the_filters_are_those_of_the_recommendation():
    """Numbers of ITU-R BS.1770-4, tables 1 and 2, for 48 kHz."""
    (b, a), (c, d) = (tuple(one.numpy() for one in pair) for pair in k_weighting(48000))
    np.testing.assert_allclose(b, [1.53512485958697, -2.69169618940638, 1.19839281085285], atol=1e-12)
    np.testing.assert_allclose(a, [1, -1.69065929318241, 0.73248077421585], atol=1e-12)
    np.testing.assert_allclose(c, [1, -2, 1])
    np.testing.assert_allclose(d, [1, -1.99004745483398, 0.99007225036621], atol=1e-12)


@pytest.mark.parametrize("rate", [16000, 24000, 48000])
def test_a_tone_of_full_scale_is_as_loud_as_the_recommendation_says(rate: int):
    time = torch.arange(2 * rate).double() / rate
    full = torch.sin(2 * math.pi * 997 * time)
    assert loudness(full, rate) == pytest.approx(-3.01, abs=0.1)  # what EBU Tech 3341 allows
    assert loudness(0.1 * full, rate) == pytest.approx(loudness(full, rate) - 20, abs=1e-6)
    # EBU Tech 3341, test 3: what is far quieter than the rest does not count.
    parts = torch.cat([10 ** (level / 20) * full for level in (-36, -23, -23, -23, -36)])
    assert loudness(parts, rate) == pytest.approx(-23 - 3.01, abs=0.25)
    assert loudness(torch.zeros(rate).double(), rate) == -math.inf
    assert loudness(full[: rate // 10], rate) == pytest.approx(-3.01, abs=0.2)


def test_one_loud_peak_turns_all_clips_down():
    assert common_loudness([-30.0, -20.0], [0.1, 0.2]) == -23
    assert common_loudness([-40.0, -math.inf], [1.0, 0.0]) == pytest.approx(-41)


def test_what_is_spoilt_is_noise_as_loud_as_speech():
    speech = torch.from_numpy(sound(3, 1.0))
    noise = degraded(speech, 0) - speech
    assert float(noise.square().mean() / speech.square().mean()) == pytest.approx(10**0.3, rel=0.1)
    assert torch.equal(degraded(speech, 4), degraded(speech, 4))
    assert len(tones(3, 16000)) == 3 * len(tones(1, 16000))


# --- where recordings come from ---


def test_folders_of_sound_named_after_sentences(tmp_path: Path):
    one, other = wavs(tmp_path / "one", 0, rate=16000), wavs(tmp_path / "other", 9, count=3, rate=24000)
    (one / "notes.txt").write_text("not sound")
    key, page = made(
        tmp_path, one, f"new={other}", file=sentences(tmp_path), kinds=("ab", "reading"), checks=0, training=0
    )
    assert key["systems"] == ["one", "new"]
    assert key["sample_rate"] == 24000
    assert {one["recording"]["id"] for one in key["clips"].values()} == {"s0", "s1", "s2"}
    assert all("text" in trial for section in page["sections"] for trial in section["trials"])


def test_candidates_keep_their_speech_tokens_and_marked_words(tmp_path: Path):
    wavs(tmp_path / "drawn.jsonl.audio", 0, count=2)
    rows = []
    for number, line in enumerate(sentences(tmp_path, 2).read_text("utf-8").splitlines()):
        row = json.loads(line)
        row |= {"id": f"s{number}-anna-0", "sentence": f"s{number}", "speaker": "anna", "speech": [1, 2]}
        rows.append(row | {"sample": 0, "seed": 1, "finished": True, "audio": f"drawn.jsonl.audio/s{number}.wav"})
    (tmp_path / "drawn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_systems([str(tmp_path / "drawn.jsonl")])
    assert list(found.systems) == ["drawn"]
    first = found.systems["drawn"]["s0-anna-0"]
    assert (first.speech, first.speaker, first.choices) == ((1, 2), "anna", READINGS[0])
    assert first.transcript == "このからいです"


def test_what_cannot_be_heard_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, more = scored(tmp_path / "run"), wavs(tmp_path / "more", 5)
    (run / "test/audio/s1-aligned.wav").unlink()
    (run / "test/audio/s2-base.wav").write_bytes(b"RIFF, but no sound")
    (more / "s0.wav").unlink()
    soundfile.write(more / "s4.wav", [0.1, float("nan")] * 800, 16000, subtype="FLOAT")
    key, _ = made(tmp_path, run, more, kinds=("ab",), checks=0, training=0)
    assert {one["recording"]["id"] for one in key["clips"].values()} == {"s3"}
    said = capsys.readouterr().out
    assert f"s1: there is no recording {run}/test/audio/s1-aligned.wav" in said
    assert "s2: cannot use the recording" in said
    assert f"s4: cannot use the recording {more}/s4.wav: holds samples that are not finite numbers" in said
    assert "s0: not of every system" in said


def test_systems_of_one_name_are_told_apart(tmp_path: Path):
    found = read_systems([str(scored(tmp_path / "a")), str(scored(tmp_path / "b"))])
    assert list(found.systems) == ["base", "aligned", "b/base", "b/aligned"]
    found = read_systems([f"x={tmp_path / 'a'}"])
    assert list(found.systems) == ["x/base", "x/aligned"]
    with pytest.raises(ListeningTestError, match="give them names, as in NAME="):
        read_systems([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "b/test"), f"b={tmp_path / 'b'}"] * 2)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"kinds": ()}, "kinds must be different ones of nmos, cmos, ab, abx, reading, got none"),
        ({"kinds": ("ab", "ab")}, "kinds must be different ones"),
        ({"sentences": 0}, "sentences must be at least 1"),
        ({"repeats": -1}, "checks, repeats and training must not be negative"),
        ({"loudness_lufs": 0.0}, "loudness_lufs must lie in -60..-10"),
        ({"sample_rate": 100}, "sample_rate must be at least 8000"),
    ],
)
def test_wrong_plans(plan: dict[str, Any], message: str):
    with pytest.raises(ListeningTestError, match=message):
        Plan(**plan)


def test_what_cannot_be_made_says_why(tmp_path: Path):
    run, alone = scored(tmp_path / "run"), wavs(tmp_path / "alone", 0)
    for systems, plan, message in (
        ([alone], {"kinds": ("ab",)}, "ab compares systems: name a second one"),
        ([alone], {"kinds": ("reading",)}, "reading: no utterance that every system has with a marked word"),
        ([run, tmp_path], {}, "no recording found: expected a run, a scored folder"),
        ([tmp_path / "nowhere"], {}, "there is no such run, folder or file of candidates"),
    ):
        with pytest.raises(ListeningTestError, match=message):
            made(tmp_path, *systems, **plan)
    with pytest.raises(ListeningTestError, match=r"expected a name that ends in \.html, got 'test\.htm'"):
        made(tmp_path, run, out="test.htm")
    made(tmp_path, run)
    with pytest.raises(ListeningTestError, match="is there already, and its answers need its key"):
        made(tmp_path, run)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_text_cannot_end_the_script(tmp_path: Path):
    folder = wavs(tmp_path / "w", 0, count=1)
    evil = {"id": "s0", "text": "</script><script>alert(1)</script><!--"}
    (tmp_path / "sentences.jsonl").write_text(json.dumps(evil) + "\n")
    _, page = made(tmp_path, folder, file=tmp_path / "sentences.jsonl", training=0, checks=0, title="<b>$x</b>")
    assert page["sections"][0]["trials"][0]["text"] == evil["text"]
    assert page["title"] == "<b>$x</b>"
    assert "<script>alert" not in (tmp_path / "test.html").read_text("utf-8")
    assert "<title>&lt;b&gt;$x&lt;/b&gt;</title>" in (tmp_path / "test.html").read_text("utf-8")


def test_every_language_has_every_text():
    path = ROOT / "tts_align/evaluation/listening_test/texts.json"
    texts = json.loads(path.read_text("utf-8"))
    assert set(texts) == {"en", "zh", "ja"}
    for language, words in texts.items():
        assert words.keys() == texts["en"].keys()
        for name, text in texts["en"].items():
            mine = words[name]
            assert len(mine) == len(text) if isinstance(text, list) else mine, (language, name)
            assert set(re.findall(r"\{\w+\}", str(mine))) == set(re.findall(r"\{\w+\}", str(text))), (language, name)
    script = path.with_name("page.js").read_text("utf-8")
    assert set(re.findall(r'say\("(\w+)"', script)) <= texts["en"].keys()
