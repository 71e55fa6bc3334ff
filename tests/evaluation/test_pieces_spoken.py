# SPDX-License-Identifier: Apache-2.0
"""Texts that are spoken piece by piece: joined for the judge and in the recording, apart in the manifest."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch
from talker import Ear, Module, Talker, Tube

from tts_align.cli.judge import judge
from tts_align.cli.label import LabelRule, label
from tts_align.cli.sample import sample
from tts_align.data.manifest import read_manifest
from tts_align.data.records import Span
from tts_align.evaluation.candidates import Candidate, SpokenPiece, read_candidates
from tts_align.evaluation.prompts import SentencePrompt, write_prompts
from tts_align.evaluation.speaking import waveforms_of

TEXT = "辛い。甘い。とても辛い。"


class Sentences(Talker):
    """Speaks sentence by sentence."""

    def pieces(self, text: str) -> tuple[str, ...]:
        return tuple(part + "。" for part in text.split("。") if part)


class Quiet(Tube):
    sample_rate = 8000

    def speak(self, speech, speakers):
        return [tokens.float() / 64 for tokens in speech]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    one = SentencePrompt("long", TEXT, "ja", "sakura", (Span(9, 11, ("からい",), ("つらい",)),))
    short = SentencePrompt("short", "甘い。", "ja", "sakura", transcripts={"": "あまい"})
    write_prompts(tmp_path / "sentences.jsonl", [one, short])
    return tmp_path / "sentences.jsonl"


def test_each_piece_is_spoken_by_itself_and_joined(tmp_path: Path, prompts: Path):
    rows = read_candidates(sample(Module(Sentences()), prompts, tmp_path / "drawn.jsonl", 2))
    whole = read_candidates(sample(Module(), prompts, tmp_path / "whole.jsonl", 2))
    long, short = rows[0], rows[2]
    assert [piece.text for piece in long.pieces] == ["辛い。", "甘い。", "とても辛い。"]
    assert sum(piece.length for piece in long.pieces) == len(long.speech)
    assert [part for cut in long.cut for part in cut] == list(long.speech)
    assert short.pieces == ()
    assert short == whole[2]
    assert len({row.speech for row in rows[:2]}) == 2


def test_pieces_do_not_depend_on_batches_and_progress_counts_utterances(tmp_path: Path, prompts: Path, capsys):
    one = sample(Module(Sentences()), prompts, tmp_path / "one.jsonl", 3, batch_rows=1)
    four = sample(Module(Sentences()), prompts, tmp_path / "four.jsonl", 3, batch_rows=4)
    assert one.read_bytes() == four.read_bytes()
    assert "6/6" in capsys.readouterr().err


def test_the_sound_of_pieces_is_joined(tmp_path: Path, prompts: Path):
    rows = read_candidates(
        sample(Module(Sentences(), vocoder=Quiet()), prompts, tmp_path / "drawn.jsonl", 1, audio=True)
    )
    assert rows[0].audio
    for row in rows:
        assert len(soundfile.read(tmp_path / row.audio)[0]) == len(row.speech)
    (sound,) = waveforms_of(Quiet(), rows[:1])
    assert torch.equal(sound, torch.tensor(rows[0].speech) / 64)


def test_a_piece_that_was_not_spoken_adds_no_sound():
    prompt = SentencePrompt("a", "一。二。")
    one = Candidate(prompt, "", 0, 0, (5, 6), True, pieces=(SpokenPiece("一。", 0), SpokenPiece("二。", 2)))
    assert waveforms_of(Tube(), [one])[0].tolist() == [5, 6]
    assert [row.text for row in one.to_rows(True)] == ["二。"]


def test_a_manifest_has_the_pieces(tmp_path: Path, prompts: Path):
    class Fair(Ear):
        def verdict(self, heard, expected):
            right = expected.right[0] if expected.right else ""
            return super().verdict(heard, type(expected)(expected.text, {right: "あ"}, (right,)))

    drawn = sample(Module(Sentences()), prompts, tmp_path / "drawn.jsonl", 8)
    judged = judge(Module(judge=Fair()), drawn, tmp_path / "judged.jsonl")
    label(judged, tmp_path / "train.jsonl", LabelRule(keep="all", max_cer=1.0))
    rows = read_manifest(tmp_path / "train.jsonl", check_audio="needed").rows
    pieces = [row for row in rows if "piece" in row.id]
    good, bad = ([row for row in pieces if row.desirable is side] for side in (True, False))
    assert good
    assert {row.text for row in good} == {"辛い。", "甘い。", "とても辛い。"}
    assert {row.text for row in bad} <= {"とても辛い。"}
    for row in pieces:
        marks = [row.text[span.start : span.end] for span in row.spans]
        assert marks == (["辛い"] if row.text == "とても辛い。" else [])
    originals = {row.id: row for row in read_candidates(judged)}
    for row in pieces:
        name, _, number = row.id.partition("-piece-")
        assert row.speech == originals[name].cut[int(number)]


def test_a_word_that_cleaning_changed_is_marked_nowhere():
    prompt = SentencePrompt("a", "5円。辛い。", spans=(Span(0, 2, ("ごえん",), ("ごまる",)),))
    one = Candidate(prompt, "", 0, 0, (1, 2), True, pieces=(SpokenPiece("五円。", 1), SpokenPiece("辛い。", 1)))
    assert [(row.text, row.spans) for row in one.to_rows(False)] == [("五円。", ()), ("辛い。", ())]


def test_a_text_that_was_only_written_otherwise_is_one_row():
    prompt = SentencePrompt("a", "辛い 5", spans=(Span(0, 2, ("からい",), ("つらい",)),))
    one = Candidate(prompt, "", 0, 0, (1, 2), True, audio="a.wav", pieces=(SpokenPiece("辛い五。", 2),))
    (row,) = one.to_rows(True)
    assert (row.id, row.text, row.speech, row.audio) == ("a-0", "辛い五。", (1, 2), "a.wav")
    assert row.spans == prompt.spans
