# SPDX-License-Identifier: Apache-2.0
"""Attributes of candidates as a reward model tells them, and the rule of ``tts-align label`` that asks for one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_reward

from tts_align.cli.entry import label as command
from tts_align.cli.label import with_attributes
from tts_align.data.manifest import read_manifest
from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Reading, Verdict
from tts_align.evaluation.measures.attributes import measured_attributes
from tts_align.evaluation.prompts import SentencePrompt
from tts_align.models.reward.config import Attribute
from tts_align.models.reward.model import RewardModel
from tts_align.utils.files import write_json_lines

PROMPT = SentencePrompt("s", "ab", transcripts={"a": "ab", "c": "cb"}, right=("a",))
ATTRIBUTES = (
    Attribute("manner", "classes", ("plain", "lively")),
    Attribute("sounds", "events", ("cough", "laugh")),
    Attribute("mos", "mos"),
    Attribute("age", "regression", centre=40.0, spread=10.0),
)


@pytest.fixture
def model(tmp_path: Path) -> RewardModel:
    made = make_reward(attributes=ATTRIBUTES).eval()
    with torch.no_grad():
        for head in made.pooled.parameters():
            head.mul_(8)  # opinions that differ from row to row
    made.save(tmp_path / "reward")
    return made


def spoken(model: RewardModel, count: int) -> list[Candidate]:
    generator = torch.Generator().manual_seed(0)
    lengths = [1 + number % 7 for number in range(count)]
    verdict = Verdict("ab", Reading.RIGHT, 0.0, 0.0)
    speech = [torch.randint(model.codebook_size, (length,), generator=generator).tolist() for length in lengths]
    return [
        Candidate(PROMPT, "", number, 0, tuple(tokens), True, verdict, measures={"similarity": 0.5})
        for number, tokens in enumerate(speech)
    ]


def test_numbers_are_those_of_each_candidate_alone(model: RewardModel, tmp_path: Path) -> None:
    given = spoken(model, 9)
    given[4] = replace(given[4], speech=())
    found = with_attributes(given, tmp_path / "reward")
    several = measured_attributes({one.id: one.speech for one in given}, tmp_path / "reward", batch_rows=4)
    assert found[4] == given[4]
    for before, one in zip(given, found, strict=True):
        assert replace(one, measures=before.measures) == before
        mine = {name: value for name, value in one.measures.items() if name != "similarity"}
        assert several[one.id] == pytest.approx(mine, rel=1e-4)
        if not before.speech:
            continue
        speech = torch.tensor(before.speech)[None]
        mask = torch.ones_like(speech, dtype=torch.bool)
        with torch.no_grad():
            logits = {
                name: rows[0].double()
                for name, rows in model.attributes(model.encode(model.embed(speech), mask), mask).items()
            }
        sure = logits["manner"].exp() / logits["manner"].exp().sum()
        scores = logits["mos"].exp() / logits["mos"].exp().sum()
        assert dict(one.measures) == pytest.approx(
            {
                "similarity": 0.5,
                **{"manner.plain": float(sure[0]), "manner.lively": float(sure[1])},
                "sounds.cough": float(1 / (1 + (-logits["sounds"][0]).exp())),
                "sounds.laugh": float(1 / (1 + (-logits["sounds"][1]).exp())),
                "mos": sum(score * float(share) for score, share in enumerate(scores, 1)),
                "age": 40 + 10 * float(logits["age"][0]),
            },
            rel=1e-4,
        )


def test_a_rule_keeps_what_the_model_hears_in_them(
    model: RewardModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = spoken(model, 24)
    write_json_lines(tmp_path / "judged.jsonl", [one.to_row() for one in given])
    sure = [one.measures["manner.lively"] for one in with_attributes(given, tmp_path / "reward")]
    least = sorted(sure)[12]
    flags = ["--rule.keep", "all", "--rule.min_measures", json.dumps({"manner.lively": least})]
    words = ["--judged", str(tmp_path / "judged.jsonl"), "--out", str(tmp_path / "rows.jsonl"), *flags]
    with pytest.raises(SystemExit):
        command(words)
    assert "or --reward with a reward model of the attribute" in capsys.readouterr().err
    command([*words, "--reward", str(tmp_path / "reward")])
    rows = read_manifest(tmp_path / "rows.jsonl").rows
    lively = [one.speech for one, probability in zip(given, sure, strict=True) if probability >= least]
    assert [row.speech for row in rows] == lively
    assert len(rows) == 12


def test_a_model_that_cannot_tell_says_so(model: RewardModel, tmp_path: Path) -> None:
    make_reward().save(tmp_path / "plain")
    with pytest.raises(ValueError, match="knows no attribute, only asr"):
        with_attributes(spoken(model, 2), tmp_path / "plain")
    strange = replace(spoken(model, 1)[0], speech=(model.codebook_size,))
    with pytest.raises(ValueError, match=r"reads \d+ speech tokens, got \d+ in 's-0': .* another codec"):
        with_attributes([strange], tmp_path / "reward")
