# SPDX-License-Identifier: Apache-2.0
"""A test in stages: what is kept, what is made again, and that nothing depends on batches, kills or processes."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from talker import Ear, Module, Talker, Tube, make_prompts

from tts_align.evaluation.calibration import CALIBRATION, Calibration, WordCount, write_calibration
from tts_align.evaluation.judges.base import Reading, Verdict
from tts_align.evaluation.listening import TooManyFailuresError
from tts_align.evaluation.measures.base import UtteranceMeasure
from tts_align.evaluation.report import JudgedUtterance, read_utterances, summarise
from tts_align.evaluation.speech import Evaluation, TestSettings
from tts_align.evaluation.stages import store


class Base(Talker):
    """The same voice before its training: other words."""

    def say(self, prompt):
        spoken = super().say(prompt)
        return type(spoken)(spoken.speech.flip(0), spoken.finished)

    def digest(self):
        return "base"


class Loudness(UtteranceMeasure):
    """The loudest sample; may break on some, and may die."""

    name = "loudness"
    higher_is_better = True

    def __init__(self, breaks_on=(), dies_after=None):
        super().__init__()
        self.calls, self.breaks_on, self.dies_after = 0, breaks_on, dies_after

    def measure(self, samples):
        if self.dies_after is not None and self.calls >= self.dies_after:
            raise KeyboardInterrupt
        self.calls += 1
        if any(float(one.waveform[0]) in self.breaks_on for one in samples):
            raise RuntimeError("too loud")
        return [{"loudness": float(one.waveform.max()), "loudness_nothing": math.nan} for one in samples]

    def identity(self):
        return {"class": "Loudness", "model": "ear", "digest": "12ab"}


class DyingEar(Ear):
    def __init__(self, dies_after):
        super().__init__()
        self.dies_after = dies_after

    def judge(self, samples, expected):
        if len(self.batches) >= self.dies_after:
            raise KeyboardInterrupt
        return super().judge(samples, expected)

    def identity(self):
        return Ear().identity()


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr("tts_align.evaluation.report.summarise", partial(summarise, resamples=50))


SETTINGS = {"speakers": ("sakura", "takumi"), "samples": 2, "batch_rows": 4, "audio": 0, "max_failed_share": 0.5}


def evaluate(run, prompts, module=None, base=None, rank=0, world=1, **settings):
    """One test, as a trainer would drive it."""
    module = module or Module()
    evaluation = Evaluation(module, base or Base(), TestSettings(str(prompts), **(SETTINGS | settings)))
    loader = evaluation.loader(rank, world)
    evaluation.begin(run)
    for batch in loader:
        evaluation.step(batch)
    evaluation.finish(run, rank == 0)
    return module


def files(run):
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.suffix in (".json", ".jsonl", ".wav")
    }


@pytest.fixture
def prompts(tmp_path):
    return make_prompts(tmp_path)


@pytest.fixture
def whole(tmp_path, prompts):
    """What an undisturbed test writes."""
    evaluate(tmp_path / "whole", prompts, measures=[Loudness()])
    return files(tmp_path / "whole")


def test_a_test_leaves_its_stages_and_its_report(tmp_path, whole):
    assert sorted(whole) == [
        *(f"test/stages/{stage}-{system}.jsonl" for stage in ("quality-loudness",) for system in ("aligned", "base")),
        *(f"test/stages/sound-{system}.jsonl" for system in ("aligned", "base")),
        *(f"test/stages/synthesise-{system}.jsonl" for system in ("aligned", "base")),
        *(f"test/stages/transcribe-{system}.jsonl" for system in ("aligned", "base")),
        "test/summary.json",
        "test/utterances.jsonl",
    ]
    rows = read_utterances(tmp_path / "whole/test/utterances.jsonl")
    assert len(rows) == 2 * 4 * 2 * 2
    assert [one.system for one in rows[:2]] == ["base", "aligned"]
    assert all(one.seconds == len(one.speech) / 100 for one in rows)
    assert all(one.measures == {"loudness": max(one.speech)} for one in rows if one.failure != "silent")
    assert {one.stop_reason for one in rows} == {"end_of_speech", "length_limit"}
    assert all((one.failure == "unfinished") == (not one.finished) for one in rows if one.failure != "silent")


def test_model_and_digest_stand_beside_each_number(whole):
    summary = json.loads(whole["test/summary.json"])
    for system in ("base", "aligned", "difference"):
        assert {"value", "low", "high", "n"} <= summary["measures"][system]["loudness"].keys()
        assert (
            summary["measures"][system]["loudness"]["model"],
            summary["measures"][system]["loudness"]["digest"],
        ) == (
            "ear",
            "12ab",
        )
    assert summary["models"]["judge"] == Ear().identity()
    assert summary["models"]["base"]["digest"] == "base"
    assert summary["models"]["aligned"]["digest"] == "talker"
    assert summary["models"]["loudness"]["higher_is_better"] is True
    assert summary["suite"]["name"] == "sentences"
    assert summary["systems"] == ["base", "aligned"]


@pytest.mark.parametrize("batch_rows", [1, 3, 128])
def test_nothing_depends_on_the_batches(tmp_path, prompts, whole, batch_rows):
    evaluate(tmp_path / "other", prompts, measures=[Loudness()], batch_rows=batch_rows)
    assert files(tmp_path / "other") == whole


KILLS = {
    "before anything": lambda: (Module(Talker(dies_after=0)), Loudness()),
    "while the policy speaks": lambda: (Module(Talker(dies_after=2)), Loudness()),
    "while the judge listens": lambda: (Module(judge=DyingEar(3)), Loudness()),
    "while a measure listens": lambda: (Module(), Loudness(dies_after=4)),
}


@pytest.mark.parametrize("kill", KILLS)
def test_killed_at_any_moment_it_gives_the_same_files(tmp_path, prompts, whole, kill):
    module, measure = KILLS[kill]()
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "killed", prompts, module, measures=[measure])
    assert not (tmp_path / "killed/test/utterances.jsonl").exists()
    for shard in (tmp_path / "killed").rglob("*.parts/*.jsonl"):  # in the middle of a line, too
        shard.write_bytes(shard.read_bytes()[:-20])
    evaluate(tmp_path / "killed", prompts, measures=[Loudness()])
    assert files(tmp_path / "killed") == whole


def test_killed_between_the_stages_files_it_gives_the_same(tmp_path, prompts, whole, monkeypatch):
    """Some stages have their file already, others their shards, and the report is not there."""
    real, calls = store.write_json_lines, []

    def dying(path, rows):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(path, rows)

    monkeypatch.setattr(store, "write_json_lines", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "killed", prompts, measures=[Loudness()])
    module = Module()
    evaluate(tmp_path / "killed", prompts, module, measures=[Loudness()])
    assert module.policy.batches == []
    assert files(tmp_path / "killed") == whole


def test_started_again_it_does_nothing_twice(tmp_path, prompts):
    first = evaluate(tmp_path / "run", prompts, measures=[Loudness()])
    assert len(first.policy.batches) == 4
    before = files(tmp_path / "run")
    again, measure = Module(), Loudness()
    evaluate(tmp_path / "run", prompts, again, measures=[measure])
    assert (again.policy.batches, again.judge.batches, measure.calls) == ([], [], 0)
    assert files(tmp_path / "run") == before


def test_a_new_measure_or_judge_needs_no_synthesis(tmp_path, prompts):
    evaluate(tmp_path / "run", prompts)
    measure = Loudness()
    module = evaluate(tmp_path / "run", prompts, measures=[measure])
    assert (module.policy.batches, module.judge.batches, measure.calls) == ([], [], 8)
    other = Module(judge=Ear(deaf_to=(99,)))
    evaluate(tmp_path / "run", prompts, other, measures=[Loudness()])
    assert other.policy.batches == []
    assert len(other.judge.batches) == 8


def test_other_weights_or_sentences_are_spoken_anew(tmp_path, prompts):
    evaluate(tmp_path / "run", prompts)

    class Trained(Talker):
        def digest(self):
            return "trained"

    module = evaluate(tmp_path / "run", prompts, Module(Trained()))
    assert len(module.policy.batches) == 4
    assert len(evaluate(tmp_path / "run", prompts, Module(Trained()), samples=1).policy.batches) == 2


def test_two_processes_give_what_one_gives(tmp_path, prompts, whole, monkeypatch):
    """Two ranks one after the other; what the second brings to the first is what it would send."""
    brought = []
    monkeypatch.setattr(store, "gathered", lambda own: (brought.append(own), [own])[1])
    evaluate(tmp_path / "two", prompts, rank=1, world=2, measures=[Loudness()])
    queue = iter(brought[:])
    monkeypatch.setattr(store, "gathered", lambda own: [own, next(queue)])
    evaluate(tmp_path / "two", prompts, rank=0, world=2, measures=[Loudness()])
    assert files(tmp_path / "two") == whole


def test_a_test_resumes_under_another_number_of_processes(tmp_path, prompts, whole, monkeypatch):
    monkeypatch.setattr(store, "gathered", lambda own: [own])
    evaluate(tmp_path / "run", prompts, rank=1, world=2, measures=[Loudness()])
    module = evaluate(tmp_path / "run", prompts, measures=[Loudness()], batch_rows=1)
    assert sum(module.policy.batches) == 8  # half of the aligned ones
    assert files(tmp_path / "run") == whole


def test_a_broken_measure_costs_no_other_number(tmp_path, prompts):
    evaluate(tmp_path / "fine", prompts)
    first = read_utterances(tmp_path / "fine/test/utterances.jsonl")[0]
    loudest = float(first.speech[0])
    evaluate(tmp_path / "run", prompts, measures=[Loudness(breaks_on=(loudest,))])
    rows = read_utterances(tmp_path / "run/test/utterances.jsonl")
    broken = [one for one in rows if float(one.speech[0]) == loudest]
    assert broken
    assert all(one.measure_errors == {"quality-loudness": "RuntimeError: too loud"} for one in broken)
    assert all(one.reading and not one.measures for one in broken)
    with pytest.raises(TooManyFailuresError, match="could not be judged, 0 may"):
        evaluate(tmp_path / "strict", prompts, measures=[Loudness((loudest,))], max_failed_share=0.0)


def test_what_failed_is_tried_again(tmp_path, prompts):
    evaluate(tmp_path / "fine", prompts)
    first = read_utterances(tmp_path / "fine/test/utterances.jsonl")[0].speech[0]

    class Sick(Ear):
        def identity(self):
            return Ear().identity()

    evaluate(tmp_path / "run", prompts, Module(judge=Sick(deaf_to=(first,))))
    assert any(one.error for one in read_utterances(tmp_path / "run/test/utterances.jsonl"))
    failed = [one for one in read_utterances(tmp_path / "run/test/utterances.jsonl") if one.error]
    module = evaluate(tmp_path / "run", prompts)
    assert (module.policy.batches, sum(module.judge.batches)) == ([], len(failed))  # those alone
    assert not any(one.error for one in read_utterances(tmp_path / "run/test/utterances.jsonl"))


class Unmarked(Ear):
    """Every sentence is without a marked word."""

    def verdict(self, heard, expected):
        return Verdict("", Reading.UNMARKED, 0.0, 0.0)


def test_sentences_without_a_marked_word_have_no_accuracy(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("One.\nTwo.\n")
    evaluate(tmp_path / "run", path, Module(judge=Unmarked()))
    summary = json.loads((tmp_path / "run/test/summary.json").read_text())
    for part in ("base", "aligned", "difference"):
        assert summary[part]["accuracy"]["value"] is None
        assert summary[part]["accuracy"]["n"] == 0
    assert summary["aligned"]["cer"]["n"] == 8


def test_recordings_of_an_earlier_test_do_not_stay(tmp_path, prompts):
    audio = tmp_path / "run/test/audio"
    evaluate(tmp_path / "run", prompts, audio=3)
    assert len(list(audio.glob("*.wav"))) == 6
    (audio / "mine.wav").write_bytes(b"")
    evaluate(tmp_path / "run", prompts, audio=1)
    assert len(list(audio.glob("*-base.wav"))) == len(list(audio.glob("*-aligned.wav"))) == 1
    assert (audio / "mine.wav").exists()
    evaluate(tmp_path / "run", prompts, audio="all")
    rows = read_utterances(tmp_path / "run/test/utterances.jsonl")
    assert {one.audio for one in rows} == {str(path.relative_to(audio.parent)) for path in audio.glob("s*.wav")}


class Seeded(Talker):
    def use_voices(self, path):
        self.voices = [json.loads(line) for line in path.read_text().splitlines()]


class SeededBase(Seeded):
    def digest(self):
        return "base"


class SeededTube(Tube):
    def use_voices(self, path):
        self.voices = path


class Parrot(Ear):
    """Hears the text, or another of two words."""

    def verdict(self, heard, expected):
        words = expected.text if int(heard.speech[0]) % 2 else "hello you"
        return Verdict(words, Reading.UNMARKED, 0.0, 0.0)


def test_a_published_test_set_with_its_protocol(tmp_path):
    from tts_align.utils.audio import write_wav

    write_wav(tmp_path / "v.wav", [0.1] * 400, 16000)
    path = tmp_path / "meta.lst"
    path.write_text("".join(f"u{i}|Hi.|v.wav|Hello, world!\n" for i in range(6)))
    module = Module(Seeded(), Parrot(), SeededTube())
    evaluate(tmp_path / "run", path, module, base=SeededBase(), suite="seed", speakers=(), samples=1, audio="all")
    assert module.policy.voices == [{"speaker": "v", "audio": str(tmp_path / "v.wav"), "text": "Hi."}]
    rows = [one for one in read_utterances(tmp_path / "run/test/utterances.jsonl") if one.system == "aligned"]
    assert [one.id for one in rows] == [f"u{i}" for i in range(6)]
    for one in rows:
        heard = one.transcript == "Hello, world!"
        assert (one.normalised_target, one.target_text, one.reference_length) == ("hello world", "Hello, world!", 2)
        assert (one.error_rate, one.substitutions) == ((0.0, 0) if heard else (0.5, 1))
        assert (one.audio, one.prompt_audio) == (f"audio/{one.id}-aligned.wav", str(tmp_path / "v.wav"))
    summary = json.loads((tmp_path / "run/test/summary.json").read_text())
    assert summary["protocol"]["name"] == "seed"
    assert summary["rates"]["aligned"]["macro"] == pytest.approx(np.mean([one.error_rate for one in rows]))
    assert summary["further"]["aligned"]["error_rate"]["value"] == pytest.approx(summary["rates"]["aligned"]["macro"])


def test_accuracy_of_marked_words_alone():
    """Two right of three marked, one abstention, one sentence without a marked word: 2 of 3."""
    rows = [
        JudgedUtterance(f"u{number}", f"s{number}", "x", "", "base", 0, reading=reading, cer=0.0, nearest_cer=0.0)
        for number, reading in enumerate(("right", "wrong", "right", "abstained", "unmarked"))
    ]
    rows[3] = dataclasses.replace(rows[3], abstained=True)
    summary = summarise(rows)
    assert summary["base"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert (summary["base"]["accuracy"]["n"], summary["base"]["cer"]["n"], summary["abstained"]) == (3, 5, {"base": 1})


def test_where_nothing_was_trained_one_system_is_spoken_once(tmp_path, prompts):
    module = evaluate(tmp_path / "run", prompts, base=Talker())
    assert len(module.policy.batches) + len(module.judge.batches) == 4  # the reference speaks
    summary = json.loads((tmp_path / "run/test/summary.json").read_text())
    assert summary["systems"] == ["base"]
    assert "difference" not in summary


def test_a_policy_without_voices_of_recordings_says_so(tmp_path):
    path = tmp_path / "meta.lst"
    (tmp_path / "v.wav").write_bytes(b"")
    path.write_text("u|Hi.|v.wav|Hello.\n")
    with pytest.raises(
        ValueError, match=r"Talker cannot speak in the voices of recordings, which .*voices.jsonl lists"
    ):
        evaluate(tmp_path / "run", path, suite="seed", speakers=())


def test_a_measure_of_sound_needs_a_vocoder(tmp_path, prompts):
    with pytest.raises(ValueError, match=r"Loudness hears sound: the recipe must set model.vocoder"):
        evaluate(tmp_path / "run", prompts, Module(judge=Ear(hears=False), vocoder=None), measures=[Loudness()])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"samples": 0}, "samples, batch_rows and sentences must be at least 1"),
        ({"suite": "sead"}, "model.test.suite: expected one of sentences"),
        ({"protocol": "sead"}, "unknown protocol 'sead'"),
        ({"measures": [Loudness(), Loudness()]}, "names 'loudness' twice"),
    ],
)
def test_settings_that_cannot_work(change, said):
    with pytest.raises(ValueError, match=said):
        TestSettings("demo:symbolic/test.jsonl", **change)


def test_without_sound_tokens_alone_are_judged(tmp_path, prompts):
    evaluate(tmp_path / "run", prompts, Module(judge=Ear(hears=False), vocoder=None))
    rows = read_utterances(tmp_path / "run/test/utterances.jsonl")
    assert all(math.isnan(one.seconds) for one in rows)
    assert torch.tensor([one.finished for one in rows]).any()


def test_the_judges_own_accuracy_stands_beside_its_numbers(tmp_path, prompts, capsys):
    """As `tts-align judge --calibrate` left it in the run; that of another judge does not count."""
    run, known = tmp_path / "run", {"a/b": WordCount(9, 1, 2)}
    write_calibration(run / CALIBRATION, Calibration(Ear().identity(), "policy", known))
    evaluate(run, prompts)
    summary = json.loads((run / "test/summary.json").read_text())
    assert summary["judge_accuracy"]["value"] == 0.9
    assert (summary["judge_accuracy"]["n"], summary["judge_accuracy"]["abstained"]) == (10, 2)
    assert "the judge's own accuracy: 90.0%" in capsys.readouterr().out
    write_calibration(run / CALIBRATION, Calibration(Ear(hears=False).identity(), "policy", known))
    evaluate(run, prompts)
    assert "judge_accuracy" not in json.loads((run / "test/summary.json").read_text())
