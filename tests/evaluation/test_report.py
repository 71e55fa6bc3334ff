# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
from rich.console import Console

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Reading, Verdict
from tts_align.evaluation.prompts import SentencePrompt
from tts_align.evaluation.report import JudgedUtterance, print_table, read_utterances, summarise, unique, write_report

METRICS = {"accuracy", "cer", "nearest_cer", "bad_case_ratio"}


def said(system, number, reading="right", cer=0.0, nearest=0.0, **more):
    sentence = f"s{number // 2}"
    return JudgedUtterance(
        id=f"{sentence}-v{number % 2}",
        sentence=sentence,
        text="鍋は辛い",
        speaker=f"v{number % 2}",
        system=system,
        seed=number,
        **{"speech": (1, 2, 3), "finished": True, "transcript": "なべ", "reading": reading, "cer": cer}
        | {"nearest_cer": nearest}
        | more,
    )


def failed(system, number):
    return said(system, number, "", math.nan, math.nan, error="RuntimeError: no sound")


def both(count=40):
    """Base right in every second utterance; aligned right everywhere but in every tenth."""
    base = [said("base", i, *(("right",) if i % 2 else ("wrong", 0.2))) for i in range(count)]
    aligned = [said("aligned", i, *(("wrong", 0.2) if i % 10 == 0 else ("right",))) for i in range(count)]
    return base, aligned


def test_summary_by_hand():
    """Base: .5 right, CER .5 * .2; aligned: .9 right, CER .1 * .2."""
    base, aligned = both()
    summary = summarise(base + aligned, 500)
    assert set(summary["base"]) == set(summary["aligned"]) == METRICS
    assert {name: summary["base"][name]["value"] for name in METRICS} == pytest.approx(
        {"accuracy": 0.5, "cer": 0.1, "nearest_cer": 0, "bad_case_ratio": 0}
    )
    assert summary["aligned"]["accuracy"]["value"] == pytest.approx(0.9)
    assert summary["aligned"]["cer"]["value"] == pytest.approx(0.02)
    assert summary["difference"]["accuracy"]["value"] == pytest.approx(0.4)
    assert summary["difference"]["accuracy"]["p_value"] < 0.01
    assert set(summary["base"]["accuracy"]) == {"value", "low", "high", "n"}
    assert summary["base"]["accuracy"]["n"] == 40
    assert summary["further"]["aligned"]["finished"]["value"] == 1
    assert summary["further"]["aligned"]["length"]["value"] == 3
    assert summary["failed"] == {"base": [], "aligned": []}


def test_a_share_of_one_still_has_an_interval_and_it_goes_by_sentences():
    summary = summarise([said("base", i) for i in range(40)], 100)
    accuracy = summary["base"]["accuracy"]
    assert accuracy["value"] == accuracy["high"] == 1
    assert accuracy["low"] == pytest.approx(20 / (20 + 1.96**2), abs=1e-3)  # Wilson's, 20 sentences
    assert "difference" not in summary


def test_bad_means_more_than_three_tenths():
    summary = summarise([said("base", 0, "wrong", 0.3), said("base", 1, "wrong", 0.31)], 100)
    assert summary["base"]["bad_case_ratio"]["value"] == 0.5


def test_failed_and_missing_utterances_are_no_numbers_of_the_model_but_are_named():
    """Of 20, number 3 of the base failed (it was right), and number 19 of aligned (right, too) is missing."""
    base, aligned = both(20)
    summary = summarise([failed("base", 3) if i == 3 else one for i, one in enumerate(base)] + aligned[:-1], 100)
    assert summary["failed"] == {"base": ["s1-v1"], "aligned": ["s9-v1"]}
    assert summary["base"]["accuracy"] == summary["base"]["accuracy"] | {"value": pytest.approx(8 / 18), "n": 18}
    assert summary["base"]["cer"]["value"] == pytest.approx(10 * 0.2 / 18)
    assert summary["aligned"]["accuracy"]["value"] == pytest.approx(16 / 18)
    assert summary["difference"]["cer"]["value"] == pytest.approx((2 - 10) * 0.2 / 18)


def test_without_a_single_verdict_there_are_no_numbers():
    summary = summarise([failed("base", 0)], 100)
    assert summary["base"]["cer"] == {"value": None, "low": None, "high": None, "n": 0}
    assert summary["failed"] == {"base": ["s0-v0"]}


def test_repeated_utterances_count_once_and_must_agree():
    base, _ = both(4)
    assert unique(base + base[:2]) == base
    with pytest.raises(ValueError, match="'s0-v0' of system base appears twice, with different cer"):
        unique([*base, said("base", 0, "wrong", 0.4)])


def test_nothing_to_summarise():
    with pytest.raises(ValueError, match="at least one utterance"):
        summarise([])


def test_an_utterance_needs_a_verdict_or_a_reason():
    with pytest.raises(ValueError, match="neither a verdict nor an error"):
        said("base", 0, "", math.nan, math.nan)


def test_report_is_written_and_read_back(tmp_path):
    base, aligned = both(6)
    summary = write_report(tmp_path / "test", [*aligned, failed("base", 0), *base[1:]])
    assert json.loads((tmp_path / "test" / "summary.json").read_text()) == summary
    rows = read_utterances(tmp_path / "test" / "utterances.jsonl")
    assert [one.id for one in rows[:3]] == ["s0-v0", "s0-v0", "s0-v1"]
    assert rows[0].error == "RuntimeError: no sound"
    assert math.isnan(rows[0].cer)
    assert set(map(repr, rows)) == set(map(repr, [*aligned, failed("base", 0), *base[1:]]))
    assert sorted(path.name for path in (tmp_path / "test").iterdir()) == ["summary.json", "utterances.jsonl"]


def test_a_row_that_is_no_utterance_is_named(tmp_path):
    path = tmp_path / "utterances.jsonl"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"utterances.jsonl:1: not an utterance"):
        read_utterances(path)
    path.write_text(json.dumps(said("base", 0).to_row() | {"reading": ""}) + "\n")
    with pytest.raises(ValueError, match=r"utterances.jsonl:1: not an utterance of a test: .*neither a verdict"):
        read_utterances(path)


def test_candidates_become_utterances():
    prompt = SentencePrompt("s", "鍋は辛い")
    candidate = Candidate(prompt, "v", 2, 9, (4, 5), True, Verdict("なべ", Reading.WRONG, 0.2, 0.0))
    one = JudgedUtterance.of(candidate, "aligned", "audio/s.wav")
    assert (one.id, one.sentence, one.reading, one.cer, one.audio) == ("s-v-2", "s", "wrong", 0.2, "audio/s.wav")
    assert JudgedUtterance.of(Candidate(prompt, "v", 2, 9, (), True, error="silent"), "base").error == "silent"
    assert JudgedUtterance.of(Candidate(prompt, "v", 2, 9, (), True), "base").error == "was not judged"


def test_table_fits_a_narrow_terminal_and_names_failures():
    base, aligned = both()
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(summarise([failed("base", 0), *base[1:], *aligned], 300), console)
    console.file.close()
    text = console.export_text()
    assert "…" not in text
    assert "accuracy %" in text
    assert "+41.0 (" in text  # 36 - 20 of 39
    assert "base: 1 utterance has no verdict, left out of all numbers: s0-v0" in text
