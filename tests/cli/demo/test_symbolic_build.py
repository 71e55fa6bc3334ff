# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from tts_align.cli.demo.symbolic import prompt
from tts_align.cli.demo.symbolic_build import SymbolicPlan, build_symbolic, measure
from tts_align.cli.demo.training import Schedule
from tts_align.data.demo.sentences import right_rates, split_sentences
from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Reading, Verdict


def spoken(sentence, sample, reading):
    return Candidate(prompt(sentence), "sakura", sample, 0, (1,), True, Verdict("", reading, 0.0, 0.0))


def test_gates_by_hand():
    """Two sentences of right cells, one of a wrong one, two utterances each; one of the right ones is misread once."""
    rates, sentences = right_rates(), split_sentences()["test"]
    right = [one for one in sentences if rates[one.cell] > 0.5][:2]
    wrong = next(one for one in sentences if rates[one.cell] < 0.5)
    said = [(right[0], "right"), (right[0], "right"), (right[1], "right"), (right[1], "neither")]
    said += [(wrong, "wrong"), (wrong, "wrong")]
    gates = {gate.name: gate for gate in measure([spoken(one, i, Reading(r)) for i, (one, r) in enumerate(said)])}
    assert gates["base accuracy"].value == 0.5
    assert gates["cells taught right, read right"].value == 0.75
    assert gates["cells taught wrong, read right"].value == 0
    assert gates["base says neither reading"].value == pytest.approx(1 / 6)
    assert gates["one-sided sentences"].value == pytest.approx(2 / 3)
    assert [name for name, gate in gates.items() if not gate.passed] == [
        "base accuracy",
        "base says neither reading",
        "cells taught right, read right",
        "one-sided sentences",
    ]


def test_an_untrained_base_goes_through_all_stages_and_fails_the_gates(tmp_path, monkeypatch):
    plan = SymbolicPlan(0, Schedule(1, 2, 1e-3), preference_sentences=2, dev_sentences=2, samples=1, test_sentences=2)
    # Babble has no reading, so nothing could be labelled: call what says neither undesirable.
    from tts_align.cli.demo import symbolic_build as symbolic
    from tts_align.cli.label import LabelRule

    monkeypatch.setattr(symbolic, "LabelRule", lambda: LabelRule(neither="undesirable"))
    gates = build_symbolic(tmp_path / "symbolic", plan=plan)
    assert not all(gate.passed for gate in gates)
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    sentences = {f"symbolic/sentences/{split}.jsonl" for split in ("preference", "dev", "test")}
    assert made >= sentences | {
        "symbolic/preference.parquet",
        "symbolic/dev.parquet",
        "symbolic/base/model.safetensors",
    }
    assert {path.parent.name for path in tmp_path.iterdir()} == {tmp_path.name}
    assert json.loads((tmp_path / "symbolic/build.json").read_text())["plan"]["samples"] == 1
