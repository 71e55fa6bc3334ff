# SPDX-License-Identifier: Apache-2.0
"""A judge's own accuracy: on recordings, and on a policy that speaks readings written out; stored and minded."""

from __future__ import annotations

import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from talker import Ear, Module, Talker
from tiny_ctc import RATE, save_ctc, teach, tone

from tts_align.cli.calibrate import calibrate
from tts_align.data.records import Span
from tts_align.evaluation.calibration import (
    Calibration,
    UnreliableJudgeError,
    WordCount,
    calibration_of,
    check_reliable,
    read_calibration,
    write_calibration,
)
from tts_align.evaluation.judges.recogniser import ReadingRules
from tts_align.evaluation.judges.transformers_ctc import TransformersCTCJudge
from tts_align.evaluation.known_utterances import written_out
from tts_align.evaluation.prompts import SentencePrompt, write_prompts
from tts_align.evaluation.readings.japanese import hiragana
from tts_align.evaluation.readings.lexicon import Lexicon
from tts_align.models.base.generation import Spoken
from tts_align.models.base.vocoder import Vocoder
from tts_align.utils.audio import write_wav
from tts_align.utils.signals import Interrupted, handled

KANA = list("からいつのべ")
SPAN = Span(2, 4, ("からい",), ("つらい",))
PROMPT = SentencePrompt("a", "べの辛い", language="ja", spans=(SPAN,))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teach(save_ctc(tmp_path_factory.mktemp("ctc") / "kana", KANA), KANA)


@pytest.fixture
def judge(taught: Path) -> TransformersCTCJudge:
    return TransformersCTCJudge(str(taught))


class Speller(Talker):
    """Speaks a text letter by letter: a token is the number of a kana."""

    def say(self, prompt: Any) -> Spoken:
        text = hiragana("".join(map(chr, prompt.text)))
        return Spoken(torch.tensor([KANA.index(one) for one in text if one in KANA]), True)


class Tones(Vocoder):
    """Plays each kana as its tone."""

    sample_rate = RATE

    def speak(self, speech: Any, speakers: Any) -> list[torch.Tensor]:
        return [tone("".join(KANA[token] for token in one.tolist()), KANA, 7) for one in speech]


def recordings(folder: Path, said: list[tuple[str, str]]) -> Path:
    """What is written down, and what is said."""
    rows = []
    for number, (reading, sound) in enumerate(said):
        write_wav(folder / f"{number}.wav", tone(sound, KANA, number), RATE)
        span = {"start": 2, "end": 4, "right": [reading], "wrong": [{"からい": "つらい", "つらい": "からい"}[reading]]}
        rows.append(
            {"id": str(number), "text": "べの辛い", "language": "ja", "audio": f"{number}.wav", "spans": [span]}
        )
    (folder / "recordings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def test_recordings_whose_reading_is_known(tmp_path: Path, judge: TransformersCTCJudge) -> None:
    """Of five recordings one is written down wrongly, and one holds nothing: 3 of 5 are heard as they were said."""
    said = [(one, f"べの{one}") for one in ("からい", "つらい", "つらい")] + [
        ("からい", "べのつらい"),
        ("からい", "いいい"),
    ]
    folder = recordings(tmp_path, said)
    found = calibrate(Module(judge=judge), folder, tmp_path / "accuracy.json", batch_rows=2)
    assert found.words == {"辛い/からい": WordCount(1, 2), "辛い/つらい": WordCount(2)}
    numbers = found.summary()
    assert (numbers["value"], numbers["n"], numbers["source"]) == (0.6, 5, "recordings")
    # Wilson's interval of 3 of 5, from its formula with z = 1.959964.
    assert (numbers["low"], numbers["high"]) == pytest.approx((0.2307, 0.8824), abs=1e-4)
    assert read_calibration(tmp_path / "accuracy.json") == found
    assert calibrate(Module(judge=judge), folder / "recordings.jsonl", tmp_path / "other.json") == found


def test_processes_share_the_work(tmp_path: Path, judge: TransformersCTCJudge) -> None:
    """Whoever finds everything heard writes the file; it is that of one process."""
    folder = recordings(tmp_path, [("からい", "べのからい"), ("つらい", "べのつらい"), ("からい", "べのつらい")])
    whole = calibrate(Module(judge=judge), folder, tmp_path / "whole.json")
    shared = tmp_path / "shared.json"
    first = calibrate(Module(judge=judge), folder, shared, rank=0, world=2)
    assert first.words == {"辛い/からい": WordCount(1, 1)}
    assert not shared.exists()
    assert calibrate(Module(judge=judge), folder, shared, rank=1, world=2) == whole
    assert shared.read_text() == (tmp_path / "whole.json").read_text()


def test_a_killed_calibration_resumes(
    tmp_path: Path, judge: TransformersCTCJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recordings(tmp_path, [("からい", "べのからい"), ("つらい", "べのつらい"), ("からい", "べのつらい")])
    module, out = Module(judge=judge), tmp_path / "accuracy.json"
    whole = calibrate(module, folder, tmp_path / "whole.json")
    heard = judge.judge
    asked: list[int] = []

    def dies(samples: Any, expected: Any) -> Any:
        asked.append(len(samples))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return heard(samples, expected)

    monkeypatch.setattr(judge, "judge", dies)
    with pytest.raises(KeyboardInterrupt):
        calibrate(module, folder, out, batch_rows=1)
    assert not out.exists()
    assert calibrate(module, folder, out) == whole
    assert asked == [1, 1, 2], "the first recording is not heard again"
    assert calibrate(module, folder, out) == whole
    assert asked == [1, 1, 2]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_signal_waits_for_the_batch(
    recorded: bool, tmp_path: Path, judge: TransformersCTCJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recordings are heard one by one, and so is what the policy speaks: one sentence with both readings."""
    write_prompts(tmp_path / "sentences.jsonl", [PROMPT])
    folder = recordings(tmp_path, [("からい", "べのからい"), ("つらい", "べのつらい")])
    source = folder if recorded else tmp_path / "sentences.jsonl"
    module, out = Module(policy=Speller(), judge=judge, vocoder=Tones()), tmp_path / "accuracy.json"
    heard = judge.judge
    asked: list[int] = []

    def stopped(samples: Any, expected: Any) -> Any:
        asked.append(len(samples))
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return heard(samples, expected)

    monkeypatch.setattr(judge, "judge", stopped)
    with pytest.raises(Interrupted, match="SIGTERM"), handled():
        calibrate(module, source, out, batch_rows=1)
    (part,) = tmp_path.glob("accuracy.jsonl.parts/*.jsonl")
    assert len(part.read_text().splitlines()) == 1
    assert calibrate(module, source, out, batch_rows=1).failed == 0
    assert asked == [1, 1], "the first one is not heard again"


def test_a_recording_that_is_not_there_is_counted_and_named(
    tmp_path: Path, judge: TransformersCTCJudge, caplog: pytest.LogCaptureFixture
) -> None:
    folder = recordings(tmp_path, [("からい", "べのからい"), ("つらい", "べのつらい")])
    (folder / "1.wav").unlink()
    with caplog.at_level(logging.WARNING):
        found = calibrate(Module(judge=judge), folder, tmp_path / "accuracy.json")
    assert (found.right, found.failed) == (1, 1)
    assert "1.wav" in caplog.text


def test_the_policy_speaks_readings_written_out(
    tmp_path: Path, judge: TransformersCTCJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path / "sentences.jsonl", [PROMPT, SentencePrompt("b", "べの", language="ja")])
    module = Module(policy=Speller(), judge=judge, vocoder=Tones())
    found = calibrate(module, tmp_path / "sentences.jsonl", tmp_path / "accuracy.json", speakers=["", ""][:1])
    assert found.words == {"辛い/からい": WordCount(1), "辛い/つらい": WordCount(1)}
    assert (found.source, found.unspoken, found.failed) == ("policy", 0, 0)
    assert "100.0%" in capsys.readouterr().out


def test_a_judge_that_abstains_has_no_accuracy(tmp_path: Path, taught: Path) -> None:
    unsure = TransformersCTCJudge(str(taught), readings=ReadingRules(min_margin=1e4))
    folder = recordings(tmp_path, [("からい", "べのからい")])
    found = calibrate(Module(judge=unsure), folder, tmp_path / "accuracy.json")
    assert (found.abstained, found.judged, found.summary()["value"]) == (1, 0, None)
    assert "none, 1 readings left open" in str(found)


def test_readings_written_out_in_each_language() -> None:
    (spoken, original), (other, _) = written_out(PROMPT, "", Lexicon())
    assert (spoken.text, other.text) == ("べのカライ。", "べのツライ。")
    assert (original.text, original.right, original.spans[0].wrong) == ("べの辛い", ("からい",), ("つらい",))
    own = Lexicon({"辛い": {"からい": ("辣い",)}})
    assert written_out(PROMPT, "", own)[0][0].text == "べの辣い。"
    english = SentencePrompt("e", "I read", language="en", spans=(Span(2, 6, ("R EH1 D",), ("R IY1 D",)),))
    words = Lexicon({"read": {"R EH1 D": ("red",)}})
    assert written_out(english, "", words)[0][0].text == "I red."
    assert written_out(SentencePrompt("x", "べの"), "ja", Lexicon()) == []
    span = Span(0, 2, ("じゅっぷん", "じっぷん"), ("とわけ",))
    rights = [one.right for _, one in written_out(SentencePrompt("m", "十分だ", "ja", spans=(span,)), "", Lexicon())]
    assert rights == [("じゅっぷん", "じっぷん"), ("じっぷん", "じゅっぷん"), ("とわけ",)], (
        "equally right ones are no choice"
    )


def test_another_judges_accuracy_does_not_count(
    tmp_path: Path, judge: TransformersCTCJudge, taught: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "accuracy.json"
    assert calibration_of(file, judge) is None
    write_calibration(file, Calibration(judge.identity(), "recordings", {"a/b": WordCount(3)}))
    assert calibration_of(file, judge) is not None
    wide = TransformersCTCJudge(str(taught), readings=ReadingRules(min_margin=2.0))
    with caplog.at_level(logging.WARNING):
        assert calibration_of(file, wide) is None
    assert "accuracy of another judge" in caplog.text
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"accuracy.json: not a judge's accuracy"):
        read_calibration(file)


_GOOD: dict[str, Any] = {"judge": {"weights": "x"}, "source": "policy", "words": {}, "failed": 0, "unspoken": 0}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ("[1]", "expected names and values in braces, got list"),
        (_GOOD | {"words": []}, r"words: expected names and values, got \[\]"),
        (_GOOD | {"judge": "x"}, "judge: expected names and values, got 'x'"),
        (_GOOD | {"judge": {"weights": 1}}, "judge.weights: expected text, got 1"),
        (_GOOD | {"source": None}, "source: expected text, got None"),
        (_GOOD | {"failed": "0"}, "failed: expected a whole number, got '0'"),
        (_GOOD | {"words": {"a/b": 3}}, "words.a/b: expected names and values, got 3"),
        (_GOOD | {"words": {"a/b": {"right": "1"}}}, "words.a/b.right: expected a whole number, got '1'"),
        (_GOOD | {"words": {"a/b": {"right": -1}}}, "words.a/b.right: expected at least 0, got -1"),
        (_GOOD | {"words": {"a/b": {"wright": 1}}}, "words.a/b.wright: expected one of right, wrong, abstained"),
        ({name: value for name, value in _GOOD.items() if name != "words"}, "words: is missing"),
    ],
)
def test_a_spoiled_accuracy_is_said_in_a_line(tmp_path: Path, content: Any, fault: str) -> None:
    file = tmp_path / "accuracy.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"accuracy\.json: .*{fault}") as raised:
        read_calibration(file)
    assert "\n" not in str(raised.value)


def test_under_the_bound_it_is_refused() -> None:
    poor = Calibration({"weights": "x"}, "policy", {"a/b": WordCount(7, 3, 2)})
    with pytest.raises(UnreliableJudgeError, match=r"no labels: the judge's own accuracy is 70.0% .*at least 80%"):
        check_reliable(poor, 0.8, "no labels")
    check_reliable(poor, 0.7, "no labels")
    check_reliable(None, 0.8, "no labels")
    with pytest.raises(UnreliableJudgeError, match="accuracy is none"):
        check_reliable(replace(poor, words={}), 0.0, "no labels")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"id": "a", "text": "べの", "audio": "a.wav"}, "no marked word"),
        ({"id": "a", "text": "べの辛い", "audio": 3, "spans": []}, "expected the path of a recording, got 3"),
        ({"text": "べの", "audio": "a.wav"}, "'id' is missing"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    file = tmp_path / "recordings.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"recordings.jsonl:1: .*{fault}"):
        calibrate(Module(), file, tmp_path / "accuracy.json")


def test_nothing_to_calibrate_on(tmp_path: Path, judge: TransformersCTCJudge) -> None:
    with pytest.raises(ValueError, match=r"recordings.jsonl is not there"):
        calibrate(Module(judge=judge), tmp_path, tmp_path / "accuracy.json")
    write_prompts(tmp_path / "plain.jsonl", [SentencePrompt("b", "べの", language="ja")])
    with pytest.raises(ValueError, match="no reading can be written out"):
        calibrate(Module(judge=judge), tmp_path / "plain.jsonl", tmp_path / "accuracy.json")


def test_what_a_judge_needs(tmp_path: Path, judge: TransformersCTCJudge) -> None:
    write_prompts(tmp_path / "sentences.jsonl", [PROMPT])
    with pytest.raises(ValueError, match=r"hears sound: the recipe must set model\.vocoder"):
        calibrate(Module(judge=judge, vocoder=None), tmp_path / "sentences.jsonl", tmp_path / "accuracy.json")
    folder = recordings(tmp_path, [("からい", "べのからい")])
    with pytest.raises(ValueError, match="Ear reads speech tokens: calibrate it on sentences"):
        calibrate(Module(judge=Ear(hears=False)), folder, tmp_path / "accuracy.json")
    with pytest.raises(ValueError, match="no judge configured"):
        calibrate(Module(judge=None), folder, tmp_path / "accuracy.json")
