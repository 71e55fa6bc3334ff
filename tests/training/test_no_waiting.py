# SPDX-License-Identifier: Apache-2.0
"""Training steps that never let the host wait for the device: what it reads of it, and what it hands over unpinned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_device import DEVICE, nobody_waits, simulated_device
from tiny_sound import REWARD, VOICES, Tones, build_e2e, micro_batches, spoken_rows

from tts_align.batch import Batch
from tts_align.data.datamodule import AlignData
from tts_align.data.manifest import write_manifest
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import E2E, MTR, DiffRO, Objective
from tts_align.training.module import AlignModule

pytestmark = pytest.mark.whole_runs


def moved(module: AlignModule, data: AlignData) -> tuple[AlignModule, Batch]:
    """A module on the pretended device and a batch as the trainer hands it over."""
    (batch,) = micro_batches(module, data)
    return module.to(DEVICE), module.transfer_batch_to_device(batch, DEVICE, 0)


def check(module: AlignModule, data: AlignData) -> None:
    """The loss of the CPU, and its gradient, without a moment's wait."""
    (batch,) = micro_batches(module, data)
    expected = module.objective(module.score(batch)).loss.item()
    with simulated_device():
        module, batch = moved(module, data)
        with nobody_waits():
            loss = module.objective(module.score(batch)).loss
            loss.backward()
        assert loss.cpu().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_end_to_end(stage: int, resample: bool, tiny_policy: Path, tmp_path: Path):
    if stage < 3 and not resample:
        return
    manifest = str(write_manifest(spoken_rows(sentences=6), tmp_path / "rows.jsonl"))
    knobs: dict[str, Any] = {"resample": resample, "text_task": "ctc"} if stage == 3 else {}
    objective = E2E(stage=stage, voices=VOICES, **knobs)  # type: ignore[arg-type]
    check(*build_e2e(objective, tiny_policy, manifest, vocoder=Tones()))


@pytest.mark.parametrize(
    "objective", [DiffRO(tasks=("asr", "ctc", "speaker"), resample=False), DiffRO(), MTR()], ids=["all", "asr", "mtr"]
)
def test_rewards(objective: Objective, tiny_policy: Path, tmp_path: Path):
    torch.manual_seed(0)
    reward = RewardModel(sizes=REWARD)
    manifest = str(write_manifest(spoken_rows(sentences=6), tmp_path / "rows.jsonl"))
    module = AlignModule(objective, Qwen2CodecLM(str(tiny_policy)), reward=reward)
    check(module, AlignData(manifest, rows_per_step=8))


def test_waiting_is_noticed():
    with simulated_device():
        here = torch.arange(3.0, device=DEVICE)
        for wait in (
            lambda: here.sum().item(),
            lambda: here[here > 1],
            lambda: here.cpu(),
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: torch.ones(2).to(DEVICE),
            lambda: bool((here > 1).any()),
        ):
            with nobody_waits(), pytest.raises(RuntimeError, match="waits"):
                wait()
        with nobody_waits():
            (here + 1).sum()
            torch.ones(2, device=DEVICE)
