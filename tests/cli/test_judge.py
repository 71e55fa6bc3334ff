# SPDX-License-Identifier: Apache-2.0
import json
import logging

import pytest
import torch
from talker import VOICES, Ear, Module, Talker, make_judged, make_prompts

from tts_align.cli.judge import judge
from tts_align.cli.sample import sample
from tts_align.evaluation.candidates import read_candidates


@pytest.fixture
def judged(tmp_path):
    return make_judged(tmp_path)


@pytest.fixture
def candidates(judged):
    return judged.with_name("candidates.jsonl")


def test_every_candidate_gets_its_verdict(candidates, judged):
    before, after = read_candidates(candidates), read_candidates(judged)
    assert [row.id for row in after] == [row.id for row in before]
    for old, new in zip(before, after, strict=True):
        assert new.speech == old.speech
        assert new.verdict.cer == pytest.approx(old.speech[0] / 100)
        assert new.verdict.target_share == (0.25, 0.5)
        assert not new.error


@pytest.mark.parametrize(("batch_rows", "world"), [(1, 1), (7, 2)])
def test_verdicts_do_not_depend_on_batches_or_processes(tmp_path, candidates, judged, batch_rows, world):
    out = tmp_path / "again.jsonl"
    for rank in range(world):
        judge(Module(), candidates, out, batch_rows, rank, world)
    assert out.read_text() == judged.read_text()


def test_a_judge_that_reads_codes_needs_no_vocoder(tmp_path, candidates):
    out = judge(Module(judge=Ear(hears=False), vocoder=None), candidates, tmp_path / "out.jsonl")
    assert all(row.verdict for row in read_candidates(out))
    with pytest.raises(ValueError, match=r"Ear hears sound: the recipe must set model.vocoder"):
        judge(Module(vocoder=None), candidates, tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match=r"the recipe must set model.judge"):
        judge(Module(judge=None), candidates, tmp_path / "other.jsonl")


def test_what_cannot_be_judged_is_kept_counted_and_named(tmp_path, candidates, caplog):
    rows = read_candidates(candidates)
    bad = rows[5].speech[0]
    names = [row.id for row in rows if row.speech[0] == bad]
    deaf = Module(judge=Ear(deaf_to=(bad,)))
    with caplog.at_level(logging.WARNING):
        out = judge(deaf, candidates, tmp_path / "out.jsonl", batch_rows=8, max_failed_share=0.5)
    after = read_candidates(out)
    assert len(after) == len(rows)
    assert [row.id for row in after if row.verdict is None] == names
    assert next(row for row in after if row.id == names[0]).error == f"RuntimeError: code {bad} hurts"
    assert f"{len(names)} of {len(rows)} candidates could not be judged" in caplog.text
    assert names[0] in caplog.text


def test_too_many_failures_stop_the_work_with_their_reasons(tmp_path, candidates):
    rows = read_candidates(candidates)
    deaf_to = {row.speech[0] for row in rows[::4]}
    names = [row.id for row in rows if row.speech[0] in deaf_to]
    assert len(names) < len(rows)
    with pytest.raises(ValueError, match=r"2 of 24 candidates could not be judged, 1 may .max_failed_share 0.01."):
        judge(Module(judge=Ear(deaf_to=deaf_to)), candidates, tmp_path / "out.jsonl", batch_rows=24)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_failed_is_tried_again(tmp_path, candidates, judged):
    bad = read_candidates(candidates)[5].speech[0]
    out, again = tmp_path / "out.jsonl", Ear(deaf_to=(bad,))
    judge(Module(judge=Ear(deaf_to=(bad,))), candidates, out, max_failed_share=0.5)
    failed = [row.id for row in read_candidates(out) if row.error]
    again.deaf_to = ()  # a passing fault
    judge(Module(judge=again), candidates, out)
    # By what they say: they hold NaN, which equals nothing, and since Python 3.13 not itself in a record either.
    assert repr(read_candidates(out)) == repr(read_candidates(judged))
    assert sum(again.batches) == len(failed) > 0


class Strict(Ear):
    """A judge without weights."""

    def __init__(self, limit=1, batch_size=3):
        super().__init__()
        self.limit, self.batch_size = limit, batch_size


class Later(Strict):
    version = "2"


Later.__qualname__ = Strict.__qualname__


def test_verdicts_of_a_judge_with_other_arguments_code_or_weights_are_not_kept(tmp_path, candidates):
    """Neither has any weights that would tell them apart; what changes no verdict may change."""
    out = judge(Module(judge=Strict(limit=1)), candidates, tmp_path / "out.jsonl")
    for same in (Strict(1), Strict(batch_size=9)):
        assert judge(Module(judge=same), candidates, out)
        assert not same.batches
    weighty = Strict()
    weighty.table = torch.nn.Linear(1, 1)
    for other in (Strict(2), Later(1), Ear(), weighty):
        with pytest.raises(ValueError, match="other settings or inputs"):
            judge(Module(judge=other), candidates, out)


def test_silence_is_a_verdict_on_the_model(tmp_path, candidates):
    """Every character is missing: that is not the fault of whoever listens."""
    lines = candidates.read_text().splitlines(keepends=True)
    mute = json.loads(lines[3]) | {"speech": []}
    path = tmp_path / "mute.jsonl"
    path.write_text("".join([*lines[:3], json.dumps(mute) + "\n", *lines[4:]]))
    after = read_candidates(judge(Module(), path, tmp_path / "out.jsonl"))
    (verdict,) = [row.verdict for row in after if row.id == mute["id"]]
    assert (verdict.transcript, verdict.reading, verdict.cer, verdict.nearest_cer) == ("", "neither", 1, 1)
    assert not any(row.error for row in after)


def test_a_killed_judge_goes_on_where_it_was(tmp_path, candidates, judged):
    class Tired(Ear):
        def verdict(self, heard, expected):
            if len(self.batches) > 2:
                raise KeyboardInterrupt
            return super().verdict(heard, expected)

    Tired.__qualname__, Tired.__module__ = Ear.__qualname__, Ear.__module__  # the same judge, as far as results go
    out, rested = tmp_path / "again.jsonl", Ear()
    with pytest.raises(KeyboardInterrupt):
        judge(Module(judge=Tired()), candidates, out, batch_rows=5)
    judge(Module(judge=rested), candidates, out, batch_rows=5)
    assert sum(rested.batches) == 24 - 10
    assert out.read_text() == judged.read_text()


def test_candidates_of_another_run_are_not_mixed_in(tmp_path, judged):
    other = sample(Module(Talker()), make_prompts(tmp_path), tmp_path / "other.jsonl", 3, VOICES, seed=5)
    with pytest.raises(ValueError, match="other settings or inputs"):
        judge(Module(), other, judged)
