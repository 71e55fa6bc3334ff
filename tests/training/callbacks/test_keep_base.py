# SPDX-License-Identifier: Apache-2.0
"""A training that ends worse than it began says so and gives the base's models back, all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_trainer
from tiny_sound import VOICES, Tones, build_e2e, spoken_rows

from tts_align.data.manifest import write_manifest
from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.models.codec.mel_fsq import MelFSQ
from tts_align.models.flow.dit import DiTFlow
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.models.reward.model import RewardModel
from tts_align.objectives.e2e import E2E
from tts_align.training.callbacks.keep_base import KeepBase
from tts_align.training.module import AlignModule

pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.filterwarnings(
        "ignore:The '.*' does not have many workers",
        "ignore:The number of training batches .* is smaller than the logging interval",
    ),
]


class ByVocoder(Judge):
    """Hears what the vocoder wrote into the first sample: the error rate in per cent."""

    needs_audio = True

    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        return [
            Verdict("", Reading.RIGHT, float(one.waveform[0]), float(one.waveform[1]))
            for one in samples
            if one.waveform is not None
        ]

    def same_as(self, other: Judge) -> bool:
        return other is self


class Says(Tones):
    """Sound of two samples: error rate and nearest error rate."""

    def __init__(self, cer: float, nearest: float) -> None:
        super().__init__()
        self.says = torch.tensor([cer, nearest])

    def speak(self, speech: Sequence[torch.Tensor], speakers: Sequence[str]) -> list[torch.Tensor]:
        return [self.says for _ in speech]


@pytest.fixture(scope="module")
def place(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of all models, a manifest and sentences."""
    folder = tmp_path_factory.mktemp("base")
    write_manifest(spoken_rows(sentences=6), folder / "rows.jsonl")
    module, _ = build_e2e(E2E(stage=2, voices=VOICES), tiny_policy, str(folder / "rows.jsonl"))
    for name, model in {"policy": module.policy, **module.parts}.items():
        model.save(folder / name)
    with open(folder / "sentences.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": row.id, "text": row.text}) + "\n" for row in spoken_rows(sentences=3))
    return folder


def train(place: Path, run: Path, trained: tuple[float, float], base: tuple[float, float]) -> tuple[Any, Any]:
    models = {
        "tokenizer": MelFSQ(str(place / "tokenizer")),
        "reward": RewardModel(str(place / "reward")),
        "flow": DiTFlow(directory=str(place / "flow")),
    }
    module = AlignModule(
        E2E(stage=2, voices=VOICES), Qwen2CodecLM(str(place / "policy")), vocoder=Says(*trained), **models
    )
    from tts_align.data.datamodule import AlignData

    data = AlignData(str(place / "rows.jsonl"), rows_per_step=4, vocoder=Tones())
    keep = KeepBase(str(place / "sentences.jsonl"), ByVocoder(), Says(*base), sentences=2, speakers=VOICES)
    make_trainer(run, keep, max_steps=2, max_epochs=-1).fit(module, datamodule=data)
    return module, keep


@pytest.mark.parametrize(
    ("trained", "base", "kept"),
    [
        ((0.1, 0.05), (0.2, 0.05), False),
        ((0.2, 0.05), (0.2, 0.05), False),
        ((0.3, 0.05), (0.2, 0.05), True),
        ((0.1, 0.059), (0.2, 0.05), False),
        ((0.1, 0.07), (0.2, 0.05), True),
    ],
)
def test_the_better_of_the_two_is_kept(
    trained: tuple[float, float], base: tuple[float, float], kept: bool, place: Path, tmp_path: Path
):
    module, keep = train(place, tmp_path, trained, base)
    assert bool(keep.kept) == kept
    assert keep.found["trained"]["cer"] == pytest.approx(trained[0])
    assert keep.found["base"]["nearest_cer"] == pytest.approx(base[1])
    given = {
        "policy": Qwen2CodecLM(str(place / "policy")),
        "tokenizer": MelFSQ(str(place / "tokenizer")),
        "reward": RewardModel(str(place / "reward")),
        "flow": DiTFlow(directory=str(place / "flow")),
    }
    moved = {
        name
        for name, model in {"policy": module.policy, **module.parts}.items()
        if any(not torch.equal(value, model.state_dict()[key]) for key, value in given[name].state_dict().items())
    }
    assert moved == (set() if kept else {"policy", "reward", "flow"})  # stage 2 freezes the tokenizer
    from safetensors.torch import load_file

    written = load_file(tmp_path / "parts/policy.safetensors")
    assert all(torch.equal(value, written[key]) for key, value in module.policy.state_dict().items())


def test_what_could_not_be_kept_is_refused_before_training(place: Path, tiny_policy: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="sentences of at least 1"):
        KeepBase("x", ByVocoder(), Tones(), sentences=0)
    keep = KeepBase(str(place / "sentences.jsonl"), ByVocoder(), Says(0, 0), speakers=VOICES)
    module, data = build_e2e(E2E(stage=2, voices=VOICES), tiny_policy, str(place / "rows.jsonl"), vocoder=Tones())
    with pytest.raises(ValueError, match=r"no base to keep: the recipe must name model\.\w+'s directory"):
        make_trainer(tmp_path, keep, max_steps=1, max_epochs=-1).fit(module, datamodule=data)
