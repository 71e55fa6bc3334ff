# SPDX-License-Identifier: Apache-2.0
"""Recordings of any system, scored without a model that speaks."""

import json
import os
import shlex
import signal
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import soundfile
import torch
from places import ROOT
from processes import forked, ranks

from tts_align.cli import entry
from tts_align.cli.score import with_recipes
from tts_align.evaluation.judges.base import Judge, Reading, Verdict
from tts_align.evaluation.measures.base import UtteranceMeasure
from tts_align.evaluation.recordings import RecordedTest
from tts_align.evaluation.report import read_utterances
from tts_align.evaluation.stages.sound import heard, is_clipped, read_sound
from tts_align.utils.audio import write_wav
from tts_align.utils.locks import lock_of, locked
from tts_align.utils.processes import HOST

RATE = 8000
WORDS = ("hello world", "hello", "hello you", "something else entirely")


BOMB_INLINE = ", ".join(
    ["a0: &a0 [1,1,1,1,1,1,1,1,1,1]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]
)
BOMB = BOMB_INLINE.replace(", a", "\na")


class Meter(Judge):
    """Hears a sentence by the length of its recording."""

    calls = 0

    def judge(self, samples, expected):
        type(self).calls += 1
        assert all(one.sample_rate == RATE for one in samples)
        said = [WORDS[len(one.waveform) // 800 - 1] for one in samples]
        return [Verdict(words, Reading.UNMARKED, 0.0, 0.0) for words in said]


class Stopped(Meter):
    """Is asked to end while it hears its second batch, in the process of this rank."""

    rank = 0
    heard = 0

    def judge(self, samples, expected):
        found = super().judge(samples, expected)
        type(self).heard += 1
        if type(self).heard == 2 and int(os.environ.get("RANK", "0")) == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return found


class SecondStopped(Stopped):
    rank = 1


class Tokens(Judge):
    needs_audio = False

    def judge(self, samples, expected):
        return []


class Likeness(UtteranceMeasure):
    """How much as long as its prompt."""

    name = "likeness"
    needs_prompt = True

    def measure(self, samples):
        return [{"likeness": len(one.waveform) / len(one.prompt.waveform)} for one in samples]


def tone(length):
    return 0.5 * np.sin(np.arange(length) / 5)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Nine utterances of a list: four heard, and one of each failure; one recording too many."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "theirs"
    for number in range(1, 4):
        write_wav(folder / f"a{number}.wav", tone(800 * number), RATE)
    soundfile.write(folder / "a4.flac", tone(3200), RATE)
    write_wav(folder / "silent.wav", np.zeros(800), RATE)
    write_wav(folder / "empty.wav", np.zeros(0), RATE)
    write_wav(folder / "clipped.wav", 8 * tone(800), RATE)
    (folder / "broken.wav").write_bytes(b"RIFF")
    write_wav(folder / "other.wav", tone(800), RATE)
    write_wav(tmp_path / "v.wav", tone(1600), RATE)
    names = ["a1", "a2", "a3", "a4", "silent", "empty", "clipped", "broken", "gone"]
    lines = [f"{name}|Hi.|v.wav|Hello, world!" for name in names]
    (tmp_path / "meta.lst").write_text("\n".join(lines) + "\n")
    (tmp_path / "judge.yaml").write_text("model:\n  judge:\n    class_path: test_score.Meter\n")
    return tmp_path


def scored(work, *flags):
    words = ["theirs", "--suite", "seed", "--prompts", "meta.lst", "--judge", "judge.yaml"]
    entry.score([*words, "--trainer.accelerator", "cpu", "--trainer.devices", "1", *flags])
    return {one.id: one for one in read_utterances(work / "theirs.scored/utterances.jsonl")}


def test_a_folder_is_scored(work, capsys):
    rows = scored(work, "--measures+", "test_score.Likeness", "--batch_rows", "2")
    said = capsys.readouterr().out
    assert "1 of 9 recordings, counted as failures: gone" in said
    assert "1 recordings that the test set does not name: other" in said
    assert {name: one.failure for name, one in rows.items() if one.failure} == {
        name: name for name in ("silent", "empty", "clipped")
    } | {"broken": "unreadable", "gone": "missing"}
    assert {name: one.error_rate for name, one in rows.items()} == {
        "a1": 0, "a2": 0.5, "a3": 0.5, "a4": 1.5, "clipped": 0,
        "silent": 1, "empty": 1, "broken": 1, "gone": 1,
    }  # fmt: skip
    assert (rows["a2"].deletions, rows["a3"].substitutions, rows["a4"].insertions) == (1, 1, 1)
    assert (rows["a1"].system, rows["a1"].audio, rows["a1"].seconds) == ("theirs", "../theirs/a1.wav", 0.1)
    assert rows["a2"].measures == {"likeness": 1}
    assert rows["gone"].measures == {}
    summary = json.loads((work / "theirs.scored/summary.json").read_text())
    rates = summary["rates"]["theirs"]
    assert (rates["utterances"], rates["failures"]) == (9, 4)
    assert rates["macro"] == pytest.approx(6.5 / 9)
    assert rates["corpus"] == pytest.approx(13 / 18)
    assert rates["median"] == 1
    assert rates["share_above_half"] == pytest.approx(5 / 9)
    assert rates["macro_without_failures"] == pytest.approx(2.5 / 5)
    assert summary["failures"]["theirs"]["missing"] == ["gone"]
    assert summary["theirs"]["accuracy"]["n"] == 0
    assert summary["measures"]["theirs"]["likeness"]["n"] == 5
    assert summary["models"]["judge"]["class"] == "test_score.Meter"
    assert "theirs: protocol seed: macro 72.22 %" in said


def test_it_resumes_and_a_changed_recording_is_heard_anew(work):
    scored(work)
    before = (work / "theirs.scored/utterances.jsonl").read_bytes()
    Meter.calls = 0
    scored(work)
    assert Meter.calls == 0
    assert (work / "theirs.scored/utterances.jsonl").read_bytes() == before
    write_wav(work / "theirs/gone.wav", tone(800), RATE)
    assert scored(work)["gone"].error_rate == 0


def test_what_a_killed_one_left_is_removed_and_two_do_not_write_at_once(work):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = work / f"theirs.scored/.summary.{gone.pid}-{HOST}-0123abcd.scratch.json"
    left.parent.mkdir()
    left.write_text("half")
    with locked(lock_of(left.parent), left.parent, "score", "out"), pytest.raises(SystemExit):
        scored(work)
    scored(work)
    assert not left.exists()
    assert not lock_of(left.parent).exists()


STOPPABLE = ["score", "theirs", "--suite", "seed", "--prompts", "meta.lst", "--batch_rows", "1"]
STOPPABLE += ["--trainer.accelerator", "cpu"]


def transcribed(work):
    """Rows that were heard, of all processes."""
    parts = (work / "theirs.scored/stages").glob("transcribe-theirs.jsonl.parts/*.jsonl")
    return [json.loads(line)["id"] for path in parts for line in path.read_text().splitlines()]


def test_a_signal_waits_for_the_batch_and_it_resumes(work, monkeypatch):
    monkeypatch.setattr(Stopped, "heard", 0)
    with pytest.raises(SystemExit) as ended:
        entry.main([*STOPPABLE, "--judge", "test_score.Stopped", "--trainer.devices", "1"])
    assert ended.value.code == 143
    assert transcribed(work) == ["a1-0", "a2-0"]
    entry.main([*STOPPABLE, "--judge", "test_score.Stopped", "--trainer.devices", "1"])
    assert Stopped.heard == 5  # of nine recordings, five hold anything to hear
    assert (work / "theirs.scored/summary.json").exists()


@pytest.mark.parametrize("judge", ["Stopped", "SecondStopped"])
def test_of_two_processes_both_end_at_a_signal_for_one(work, judge):
    words = [*STOPPABLE, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--judge", f"test_score.{judge}"]
    path = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/cli")))}
    places = [one | path for one in ranks(2)]
    done = forked([[sys.executable, "-m", "tts_align", *words]] * 2, [work] * 2, places, timeout=100)
    assert [one.returncode for one in done] == [143, 143], done[0].stderr[-2000:] + done[1].stderr[-2000:]
    assert len(transcribed(work)) >= 2  # of the process that got it
    assert not (work / "theirs.scored/summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["theirs", "--suite", "seed", "--prompts", "meta.lst"], "no judge configured: pass --judge"),
        (["theirs", "--suite", "sed", "--prompts", "meta.lst"], "unknown test set 'sed': expected one of sentences, "),
        (["nowhere", "--prompts", "meta.lst", "--judge", "judge.yaml"], "there is no folder of recordings nowhere"),
        (["theirs", "--prompts", "plain.txt", "--judge", "judge.yaml"], "none of the 1 utterances of plain.txt has"),
        (["theirs", "--suite", "seed", "--prompts", "meta.lst", "--judge", "test_score.Tokens"], "reads speech tokens"),
        (["theirs", "--prompts", "meta.lst", "--judge", "meta.yaml"], "meta.yaml names no model.judge"),
    ],
)
def test_what_cannot_be_scored_is_said(work, capsys, flags, message):
    (work / "plain.txt").write_text("Hello.\n")
    (work / "meta.yaml").write_text("model: {}\n")
    with pytest.raises(SystemExit) as caught:
        entry.score(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "odd.yaml: holds more than 100000 values, most of them behind aliases"),
        (f"judge: {{class_path: x, init_args: {{{BOMB_INLINE}}}}}", "odd.yaml: holds more than 100000 values"),
        ("a: [", "odd.yaml: not YAML: while parsing"),
        ("model: [1]", "odd.yaml: model: expected names and values, got [1]"),
        ("model: 5", "odd.yaml: model: expected names and values, got 5"),
        ("judge: [1]", "odd.yaml: judge: expected class_path and init_args, got [1]"),
        ("judge: {class_path: [1]}", "odd.yaml: judge.class_path: expected the name of a class, got [1]"),
        ("model: {judge: {class_path: 5}}", "odd.yaml: model.judge.class_path: expected the name of a class, got 5"),
        ("judge: {class_path: a, init_args: {b: 2001-01-01}}", "odd.yaml: judge: expected text, numbers and lists"),
        ("judge: {class_path: a, init_args: {[1]: 2}}", "odd.yaml: not YAML: while constructing a mapping"),
        ("- 1", "odd.yaml names no model.judge"),
        ("", "odd.yaml names no model.judge"),
        (None, "odd.yaml: there is no such file"),
    ],
)
def test_a_recipe_that_names_no_listener_is_said_in_a_line(work, capsys, content, message):
    if content is not None:
        (work / "odd.yaml").write_text(content)
    with pytest.raises(SystemExit) as caught:
        entry.score(["theirs", "--suite", "seed", "--prompts", "meta.lst", "--judge", "odd.yaml"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") <= 2


def test_measures_alone_need_no_judge(work):
    test = RecordedTest(work / "theirs", "meta.lst", "seed", None, None, "", [Likeness()], None, "them", 0.01)
    for batch in test.begin(work / "out", 4, 0, 1):
        test.step(batch)
    summary = test.finish(work / "out", True)
    assert summary["measures"]["them"]["likeness"]["n"] == 5


def test_listeners_in_full():
    assert with_recipes(["--folder", "a", "--judge=CTCJudge"])[-1].endswith("judges.ctc.CTCJudge")
    assert with_recipes(["--judge", "mine.Judge", "--judge.model", "x"])[1] == "mine.Judge"


def test_flat_tops_are_clipped_and_loud_sound_is_not():
    wave = torch.from_numpy(tone(8000)).float()
    assert not is_clipped(wave)
    assert not is_clipped(3 * wave)
    assert is_clipped((3 * wave).clamp(-1, 1))
    assert not is_clipped(torch.zeros(100))


def test_failures_of_sound(tmp_path):
    assert heard(read_sound(write_wav(tmp_path / "a.wav", tone(800), RATE)), True).failure == ""
    assert heard(read_sound(write_wav(tmp_path / "a.wav", tone(800), RATE)), False).failure == "unfinished"
    stereo = np.stack([tone(800), tone(800)], 1)
    soundfile.write(tmp_path / "s.wav", stereo, 44100)
    sound = read_sound(tmp_path / "s.wav")
    assert (len(sound.waveform), sound.sample_rate) == (800, 44100)


def test_recordings_are_found_whatever_their_names(tmp_path, monkeypatch):
    """Endings in capitals, letters and marks apart as some systems write them, folders, and what no file may hold."""
    monkeypatch.chdir(tmp_path)
    names = ["ü ガ", "UP", "a b'c", "sub/deep", "up/../x", "v1.2", "gone"]
    sentences = [json.dumps({"id": name, "text": "Hello.", "language": "en"}) for name in names]
    (tmp_path / "sentences.jsonl").write_text("\n".join(sentences))
    for file in (
        unicodedata.normalize("NFD", "ü ガ.wav"),
        "UP.wav",
        "a b'c.wav",
        "sub/deep.wav",
        "up%2F..%2Fx.wav",
        "v1.2.wav",
    ):
        write_wav(tmp_path / "theirs" / file, tone(800), RATE)
    (tmp_path / "theirs/UP.wav").rename(tmp_path / "theirs/UP.WAV")
    test = RecordedTest(
        tmp_path / "theirs", "sentences.jsonl", "sentences", None, None, "", [Likeness()], None, None, 0.1
    )
    assert list(test.files) == names[:-1]
    assert (test.others, list(test.remarks())) == ([], ["missing:      1 of 7 recordings, counted as failures: gone"])


def test_the_readme_scores_a_folder(work, capsys):
    """The command as the room's README has it, with a recipe that names the toy judge."""
    text = (ROOT / "tts_align/evaluation/README.md").read_text("utf-8")
    (command,) = [line for line in text.splitlines() if line.startswith("tts-align score ")]
    (work / "judge.yaml").rename(work / "recipe.yaml")
    entry.score([*shlex.split(command)[2:], "--trainer.accelerator", "cpu"])
    assert len(read_utterances(work / "theirs.scored/utterances.jsonl")) == 9
    assert "scored:       theirs.scored" in capsys.readouterr().out
