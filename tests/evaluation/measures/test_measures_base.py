# SPDX-License-Identifier: Apache-2.0
import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tts_align.evaluation.measures.base import MeasuredSample, Sound, UtteranceMeasure, describe, direction


class Loudness(UtteranceMeasure):
    name = "loudness"
    higher_is_better = True

    def __init__(self, model: str = "", floor: float = 0.0, batch_size: int = 1) -> None:
        super().__init__()
        self.file = model

    def model_files(self):
        return [Path(self.file)] if self.file else []

    def measure(self, samples):
        return [{"loudness": float(one.sound.waveform.abs().max())} for one in samples]


class Weighted(Loudness):
    name = "weighted"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def sample(waveform=None):
    return MeasuredSample(waveform, 16_000, "a", torch.tensor([1]), True)


def test_identity_names_arguments_and_the_content_of_files(tmp_path):
    (tmp_path / "a").mkdir()
    for path, content in ((tmp_path / "a/model.onnx", "1"), (tmp_path / "model.onnx", "1"), (tmp_path / "x", "2")):
        path.write_text(content)
    one = Loudness(str(tmp_path / "a/model.onnx")).identity()
    assert one["model"] == "model.onnx"
    assert one["digest"]
    assert one == Loudness(str(tmp_path / "model.onnx"), batch_size=7).identity()  # the same, wherever it lies
    assert one["digest"] != Loudness(str(tmp_path / "x")).identity()["digest"]
    assert Loudness().identity() != Loudness(floor=1.0).identity()
    assert Loudness().identity()["digest"] == ""


def test_identity_goes_by_weights():
    one = Weighted()
    same = copy.deepcopy(one)
    assert one.identity() == same.identity()
    with torch.no_grad():
        same.weight.add_(1)
    assert one.identity()["digest"] != same.identity()["digest"]


def test_measures_run_on_their_own_device_and_without_gradients():
    wave = torch.full((4,), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert Loudness().measure([sample(wave)]) == [{"loudness": 0.5}]
    with pytest.raises(ValueError, match=r"must set model\.vocoder"):
        Loudness().measure([sample()])


def test_sound_is_resampled():
    wave = torch.sin(torch.arange(4800) * 0.05)
    assert len(Sound(wave, 48_000).at(16_000)) == 1600
    assert Sound(wave, 16_000).at(16_000) is not None


def test_summary_describes_measures_and_finds_directions():
    described = describe([Loudness()])
    assert described["loudness"]["higher_is_better"] is True
    assert direction("loudness_peak", described) is True
    assert direction("loud", described) is None
    with pytest.raises(ValueError, match="'loudness' twice"):
        describe([Loudness(), Loudness()])
