# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
from talker import VOICES, Module, Talker, Tube, make_candidates, make_prompts, sentences

from tts_align.cli.sample import sample
from tts_align.evaluation.candidates import candidate_seed, read_candidates
from tts_align.evaluation.prompts import write_prompts
from tts_align.evaluation.speaking import utterance_requests
from tts_align.models.base.generation import Sampling

pytestmark = pytest.mark.whole_runs


@pytest.fixture
def prompts(tmp_path):
    return make_prompts(tmp_path)


@pytest.fixture
def candidates(tmp_path):
    return make_candidates(tmp_path)


def test_every_sentence_is_spoken_in_every_voice_in_order(candidates):
    rows = read_candidates(candidates)
    assert [row.id for row in rows] == [f"s{i}-{voice}-{k}" for i in range(4) for voice in VOICES for k in range(3)]
    assert rows[0].prompt == sentences()[0]
    assert rows[0].seed == candidate_seed(0, "s0", "sakura", 0)
    assert len({row.seed for row in rows}) == 24
    assert not candidates.with_name("candidates.jsonl.parts").exists()


@pytest.mark.parametrize(("batch_rows", "world"), [(1, 1), (5, 2), (64, 3)])
def test_speech_does_not_depend_on_batches_or_processes(tmp_path, prompts, candidates, batch_rows, world):
    out = tmp_path / "again.jsonl"
    for rank in reversed(range(world)):
        sample(Module(), prompts, out, 3, VOICES, batch_rows, rank=rank, world=world)
    assert out.read_text() == candidates.read_text()


def test_a_killed_run_goes_on_where_it_was(tmp_path, prompts, candidates):
    out, dying, heir = tmp_path / "again.jsonl", Talker(dies_after=2), Talker()
    with pytest.raises(KeyboardInterrupt):
        sample(Module(dying), prompts, out, 3, VOICES, batch_rows=5)
    shard = next(tmp_path.glob("again.jsonl.parts/*.jsonl"))
    shard.write_text(shard.read_text()[:-20])  # killed in the middle of a line
    assert not out.exists()
    sample(Module(heir), prompts, out, 3, VOICES, batch_rows=5)
    assert sum(heir.batches) == 24 - 9
    assert out.read_text() == candidates.read_text()


def test_a_finished_run_has_nothing_left_to_do(prompts, candidates):
    idle = Talker(dies_after=0)
    sample(Module(idle), prompts, candidates, 3, VOICES, batch_rows=2)
    assert not idle.batches


def test_other_settings_never_mix_with_a_finished_file(prompts, candidates):
    before = candidates.read_text()
    for change in ({"seed": 1}, {"samples": 2}):
        with pytest.raises(ValueError, match="made with other settings or inputs"):
            sample(Module(), prompts, candidates, **{"samples": 3, "speakers": VOICES} | change)
    with pytest.raises(ValueError, match="other settings"):
        sample(Module(sampling=Sampling(top_p=0.5)), prompts, candidates, 3, VOICES)
    assert candidates.read_text() == before
    sample(Module(), prompts, candidates, 3, VOICES, seed=1, overwrite=True)
    assert candidates.read_text() != before


def test_a_sentence_with_a_voice_of_its_own_is_spoken_in_that_one():
    own = dataclasses.replace(sentences()[0], speaker="takumi")
    assert [item.speaker for item in utterance_requests([own, sentences()[1]], VOICES, 1, 0)] == ["takumi", *VOICES]
    assert [item.id for item in utterance_requests(sentences(1), [], 2, 0)] == ["s0-0", "s0-1"]


def test_sentences_of_like_length_go_together(tmp_path):
    policy, path = Talker(), tmp_path / "sentences.jsonl"
    write_prompts(path, sentences(6))
    lengths = []
    policy.say, say = (lambda prompt: (lengths.append(len(prompt.text)), say(prompt))[1]), policy.say
    sample(Module(policy), path, tmp_path / "out.jsonl", 1, VOICES, 4)
    assert lengths == sorted(lengths)


def test_progress_waits_for_nobody_but_the_barrier(tmp_path, prompts):
    waited = []
    out = sample(Module(), prompts, tmp_path / "a.jsonl", 1, VOICES, barrier=lambda: waited.append(1))
    assert len(waited) == 2
    assert len(read_candidates(out)) == 8


def test_settings_that_cannot_work(tmp_path, prompts):
    with pytest.raises(ValueError, match="at least 1, got 0 and 64"):
        sample(Module(), prompts, tmp_path / "out.jsonl", 0)
    with pytest.raises(FileNotFoundError):
        sample(Module(), tmp_path / "none.jsonl", tmp_path / "out.jsonl")


def test_recordings_are_removed_by_the_first_process_only(tmp_path, prompts, monkeypatch):
    """With a barrier all processes find the file complete; one that is late must not remove what another has made."""
    from tts_align.cli import sample as command

    removed = []
    monkeypatch.setattr(command, "remove_stale", lambda folder, rows: removed.append(folder))
    out = tmp_path / "two.jsonl"
    sample(Module(), prompts, out, 1, VOICES, rank=0, world=2)  # neither is complete, and neither removes
    assert removed == []
    sample(Module(), prompts, out, 1, VOICES, rank=1, world=2, barrier=lambda: None)
    assert removed == []
    sample(Module(), prompts, out, 1, VOICES, rank=0, world=2, barrier=lambda: None)
    assert removed == [tmp_path / "two.jsonl.audio"]


def test_a_voice_that_means_nothing_is_refused(tmp_path):
    class Deaf(Talker):
        def encode_text(self, text, context=None):
            return super().encode_text(text)

    path = tmp_path / "plain.jsonl"
    write_prompts(path, sentences())
    with pytest.raises(ValueError, match=r"voice 'sakura' has no effect: Deaf knows no voices.*leave speakers out"):
        sample(Module(Deaf(), vocoder=None), path, tmp_path / "out.jsonl", 1, VOICES)
    sample(Module(Deaf(), vocoder=None), path, tmp_path / "out.jsonl", 1)


class Choir(Talker):
    """Knows its voices."""

    names = ("anna", "bert")

    @property
    def speakers(self):
        return self.names


def test_without_speakers_the_only_voice_speaks(tmp_path, prompts):
    solo = Choir()
    solo.names = ("anna",)
    assert {row.speaker for row in read_candidates(sample(Module(solo), prompts, tmp_path / "out.jsonl", 1))} == {
        "anna"
    }


def test_without_speakers_several_voices_are_listed(tmp_path, prompts):
    with pytest.raises(
        ValueError, match=r"no voice is named, and there are 2: anna, bert; choose some with --speakers"
    ):
        sample(Module(Choir()), prompts, tmp_path / "out.jsonl", 1)
    own = [dataclasses.replace(one, speaker="bert") for one in sentences()]
    write_prompts(tmp_path / "own.jsonl", own)
    rows = read_candidates(sample(Module(Choir()), tmp_path / "own.jsonl", tmp_path / "out.jsonl", 1))
    assert {row.speaker for row in rows} == {"bert"}


def test_a_policy_that_takes_any_name_asks_the_vocoder(tmp_path, prompts):
    class Pipes(Tube):
        speakers = ("flute", "horn")

    with pytest.raises(ValueError, match="there are 2: flute, horn"):
        sample(Module(vocoder=Pipes()), prompts, tmp_path / "out.jsonl", 1)


def test_a_text_file_of_sentences(tmp_path):
    (tmp_path / "list.txt").write_text("\ufeffHello there.\n\n  Second one.  \n", "utf-8")
    rows = read_candidates(sample(Module(), tmp_path / "list.txt", tmp_path / "out.jsonl", 1, ["sakura"]))
    assert [(row.id, row.prompt.text) for row in rows] == [
        ("line-1-sakura-0", "Hello there."),
        ("line-3-sakura-0", "Second one."),
    ]
