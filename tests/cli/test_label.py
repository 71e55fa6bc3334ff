# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
from talker import make_judged, sentences

from tts_align.cli.label import LabelRule, choose, count, label
from tts_align.data.manifest import read_manifest
from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Reading, Verdict
from tts_align.evaluation.prompts import SentencePrompt


@pytest.fixture
def judged(tmp_path):
    return make_judged(tmp_path)


@pytest.fixture
def candidates(judged):
    return judged.with_name("candidates.jsonl")


SENTENCE = sentences()[0]


def heard(sample, reading, cer=0.0, prompt=SENTENCE, **more):
    verdict = Verdict("x", reading, cer, 0.0)
    return Candidate(**{"prompt": prompt, "speaker": "a", "sample": sample, "seed": sample, "speech": (sample + 1,)}
                     | {"finished": True, "verdict": verdict} | more)  # fmt: skip


CANDIDATES = [
    heard(0, Reading.RIGHT, 0.05),
    heard(1, Reading.RIGHT, 0.02),
    heard(2, Reading.RIGHT, 0.5),
    heard(3, Reading.WRONG, 0.1),
    heard(4, Reading.WRONG, 0.3),
    heard(5, Reading.NEITHER, 0.4),
    heard(6, Reading.RIGHT, 0.0, finished=False),
    heard(7, Reading.RIGHT, 0.0, verdict=None, error="broken"),
]


def labels(rule, candidates=CANDIDATES):
    return {candidate.sample: desirable for candidate, desirable in choose(candidates, rule)}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LabelRule(), {1: True, 4: False}),
        (LabelRule(desirable=2, undesirable=2), {0: True, 1: True, 3: False, 4: False}),
        (LabelRule(desirable=0), {4: False}),
        (LabelRule(keep="all"), {0: True, 1: True, 3: False, 4: False}),
        (LabelRule(keep="all", max_cer=0.5), {0: True, 1: True, 2: True, 3: False, 4: False}),
        (LabelRule(keep="all", neither="undesirable"), {0: True, 1: True, 3: False, 4: False, 5: False, 6: False}),
        (LabelRule(neither="undesirable"), {1: True, 5: False}),
    ],
)
def test_rules(rule, expected):
    assert labels(rule) == expected


def test_voices_and_sentences_are_ranked_apart():
    other = [dataclasses.replace(one, speaker="b") for one in CANDIDATES]
    third = [dataclasses.replace(one, prompt=sentences()[1]) for one in CANDIDATES]
    assert len(choose(CANDIDATES + other + third, LabelRule())) == 6


def test_of_equal_candidates_the_first_is_kept():
    assert labels(LabelRule(), [heard(i, Reading.RIGHT, 0.1) for i in (3, 1, 2)]) == {3: True}


def test_without_a_marked_word_the_error_rate_divides():
    plain = SentencePrompt("p", "ただの文")
    rows = [heard(i, Reading.UNMARKED, cer, plain) for i, cer in enumerate((0.0, 0.05, 0.4, 0.2))]
    assert labels(LabelRule(), rows) == {0: True, 2: False}


def test_silence_is_no_row():
    assert labels(LabelRule(), [heard(0, Reading.WRONG, 1.0, speech=())]) == {}


def test_counts_by_hand():
    one_sided = [heard(0, Reading.RIGHT, 0.0, sentences()[1])]
    every = CANDIDATES + one_sided
    counts = count(every, choose(every, LabelRule(desirable=2)))
    assert (counts.candidates, counts.failed, counts.desirable, counts.undesirable) == (9, 1, 3, 1)
    assert (counts.sentences, counts.one_sided, counts.pairs) == (2, 1, 1)
    assert counts.readings == {"right": 5, "wrong": 2, "neither": 1}
    assert "50% of 2 sentences in a voice have rows of one kind only" in str(counts)
    assert "1 not judged" in str(counts)


def test_manifest_is_written_and_counts_are_printed(tmp_path, judged, capsys):
    counts = label(judged, tmp_path / "rows.jsonl", LabelRule(max_cer=1.0))
    rows = read_manifest(tmp_path / "rows.jsonl").rows
    assert [row.desirable for row in rows].count(True) == counts.desirable > 0
    assert [row.desirable for row in rows].count(False) == counts.undesirable > 0
    assert str(counts) in capsys.readouterr().out
    row = rows[0]
    assert row.spans[0].right == ("からい",)
    assert row.notes["reading"] == ("right" if row.desirable else "wrong")
    assert row.scores["cer"] == pytest.approx(row.speech[0] / 100)
    assert "margin" not in row.scores
    assert row.scores["target_start"] == 0.25


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"desirable": 0, "undesirable": 0}, "must keep something"),
        ({"max_cer": -0.1}, "max_cer must not be negative"),
        ({"keep": "all", "desirable": 2}, "no effect with keep: all"),
    ],
)
def test_rules_that_make_no_sense(knobs, message):
    with pytest.raises(ValueError, match=message):
        LabelRule(**knobs)


def test_nothing_judged_or_nothing_kept(tmp_path, candidates, judged):
    with pytest.raises(ValueError, match="run `tts-align judge` first"):
        label(candidates, tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="the rule keeps no row"):
        label(judged, tmp_path / "rows.jsonl", LabelRule(undesirable=0, max_cer=0.0))
    assert not (tmp_path / "rows.jsonl").exists()
