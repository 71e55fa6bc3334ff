# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from scored import row, scored

import tts_align
from tts_align.cli.entry import main
from tts_align.evaluation.comparison.numbers import KNOWN


@pytest.fixture
def runs(tmp_path):
    """One run that mended every reading, and one that broke every second one of these."""
    good = [one for i in range(40) for one in (row(i, "base", "wrong", 0.2), row(i))]
    scored(tmp_path / "good/test", good)
    scored(tmp_path / "bad/test", [row(i, "aligned", "wrong" if i % 2 else "right", 0.4 * (i % 2)) for i in range(40)])
    return tmp_path


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["tts-align", "compare", *map(str, words), "--resamples", "1000"])
    main()


def test_one_run_before_and_after(runs, monkeypatch, capsys):
    call(monkeypatch, runs / "good", "--fail-on-regression")
    shown = capsys.readouterr().out
    assert shown.startswith("readings: 40 mended, 0 broken")
    folder = runs / "good/test/comparison"
    assert f"report:       {folder / 'report.html'}" in shown
    assert json.loads((folder / "comparison.json").read_text())["readings"]["mended"] == 40
    assert "readings mended" in (folder / "report.html").read_text("utf-8")


def test_two_runs_and_a_regression_by_exit_status(runs, monkeypatch, capsys):
    call(monkeypatch, runs / "good", runs / "bad", "--out", runs / "out")
    assert json.loads((runs / "out/comparison.json").read_text())["readings"]["broken"] == 20
    with pytest.raises(SystemExit) as raised:
        call(monkeypatch, runs / "good", runs / "bad", "--fail_on_regression=true")
    assert raised.value.code == 1
    shown = capsys.readouterr().err
    assert "tts-align: regression: right readings, % got worse" in shown
    assert "tts-align: regression: 20 readings broke and 0 were mended" in shown
    assert (runs / "bad/test/comparison-with-good/report.html").is_file()  # the report is there all the same


def test_systems_by_name(runs, monkeypatch, capsys):
    call(monkeypatch, runs / "bad", runs / "good", "--second-system", "base")
    assert "readings: 0 mended, 20 broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "holds no utterances.jsonl"),
        (["bad"], "holds one system, aligned: name a second run"),
        (["a", "b", "c"], "expected at most 2 folders, got a b c"),
        ([], "first"),
        (["good", "--resample", "3"], "did you mean"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(runs, monkeypatch, capsys, words, message):
    monkeypatch.chdir(runs)
    monkeypatch.setattr(sys, "argv", ["tts-align", "compare", *words])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', "summary.json: not JSON: Expecting value at column 7"),
        (b"[" * 100_000, "summary.json: is nested too deeply, expected at most 64 levels"),
        (b'{"a": "\xff"}', "summary.json: expected text in UTF-8"),
        (b"[1]", "summary.json: expected names and values in braces, got list"),
        (b'{"measures": 5, "models": 5}', "summary.json: models: expected names and values, got 5"),
        (b'{"measures": [1]}', "summary.json: measures: expected names and values, got [1]"),
        (b'{"forgetting": {"ja": 5}}', "summary.json: forgetting.ja: expected names and values, got 5"),
        (b'{"forgetting": {"ja": {"base": [1]}}}', "forgetting.ja.base: expected names and values, got [1]"),
        (
            b'{"forgetting": {"ja": {"difference": {"value": "1"}}}}',
            "forgetting.ja.difference.value: expected a number",
        ),
    ],
)
def test_a_spoiled_summary_is_said_in_a_line(runs, monkeypatch, capsys, content, message):
    (runs / "good/test/summary.json").write_bytes(content)
    with pytest.raises(SystemExit) as raised:
        call(monkeypatch, runs / "good")
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") <= 2


def test_the_readmes_commands_run(runs, monkeypatch, capsys):
    readme = (Path(tts_align.__file__).parent / "evaluation/README.md").read_text("utf-8")
    block = next(text for text in re.findall(r"^```\n(.*?)^```", readme, re.M | re.S) if "tts-align compare" in text)
    places = {"runs/tkto": "good", "runs/kto": "good", "scored/theirs": "good/test", "scored/ours": "good/test"}
    monkeypatch.chdir(runs)
    for line in block.splitlines():
        words = [places.get(word, word) for word in line.split()]
        assert words[:2] == ["tts-align", "compare"]
        call(monkeypatch, *words[2:])
    assert (runs / "comparison/report.html").is_file()
    assert "readings: 0 mended, 0 broken" in capsys.readouterr().out


def test_every_measure_of_the_readme_exists():
    readme = (Path(tts_align.__file__).parent / "evaluation/README.md").read_text("utf-8")
    named = re.findall(r"^\| `(\w+)\.(\w+)` \|.*\| (more|less|neither) \|", readme, re.M)
    better = {True: "more", False: "less", None: "neither"}
    for module, name, direction in named:
        measure = getattr(importlib.import_module(f"tts_align.evaluation.measures.{module}"), name)
        assert better[measure.higher_is_better] == direction
        assert measure.name in KNOWN or measure.name.partition("_")[0] in KNOWN
    assert len(named) == 12
