# SPDX-License-Identifier: Apache-2.0
"""Recordings that ``sample --audio`` wrote: ``judge`` listens to them, and the manifest keeps them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from talker import VOICES, Ear, Module, Tube, make_prompts

from tts_align.cli.judge import judge
from tts_align.cli.label import LabelRule, label
from tts_align.cli.sample import sample
from tts_align.data.manifest import read_manifest
from tts_align.evaluation.candidates import read_candidates
from tts_align.evaluation.judges.base import Judge, Reading, Verdict
from tts_align.utils.files import write_json_lines


class Loud(Tube):
    """Like a tube, but quiet enough for a file, and counts how often it speaks."""

    sample_rate = 8000

    def __init__(self) -> None:
        super().__init__()
        self.spoken = 0

    def speak(self, speech, speakers):
        self.spoken += len(speech)
        return [tokens.float().repeat_interleave(80) / 64 for tokens in speech]


class Meter(Judge):
    """Error rate: the loudest sample."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[int, int]] = []

    def judge(self, samples, expected):
        self.heard += [(len(one.waveform), one.sample_rate) for one in samples]
        return [Verdict("", Reading.RIGHT, float(one.waveform.abs().max()), 0.0) for one in samples]


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    return sample(Module(vocoder=Loud()), make_prompts(tmp_path), tmp_path / "drawn.jsonl", 2, VOICES, audio=True)


def test_no_sound_is_made_again(tmp_path: Path, drawn: Path):
    """The same verdicts, to the 16 bits of the file, without the vocoder; its absence is no fault."""
    idle, meter = Loud(), Meter()
    out = judge(Module(vocoder=idle, judge=meter), drawn, tmp_path / "judged.jsonl")
    assert idle.spoken == 0
    rows = read_candidates(out)
    assert sorted(meter.heard) == sorted((80 * len(row.speech), 8000) for row in rows)
    for row in rows:
        assert row.verdict is not None
        assert row.verdict.cer == pytest.approx(max(row.speech) / 64, abs=1 / 32767)
    without = judge(Module(vocoder=None, judge=Meter()), drawn, tmp_path / "without.jsonl")
    assert without.read_bytes() == out.read_bytes()


def test_what_a_person_recorded_is_heard_instead(tmp_path: Path, drawn: Path):
    first = json.loads(drawn.read_text().splitlines()[0])
    soundfile.write(drawn.parent / first["audio"], np.full((100, 2), 0.5), 44_100)
    meter = Meter()
    rows = read_candidates(judge(Module(vocoder=Loud(), judge=meter), drawn, tmp_path / "judged.jsonl"))
    assert (100, 44_100) in meter.heard
    assert rows[0].verdict is not None
    assert rows[0].verdict.cer == pytest.approx(0.5, abs=1e-4)


def test_the_manifest_keeps_the_recordings_from_any_folder(tmp_path: Path, drawn: Path):
    folder, elsewhere = tmp_path / "work" / "deep", tmp_path / "data"
    for place in (folder, elsewhere):
        place.mkdir(parents=True)
    judged = judge(Module(vocoder=None, judge=Meter()), drawn, folder / "judged.jsonl")
    label(judged, elsewhere / "train.jsonl", LabelRule(keep="all", max_cer=1.0))
    manifest = read_manifest(elsewhere / "train.jsonl")
    assert len(manifest.rows) == 14  # two were cut by the length limit
    for row in manifest.rows:
        assert not Path(row.audio).is_absolute()
        assert len(soundfile.read(manifest.find(row.audio))[0]) == 80 * len(row.speech)


def test_lost_recordings_are_counted_named_and_made_again(
    tmp_path: Path, drawn: Path, caplog: pytest.LogCaptureFixture
):
    whole = judge(Module(vocoder=Loud(), judge=Meter()), drawn, tmp_path / "whole.jsonl")
    lost = json.loads(drawn.read_text().splitlines()[3])["audio"]
    os.unlink(drawn.parent / lost)
    voice = Loud()
    with caplog.at_level(logging.WARNING):
        again = judge(Module(vocoder=voice, judge=Meter()), drawn, tmp_path / "again.jsonl")
    assert voice.spoken == 1
    assert "1 of 16 recordings are not where they were written" in caplog.text
    assert lost in caplog.text
    pairs = zip(read_candidates(whole), read_candidates(again), strict=True)
    assert [new.audio == "" for _, new in pairs] == [at == 3 for at in range(16)]


def test_without_a_vocoder_a_lost_or_broken_recording_is_a_fault_of_its_row(tmp_path: Path, drawn: Path):
    rows = [json.loads(line) for line in drawn.read_text().splitlines()]
    os.unlink(drawn.parent / rows[3]["audio"])
    (drawn.parent / rows[5]["audio"]).write_bytes(b"no sound")
    deaf = Module(vocoder=None, judge=Meter())
    found = read_candidates(judge(deaf, drawn, tmp_path / "judged.jsonl", max_failed_share=0.2))
    assert [bool(row.error) for row in found] == [at in (3, 5) for at in range(16)]
    assert "there is no such recording" in found[3].error
    assert "cannot be read as sound" in found[5].error


def test_rows_without_a_recording_need_the_vocoder(tmp_path: Path, drawn: Path):
    rows = [json.loads(line) for line in drawn.read_text().splitlines()]
    del rows[2]["audio"]
    write_json_lines(drawn, rows)
    with pytest.raises(ValueError, match=r"must set model.vocoder"):
        judge(Module(vocoder=None, judge=Meter()), drawn, tmp_path / "judged.jsonl")
    voice = Loud()
    judge(Module(vocoder=voice, judge=Meter()), drawn, tmp_path / "judged.jsonl")
    assert voice.spoken == 1


def test_a_copied_folder_gives_the_same_verdicts(tmp_path: Path, drawn: Path):
    """Times of files are no part of what is compared, contents are."""
    out = judge(Module(vocoder=None, judge=Meter()), drawn, tmp_path / "judged.jsonl")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path, copy)
    idle = Meter()
    judge(Module(vocoder=None, judge=idle), copy / "drawn.jsonl", copy / out.name)
    assert idle.heard == []
    longer = next((copy / "drawn.jsonl.audio").glob("*.wav"))
    soundfile.write(longer, np.ones(999) / 2, 8000)
    with pytest.raises(ValueError, match="other settings or inputs"):
        judge(Module(vocoder=None, judge=Meter()), copy / "drawn.jsonl", copy / out.name)


def test_a_judge_of_speech_tokens_does_not_look_at_recordings(tmp_path: Path, drawn: Path):
    shutil.rmtree(drawn.with_name("drawn.jsonl.audio"))
    rows = read_candidates(judge(Module(vocoder=None, judge=Ear(hears=False)), drawn, tmp_path / "judged.jsonl"))
    assert all(row.verdict for row in rows)


def test_a_labelled_manifest_outlives_its_recordings(tmp_path: Path, drawn: Path):
    """Speech tokens are enough to train on; sound is looked for only where it is wanted."""
    judged = judge(Module(vocoder=None, judge=Meter()), drawn, tmp_path / "judged.jsonl")
    label(judged, tmp_path / "train.jsonl", LabelRule(keep="all", max_cer=1.0))
    shutil.rmtree(drawn.with_name("drawn.jsonl.audio"))
    assert len(read_manifest(tmp_path / "train.jsonl", check_audio="needed").rows) == 14
    with pytest.raises(ValueError, match="14 faults"):
        read_manifest(tmp_path / "train.jsonl")


@pytest.mark.parametrize(("thumb", "stars", "good"), [("up", None, True), ("bad", None, False), (5, 4.0, True)])
def test_a_persons_label_stands_above_the_rule(tmp_path: Path, drawn: Path, thumb, stars, good):
    rows = [json.loads(line) for line in drawn.read_text().splitlines()]
    rows[7] |= {"label": thumb}
    write_json_lines(drawn, rows)
    label(drawn, tmp_path / "train.jsonl", desirable_stars=stars)
    assert [(row.id, row.desirable) for row in read_manifest(tmp_path / "train.jsonl").rows] == [(rows[7]["id"], good)]
    judged = judge(Module(vocoder=None, judge=Meter()), drawn, tmp_path / "judged.jsonl") if stars is None else None
    if judged is not None:
        label(judged, tmp_path / "both.jsonl", LabelRule(keep="all", max_cer=0.0))
        found = {row.id: row.desirable for row in read_manifest(tmp_path / "both.jsonl").rows}
        assert found[rows[7]["id"]] is good


def test_a_label_that_may_be_stars_is_named_with_file_and_line(tmp_path: Path, drawn: Path):
    rows = [json.loads(line) for line in drawn.read_text().splitlines()]
    rows[7] |= {"label": 4}
    write_json_lines(drawn, rows)
    with pytest.raises(ValueError, match=r"drawn.jsonl:8: label: 4 looks like a number of stars"):
        label(drawn, tmp_path / "train.jsonl")


def test_own_rate_and_channels(tmp_path: Path):
    from tts_align.utils.audio import AudioError, read_recording

    soundfile.write(tmp_path / "a.wav", np.stack([np.zeros(50), np.ones(50) / 2], 1), 11_025)
    wave, rate = read_recording(tmp_path / "a.wav")
    assert (rate, wave.shape) == (11_025, torch.Size([50]))
    assert wave.tolist() == pytest.approx([0.25] * 50, abs=1e-4)
    with pytest.raises(AudioError, match="there is no such recording"):
        read_recording(tmp_path / "b.wav")
