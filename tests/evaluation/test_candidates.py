# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest

from tts_align.data.manifest import to_dict
from tts_align.data.parse import Rules, parse
from tts_align.data.records import Span
from tts_align.evaluation.candidates import Candidate, candidate_seed, read_candidates
from tts_align.evaluation.judges.base import Reading, Verdict
from tts_align.evaluation.prompts import SentencePrompt

PROMPT = SentencePrompt(
    "s", "辛い", "ja", spans=(Span(0, 2, ("からい",), ("つらい",)),), transcripts={"からい": "x", "つらい": "y"}
)
VERDICT = Verdict("からい", Reading.RIGHT, 0.25, 0.0, 1.5, (0.1, 0.9))
CANDIDATES = [
    Candidate(PROMPT, "a", 0, 5, (1, 2), True),
    Candidate(PROMPT, "a", 1, 6, (3,), False, VERDICT),
    Candidate(PROMPT, "", 2, 7, (3,), True, error="RuntimeError: no"),
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_candidates_come_back(tmp_path):
    path = write(tmp_path / "c.jsonl", [one.to_row() for one in CANDIDATES])
    assert read_candidates(path) == CANDIDATES
    assert [one.id for one in CANDIDATES] == ["s-a-0", "s-a-1", "s-2"]


def test_a_margin_that_the_judge_did_not_give_stays_unknown(tmp_path):
    one = Candidate(PROMPT, "a", 1, 6, (3,), True, Verdict("か", Reading.WRONG, 0.0, 0.0))
    back = read_candidates(write(tmp_path / "c.jsonl", [one.to_row()]))[0]
    assert math.isnan(back.verdict.margin)
    assert back.verdict.target_share is None


def test_seeds_depend_on_name_and_global_seed_only():
    seeds = {
        candidate_seed(seed, name, voice, k) for seed in (0, 1) for name in "ab" for voice in "cd" for k in range(5)
    }
    assert len(seeds) == 40
    assert candidate_seed(0, "ab", "c", 0) != candidate_seed(0, "a", "bc", 0)


def test_a_manifest_understands_the_row():
    row = CANDIDATES[1].to_manifest(desirable=True)
    parsed, faults, unknown = parse(to_dict(row), "", Rules())
    assert parsed == row
    assert not faults
    assert not unknown
    assert row.scores == {
        "finished": 0.0,
        "cer": 0.25,
        "nearest_cer": 0.0,
        "margin": 1.5,
        "target_start": 0.1,
        "target_end": 0.9,
    }
    assert row.notes == {"sentence": "s", "reading": "right", "transcript": "からい"}
    assert row.transcript == row.target_text == "x"  # of the right reading, not what was heard


def test_faults_are_named(tmp_path):
    row = CANDIDATES[0].to_row()
    with pytest.raises(ValueError, match=r"c.jsonl:2: utterance 's-a-0' appears twice"):
        read_candidates(write(tmp_path / "c.jsonl", [row, row]))
    del row["seed"]
    with pytest.raises(ValueError, match=r"c.jsonl:1: column 'seed' is missing: was this file written by"):
        read_candidates(write(tmp_path / "c.jsonl", [row]))
    for name in ("transcript", "nearest_cer", "cer"):
        row = CANDIDATES[1].to_row()
        del row[name]
        with pytest.raises(ValueError, match=rf"c.jsonl:1: column '{name}' is missing beside 'reading'"):
            read_candidates(write(tmp_path / "c.jsonl", [row]))


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("sample", "1", "sample: expected a whole number, got '1'"),
        ("sample", 1.5, "sample: expected a whole number, got 1.5"),
        ("sample", True, "sample: expected a whole number, got True"),
        ("seed", -1, "seed: expected at least 0, got -1"),
        ("finished", "yes", "finished: expected true or false, got 'yes'"),
        ("finished", 1, "finished: expected true or false, got 1"),
        ("speaker", None, "speaker: expected text, got None"),
        ("speech", [1.0], r"speech: expected whole numbers, got 1\.0"),
        ("speech", "12", "speech: expected a list of speech tokens"),
        ("speech", [-1], "speech: speech tokens must not be negative"),
        ("cer", "0.1", "cer: expected a number, got '0.1'"),
        ("cer", -0.1, "cer: expected at least 0, got -0.1"),
        ("reading", 3, "reading: expected text, got 3"),
        ("reading", "other", "'other' is not a valid Reading"),
        ("target_share", [0.1], "target_share: expected two numbers from 0 to 1"),
        ("target_share", [0, 2], "target_share: expected two numbers from 0 to 1"),
        ("error", 5, "error: expected text, got 5"),
        ("cer", math.inf, "cer: expected a finite number, got inf"),
        ("margin", math.inf, "margin: expected a finite number, got inf"),
        ("measures", {"similarity": "0.7"}, "measures: expected a finite number for each name, got {'similarity'"),
        ("measures", [1], r"measures: expected a finite number for each name, got \[1\]"),
        ("readings", {"a": None}, "readings: expected a finite number for each name"),
        ("pieces", [{"text": "a"}], "pieces: expected a list of {text, length} that are the speech's 1 tokens"),
        ("pieces", [{"text": "a", "length": 2}], "pieces: expected a list of {text, length} that are the speech's 1"),
        ("spans", [{"start": 0.5, "end": 1, "right": "a"}], "start and end are numbers of characters, and whole"),
    ],
)
def test_wrong_types_are_refused_and_not_made_right(tmp_path, column, value, what):
    row = CANDIDATES[1].to_row() | {column: value}
    with pytest.raises(ValueError, match=rf"c\.jsonl:1: .*{what}"):
        read_candidates(write(tmp_path / "c.jsonl", [row]))
