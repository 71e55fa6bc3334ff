# SPDX-License-Identifier: Apache-2.0
"""sherpa-onnx as a judge, on a tiny Paraformer and a tiny SenseVoice made here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sherpa import save_sherpa

from tts_align.data.records import Span
from tts_align.evaluation.judges.base import Expected, Reading, SpeechSample
from tts_align.evaluation.judges.sherpa import SherpaJudge
from tts_align.evaluation.judges.weights import MissingWeightsError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.int8.onnx").write_bytes(b"graph")
    (tmp_path / "tokens.txt").write_text("<blank> 0\n")
    return tmp_path


def noise(*lengths: int, loudness: float = 0.3) -> list[SpeechSample]:
    generator = torch.Generator().manual_seed(0)
    sounds = [loudness * torch.randn(length, generator=generator) for length in lengths]
    return [SpeechSample(torch.zeros(0, dtype=torch.long), sound, 24_000) for sound in sounds]


def test_paraformer_hears(tmp_path: Path) -> None:
    """What is loud says 长, a token for six frames of 10 ms; readings stay open, because hanzi have none."""
    pytest.importorskip("sherpa_onnx", reason="extra mandarin")
    judge = SherpaJudge(str(save_sherpa(tmp_path / "paraformer", "paraformer")))
    marked = Expected("长长长长长。", spans=(Span(1, 2, ("zhang3",), ("chang2",)),), right=("zhang3",))
    loud, longer = judge.judge(noise(7_200, 14_400), [marked, Expected("长" * 20)])
    assert loud.transcript == "长长长长长"
    assert (loud.cer, loud.reading) == (0, Reading.ABSTAINED)
    assert longer.transcript == "长" * 10
    assert (longer.cer, longer.reading) == (0.5, Reading.UNMARKED)
    assert judge.judge(noise(7_200, loudness=1e-4), [Expected("他")])[0].transcript[0] == "他"


def test_verdicts_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    pytest.importorskip("sherpa_onnx", reason="extra mandarin")
    judge = SherpaJudge(str(save_sherpa(tmp_path / "paraformer", "paraformer")))
    samples = noise(7_200, 20_000, 14_400)
    together = [one.transcript for one in judge.judge(samples, [Expected("长")] * 3)]
    assert together == [judge.judge([one], [Expected("长")])[0].transcript for one in samples]


def test_sense_voice_hears(tmp_path: Path) -> None:
    """CTC: what repeats is one letter."""
    pytest.importorskip("sherpa_onnx", reason="extra mandarin")
    judge = SherpaJudge(str(save_sherpa(tmp_path / "sense_voice", "sense_voice")), "sense_voice")
    assert judge.judge(noise(7_200), [Expected("长")])[0].transcript == "长"


@pytest.mark.parametrize("kind", ["paraformer", "sense_voice"])
def test_the_recogniser_is_made_from_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    sherpa = pytest.importorskip("sherpa_onnx", reason="extra mandarin")
    made: dict[str, Any] = {}
    for name in ("from_paraformer", "from_sense_voice"):
        monkeypatch.setattr(sherpa.OfflineRecognizer, name, lambda name=name, **given: made.update(given, name=name))
    SherpaJudge(str(folder), kind).recogniser("zh")
    assert made["name"] == f"from_{kind}"
    assert made["tokens"] == str(folder / "tokens.txt")
    assert str(folder / "model.int8.onnx") in made.values()
    assert made["provider"] == "cpu"


def test_faults_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingWeightsError, match=r"hf download csukuangfj/sherpa-onnx-paraformer-zh-2023-09-14"):
        SherpaJudge(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"SenseVoice hears zh, en, ja, ko, yue, and not 'de'"):
        SherpaJudge(str(folder), "sense_voice").recogniser("de")
    monkeypatch.setitem(sys.modules, "sherpa_onnx", None)
    with pytest.raises(ValueError, match=r"pip install 'tts-align\[mandarin\]'"):
        SherpaJudge(str(folder)).recogniser("zh")


def test_identity_is_that_of_the_graph(folder: Path) -> None:
    one = SherpaJudge(str(folder))
    before = one.identity()
    (folder / "tokens.txt").write_text("<blank> 0\n长 1\n")
    assert one.identity()["weights"] != before["weights"]
