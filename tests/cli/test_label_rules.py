# SPDX-License-Identifier: Apache-2.0
"""Rules over error rate, reading, margin, length, measures and the way an utterance ended."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from tts_align.cli.entry import label as command
from tts_align.cli.entry import score
from tts_align.cli.label import LabelRule, label, with_measures
from tts_align.data.manifest import read_manifest
from tts_align.evaluation.calibration import (
    Calibration,
    UnreliableJudgeError,
    WordCount,
    accuracy_of,
    write_calibration,
)
from tts_align.evaluation.candidates import Candidate, read_candidates
from tts_align.evaluation.judges.base import Reading, Verdict
from tts_align.evaluation.prompts import SentencePrompt
from tts_align.utils.audio import write_wav
from tts_align.utils.files import file_name, read_json_lines, write_json_lines

PROMPT = SentencePrompt("s", "からいね。", transcripts={"からい": "からいね", "つらい": "つらいね"}, right=("からい",))
RIGHT, WRONG, NEITHER, OPEN = Reading.RIGHT, Reading.WRONG, Reading.NEITHER, Reading.ABSTAINED


def spoken(
    reading: Reading,
    cer: float = 0.0,
    margin: float = math.nan,
    tokens: int = 8,
    finished: bool = True,
    **measures: float,
) -> Candidate:
    verdict = Verdict("x", reading, cer, cer, margin)
    return Candidate(PROMPT, "", 0, 0, tuple(range(tokens)), finished, verdict, measures=measures)


@pytest.mark.parametrize(
    ("candidate", "rule", "side"),
    [
        (spoken(OPEN), {}, None),
        (spoken(OPEN), {"neither": "undesirable"}, None),
        (spoken(RIGHT, margin=1.5), {"min_margin": 2.0}, None),
        (spoken(RIGHT, margin=2.5), {"min_margin": 2.0}, True),
        (spoken(WRONG, margin=-1.5), {"min_margin": 2.0}, None),
        (spoken(WRONG, margin=-2.5), {"min_margin": 2.0}, False),
        (spoken(WRONG), {"min_margin": 2.0}, False),  # a judge without a margin is not asked
        (spoken(RIGHT, 0.2), {}, None),
        (spoken(RIGHT, 0.2), {"undesirable_cer": 0.3}, None),
        (spoken(RIGHT, 0.3), {"undesirable_cer": 0.3}, False),
        (spoken(Reading.UNMARKED, 0.2), {}, False),
        (spoken(Reading.UNMARKED, 0.2), {"undesirable_cer": 0.3}, None),
        (spoken(RIGHT, finished=False), {}, None),
        (spoken(RIGHT, finished=False), {"neither": "undesirable"}, False),
        (spoken(RIGHT, finished=False), {"neither": "undesirable", "unfinished": "drop"}, None),
        (spoken(NEITHER), {"unfinished": "undesirable"}, None),
        # からいね has four letters: 8 tokens are 2 each.
        (spoken(RIGHT), {"min_tokens_per_character": 2.0, "max_tokens_per_character": 2.0}, True),
        (spoken(RIGHT), {"min_tokens_per_character": 2.1}, None),
        (spoken(RIGHT), {"max_tokens_per_character": 1.9, "outside": "undesirable"}, False),
        (spoken(RIGHT, similarity=0.7), {"min_measures": {"similarity": 0.7}}, True),
        (spoken(RIGHT, similarity=0.6), {"min_measures": {"similarity": 0.7}}, None),
        (spoken(RIGHT, pause=1.2), {"max_measures": {"pause": 1.0}, "outside": "undesirable"}, False),
        (spoken(WRONG), {"min_measures": {"similarity": 0.7}}, False),  # asked of desirable rows alone
    ],
)
def test_which_side_a_candidate_is_on(candidate: Candidate, rule: dict[str, Any], side: bool | None) -> None:
    assert LabelRule(**rule).side(candidate) is side


def test_a_measure_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"candidate 's-0' has no measure 'similarity', only pause: pass --measures"):
        LabelRule(min_measures={"similarity": 0.7}).side(spoken(RIGHT, pause=1.0))


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ({"undesirable_cer": 0.05}, "undesirable_cer must be at least max_cer, got 0.05 and 0.1"),
        ({"min_margin": -1.0}, "min_margin must not be negative"),
        ({"outside": "undesirable"}, "outside has no effect without a bound"),
    ],
)
def test_rules_without_effect_are_refused(rule: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        LabelRule(**rule)


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    rows = [spoken(RIGHT, margin=3.0), replace(spoken(WRONG, margin=-3.0), sample=1), replace(spoken(OPEN), sample=2)]
    write_json_lines(tmp_path / "judged.jsonl", (one.to_row() for one in rows))
    return tmp_path / "judged.jsonl"


def test_measures_of_a_scored_folder(judged: Path, tmp_path: Path) -> None:
    scored = tmp_path / "scored"
    scored.mkdir()
    rows = [{"id": f"s-{number}", "measures": {"similarity": 0.5 + number / 10}} for number in range(2)]
    write_json_lines(scored / "utterances.jsonl", rows)
    first, second, third = with_measures(read_candidates(judged), scored)
    assert (first.measures, second.measures, third.measures) == ({"similarity": 0.5}, {"similarity": 0.6}, {})
    again = Candidate.from_row(json.loads(json.dumps(first.to_row())))
    assert again.measures == first.measures
    assert first.to_manifest(True).scores["similarity"] == 0.5
    counts = label(judged, tmp_path / "rows.jsonl", LabelRule("all", min_measures={"similarity": 0.9}), scored)
    assert (counts.desirable, counts.undesirable) == (0, 1)
    write_json_lines(tmp_path / "others.jsonl", [{"id": "other", "measures": {"similarity": 1.0}}])
    with pytest.raises(ValueError, match=r"others.jsonl: holds no measures of these candidates, such as 's-0'"):
        with_measures(read_candidates(judged), tmp_path / "others.jsonl")
    write_json_lines(scored / "utterances.jsonl", [*rows, rows[0]])
    with pytest.raises(ValueError, match=r"utterances.jsonl:3: measures of 's-0' appear twice"):
        with_measures(read_candidates(judged), scored)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"id": "s-1", "measures": "abc"}, "measures: expected a finite number for each name, got 'abc'"),
        ({"id": "s-1", "measures": {"similarity": "high"}}, "measures: expected a finite number for each name"),
        ({"id": "s-1", "measures": {"similarity": math.nan}}, "measures: expected a finite number for each name"),
        ({"id": 1, "measures": {}}, "id: expected text, got 1"),
    ],
)
def test_measures_that_are_no_numbers_are_named(judged: Path, tmp_path: Path, row: dict[str, Any], what: str) -> None:
    write_json_lines(tmp_path / "measures.jsonl", [{"id": "s-0", "measures": {"similarity": 0.5}}, row])
    with pytest.raises(ValueError, match=rf"measures\.jsonl:2: {what}"):
        with_measures(read_candidates(judged), tmp_path / "measures.jsonl")


def test_a_judge_under_the_bound_labels_nothing(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    label(judged, out)
    assert "its own accuracy was never measured" in capsys.readouterr().out
    out.unlink()
    write_calibration(accuracy_of(judged), Calibration({}, "policy", {"a/b": WordCount(7, 3)}))
    with pytest.raises(UnreliableJudgeError, match=r"no labels are made: the judge's own accuracy is 70.0%"):
        label(judged, out)
    assert not out.exists()
    label(judged, out, min_judge_accuracy=0.7)
    assert "70.0% [39.7%, 89.2%] of 10 utterances" in capsys.readouterr().out
    assert len(read_manifest(out).rows) == 2


def test_the_rule_of_the_readme(judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file as it stands there, and the options that it names."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "tts_align/evaluation/README.md").read_text("utf-8")
    (found,) = [one for one in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "rule:" in one]
    (tmp_path / "rule.yaml").write_text(found)
    scored = [{"id": f"s-{number}", "measures": {"similarity": 0.8}} for number in range(3)]
    write_json_lines(tmp_path / "scored.jsonl", scored)
    command(["--config", "rule.yaml", "--judged", str(judged), "--out", "rows.jsonl", "--measures", "scored.jsonl"])
    assert [row.desirable for row in read_manifest(tmp_path / "rows.jsonl").rows] == [True, False]


def test_from_recordings_by_measures_to_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``score`` with its defaults on the recordings of ``sample --audio true``, and what it wrote in ``label``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tts-align"])
    candidates = []
    for number, seconds in enumerate((0.5, 0.5, 3.0)):
        reading = WRONG if number == 1 else RIGHT
        one = replace(spoken(reading), sample=number, prompt=replace(PROMPT, id="a/b", language="ja"))
        sound = write_wav(
            Path("drawn.jsonl.audio", f"{file_name(one.id)}.wav"), [0.1, -0.1] * int(4000 * seconds), 8000
        )
        candidates.append(replace(one, audio=str(sound)))
    write_json_lines(Path("drawn.jsonl"), (one.to_row() for one in candidates))
    measures = ["--measures+", "tts_align.evaluation.measures.rhythm.DurationRatio"]
    measures += ["--measures+", "tts_align.evaluation.measures.rhythm.Clipping"]
    score(["drawn.jsonl.audio", "--prompts", "drawn.jsonl", *measures, "--trainer.accelerator", "cpu"])
    scored = {
        row["id"]: row["measures"] for _, row in read_json_lines(Path("drawn.jsonl.audio.scored/utterances.jsonl"))
    }
    ratios = [scored[one.id]["duration_ratio"] for one in candidates]
    assert ratios[0] == ratios[1] < ratios[2]
    flags = ["--rule.keep", "all", "--rule.max_measures", json.dumps({"duration_ratio": 2 * ratios[0]})]
    command(["--judged", "drawn.jsonl", "--out", "rows.jsonl", "--measures", "drawn.jsonl.audio.scored", *flags])
    labelled = read_manifest(tmp_path / "rows.jsonl").rows
    assert [(row.id, row.desirable) for row in labelled] == [(candidates[0].id, True), (candidates[1].id, False)]
    assert labelled[0].scores["duration_ratio"] == ratios[0]
