# SPDX-License-Identifier: Apache-2.0
"""Models of sound small enough to train in a test, recordings, and a vocoder for rows that have speech tokens only."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import CODES, LETTERS, REWARD_SIZES, make_rows, save_recipe
from torch import Tensor

from tts_align.batch import Batch
from tts_align.data.collate import MicroBatch, MicroBatches, PlanSampler
from tts_align.data.datamodule import AlignData
from tts_align.data.manifest import write_manifest
from tts_align.data.records import Row
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.codec.mel_fsq import FSQSizes, MelFSQ
from tts_align.models.flow.dit import DiTFlow, DiTFlowSizes
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.models.reward.config import Attribute, RewardSizes
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import Part
from tts_align.objectives.e2e import E2E
from tts_align.training.module import AlignModule
from tts_align.utils.audio import write_wav

VOICES = ("ann", "bob")
FSQ = FSQSizes(
    sample_rate=4000,
    window_samples=128,
    hop_samples=32,
    mel_channels=6,
    frames_per_token=2,
    levels=(5, 4),
    embedding_channels=8,
    encoder_channels=12,
    encoder_blocks=1,
)
REWARD = RewardSizes(
    codebook_size=CODES,
    characters=LETTERS,
    attributes=(Attribute("speaker", "classes", VOICES),),
    **REWARD_SIZES,
    ctc=True,
    dropout=0.0,
)
FLOW = DiTFlowSizes(
    codebook_size=CODES,
    mel_channels=6,
    speaker_channels=2,
    frames_per_token=2,
    lookahead=1,
    lookahead_channels=8,
    dim=8,
    depth=1,
    heads=2,
    head_dim=4,
    time_channels=8,
    position_kernel=3,
    position_groups=2,
    chunk_frames=4,
    dropout=0.0,
)
TOKEN_SAMPLES = FSQ.hop_samples * FSQ.frames_per_token


class Tones(Vocoder):
    """Every code is a tone of its own; the second voice is an octave higher."""

    sample_rate = FSQ.sample_rate

    def speak(self, speech: Sequence[Tensor], speakers: Sequence[str]) -> list[Tensor]:
        return [tones(speech_tokens.tolist(), name) for speech_tokens, name in zip(speech, speakers, strict=True)]


def tones(speech_tokens: Sequence[int], speaker: str) -> Tensor:
    time = torch.arange(TOKEN_SAMPLES) / FSQ.sample_rate
    pitch = 100.0 * (1 + VOICES.index(speaker))
    return torch.cat([0.5 * torch.sin(2 * torch.pi * (pitch + 40 * code) * time) for code in speech_tokens])


def spoken_rows(**options: Any) -> list[Row]:
    """Good rows in two voices."""
    rows = [row for row in make_rows(**options) if row.desirable]
    return [replace(row, speaker=VOICES[i % 2]) for i, row in enumerate(rows)]


def save_recordings(folder: Path, rows: Sequence[Row] | None = None, name: str = "sounds.jsonl") -> str:
    """A manifest of recordings without speech tokens."""
    given = []
    for row in spoken_rows() if rows is None else rows:
        path = folder / f"{row.id}.wav"
        write_wav(path, tones(row.speech, row.speaker).numpy(), FSQ.sample_rate)
        given.append(replace(row, speech=(), audio=path.name))
    return str(write_manifest(given, folder / name))


def parts(seed: int = 0) -> dict[str, Any]:
    """Tokenizer, reward model and flow of random weights, large enough to disagree with each other."""
    torch.manual_seed(seed)
    made = {"tokenizer": MelFSQ(sizes=FSQ), "reward": RewardModel(sizes=REWARD), "flow": DiTFlow(FLOW)}
    with torch.no_grad():
        for part in made.values():
            for value in part.parameters():
                if value.ndim > 1 or float(value.abs().sum()) == 0:
                    value.normal_(std=0.3)
    return made


def build_e2e(
    objective: E2E, directory: Path, manifest: str, lr: float = 0.05, seed: int = 0, **data: Any
) -> tuple[AlignModule, AlignData]:
    """A module and its data, as a recipe would build them."""
    torch.manual_seed(seed + 1)
    models = {name: model for name, model in parts(seed).items() if Part(name) in objective.needs}
    optimizer = data.pop("optimizer", torch.optim.SGD)
    bistream = data.pop("bistream", (5, 15))
    policy = Qwen2CodecLM(str(directory), bistream=bistream)
    torch.manual_seed(seed + 2)  # of the bridges
    module = AlignModule(objective, policy, **models, optimizer=functools.partial(optimizer, lr=lr))
    return module, AlignData(manifest, **({"rows_per_step": 8} | data))


def micro_batches(module: AlignModule, data: AlignData, cut: int = 1) -> list[Batch]:
    """The first optimiser step in so many micro-batches."""
    data.prepare(module.policy, module.rows_wanted, module.trained_tokenizer)
    split = data._splits["train"]
    sampler = PlanSampler(split.plan, split.examples, accumulate=cut)
    micro: list[MicroBatch] = sampler.step(next(iter(split.plan.steps(0))))
    collated = MicroBatches(split.examples, split.layout)
    return [collated[one] for one in micro]


def double(batch: Batch) -> Batch:
    """The same sound in double precision."""
    sound = batch.recordings
    assert sound is not None
    wide = replace(sound, features=sound.features.double(), mel=sound.mel.double(), speaker=sound.speaker.double())
    return replace(batch, recordings=wide)


def gradients(module: AlignModule, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """Of the sum of the losses; what has none is left out."""
    module.zero_grad(set_to_none=True)
    for batch in batches:
        module.objective(module.score(batch)).loss.backward()
    return {
        name: value.grad.detach().double().numpy().copy()
        for name, value in module.named_parameters()
        if value.grad is not None
    }


def save_e2e_recipe(folder: Path, policy: Path, manifest: str, **changes: Any) -> str:
    """A recipe of two steps in each stage, on recordings."""
    paths = {
        "model__tokenizer": {"class_path": "MelFSQ", "init_args": {"sizes": _plain(FSQ)}},
        "model__reward": {"class_path": "RewardModel", "init_args": {"sizes": _plain(REWARD)}},
        "model__flow": {"class_path": "DiTFlow", "init_args": {"sizes": _plain(FLOW)}},
        "model__stage_fit": {"epochs": 2, "second_epochs": 2},
        "trainer__max_epochs": 2,
    }
    objective = {"name": "e2e", "voices": list(VOICES)}
    return save_recipe(folder, objective, policy, manifest, **(paths | changes))


def _plain(sizes: Any) -> dict[str, Any]:
    """As YAML has it."""
    values = dataclasses.asdict(sizes)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
