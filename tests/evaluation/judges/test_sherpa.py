# SPDX-License-Identifier: Apache-2.0
"""sherpa-onnx as a judge: a tiny Paraformer made here where that can be, and the way around the recogniser."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tts_align.data.records import Span
from tts_align.evaluation.judges.base import Expected, Reading, SpeechSample
from tts_align.evaluation.judges.sherpa import SherpaJudge
from tts_align.evaluation.judges.weights import MissingWeightsError


@dataclass
class Stream:
    """What a recogniser of sherpa-onnx is given, and what it answers."""

    samples: int = 0
    result: Any = None

    def accept_waveform(self, sample_rate: int, samples: Any) -> None:
        assert sample_rate == 16_000
        self.samples = len(samples)


@dataclass
class Recogniser:
    """Stands in for sherpa-onnx's: hears the length of a sound."""

    made_with: Mapping[str, Any] = field(default_factory=dict)

    def create_stream(self) -> Stream:
        return Stream()

    def decode_stream(self, stream: Stream) -> None:
        stream.result = type("Result", (), {"text": " 他长大了" if stream.samples > 9_000 else "他"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.int8.onnx").write_bytes(b"graph")
    (tmp_path / "tokens.txt").write_text("<blank> 0\n")
    return tmp_path


def test_error_rates_and_open_readings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = SherpaJudge(str(folder))
    monkeypatch.setattr(judge, "_load", lambda _: Recogniser())
    samples = [SpeechSample(torch.zeros(0, dtype=torch.long), torch.ones(length), 24_000) for length in (24_000, 3_000)]
    marked = Expected("他长大了。", spans=(Span(1, 2, ("zhang3",), ("chang2",)),), right=("zhang3",))
    first, second = judge.judge(samples, [marked, Expected("他长大了")])
    assert (first.transcript, first.cer, first.reading) == ("他长大了", 0, Reading.ABSTAINED)
    assert (second.transcript, second.cer, second.reading) == ("他", 0.75, Reading.UNMARKED)


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
