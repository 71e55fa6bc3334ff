# SPDX-License-Identifier: Apache-2.0
"""CosyVoice directories as the policy and the flow of end-to-end training, with an S3 tokenizer."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_trainer
from tiny_directory import FAMILIES, make_directory

from tts_align.data.datamodule import AlignData
from tts_align.data.manifest import write_manifest
from tts_align.data.records import Row
from tts_align.data.sound import AcousticMel
from tts_align.models.cosyvoice.directory import ModelDirectory
from tts_align.models.cosyvoice.flow.model import load_flow
from tts_align.models.cosyvoice.flow.open_flow import open_flow
from tts_align.models.cosyvoice.lm import CosyVoiceLM
from tts_align.models.cosyvoice.s3.files import S3Sizes
from tts_align.models.cosyvoice.s3.tokenizer import S3Tokenizer
from tts_align.models.reward.config import RewardSizes
from tts_align.models.reward.model import RewardModel
from tts_align.objectives.e2e import E2E
from tts_align.training.module import AlignModule
from tts_align.utils.audio import write_wav

CODES = 40
pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*' does not have many workers",
    "ignore:The number of training batches .* is smaller than the logging interval",
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Recordings with speaker vectors, as `tts-align prepare` leaves them."""
    folder, random = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    rows = []
    for i, text in enumerate(("Hello.", "hell", "oh", "hello hello")):
        path = write_wav(folder / f"{i}.wav", 0.1 * random.normal(size=4800 + 1600 * i), 16000)
        rows.append(Row(id=str(i), text=text, audio=path.name, speaker_vector=tuple(random.normal(size=192).tolist())))
    return str(write_manifest(rows, folder / "rows.jsonl"))


def build(family: str, directory: Path, manifest: str, objective: E2E) -> tuple[AlignModule, AlignData]:
    torch.manual_seed(1)
    sizes = S3Sizes(mel_channels=128, width=32, heads=2, layers=1, levels=(5, 8), kernel_size=5, embedding_channels=6)
    tokenizer = S3Tokenizer(sizes)
    reward = RewardModel(
        sizes=RewardSizes(CODES, "Helo .h", width=8, layers=1, heads=2, feed_forward=8, decoder_layers=1, dropout=0.0)
    )
    module = AlignModule(
        objective,
        CosyVoiceLM(str(directory)),
        reward=reward,
        flow=open_flow(str(directory)),
        tokenizer=tokenizer,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
    )
    acoustic = AcousticMel(fmax=8000.0 if family == "cosyvoice2" else None)
    return module, AlignData(manifest, rows_per_step=2, acoustic=acoustic)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_stages(family: str, tmp_path: Path, manifest: str):
    directory, start = make_directory(tmp_path / "model", family, codebook_size=CODES), None
    for stage in (1, 2, 3):
        objective = E2E(stage=stage, start=start, attributes=() if stage == 3 else None)  # type: ignore[arg-type]
        module, data = build(family, directory, manifest, objective)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        trainer = make_trainer(tmp_path / str(stage), max_steps=2, max_epochs=-1)
        trainer.fit(module, datamodule=data)
        moved = {
            name.split(".")[1] if name.startswith("parts.") else name.split(".")[0]
            for name, value in module.state_dict().items()
            if not torch.equal(value, before[name])
        }
        expected = {
            1: {"policy", "tokenizer", "reward", "flow", "objective"},
            2: {"policy", "reward", "flow"},
            3: {"policy", "flow"},
        }
        assert moved == expected[stage]
        assert torch.isfinite(trainer.callback_metrics["train/loss"])
        start = str(tmp_path / str(stage))
    again = CosyVoiceLM(str(tmp_path / "3/parts/policy"))
    assert again.digest() == module.policy.digest()


def test_the_flow_is_that_of_the_directory(tmp_path: Path):
    """To be trained; what is loaded without a directory speaks, as vocoder and policy do."""
    directory = make_directory(tmp_path / "model", "cosyvoice3", codebook_size=CODES)
    flow = open_flow(str(directory))
    state = torch.load(directory / "flow.pt", weights_only=True)
    assert flow.training
    assert not load_flow("cosyvoice3", state, ModelDirectory.find(directory).config).training
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())
    assert all(value.requires_grad for value in flow.parameters())
    assert (flow.codebook_size, flow.speaker_channels) == (CODES, 192)
    assert replace(AcousticMel(), fmax=8000.0).fmax == 8000.0
