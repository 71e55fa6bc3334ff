# SPDX-License-Identifier: Apache-2.0
"""What one optimiser step of the reward objectives costs, against lean loops that do the passes they need.

    OMP_NUM_THREADS=1 python benchmarks/step_rewards.py    # some twelve minutes of one core; step_rewards.json

As ``step.py``, whose turns are taken here too: ``mtr`` trains the reward model (asr, ctc and the voice), ``diffro``
trains the policy through it, with the defaults of the objective, and ``e2e2`` and ``e2e3`` are stages 2 and 3 of
end-to-end training. What is random is keyed by row: both sides draw it themselves, from the same seeds, so its cost is
inside both. No model has dropout, which could not be drawn alike. The frozen tokenizer's speech tokens of e2e, text ids
and mel frames are ready for the lean loop; ours makes or collates them in its step.

Rows of similar length together (as recipes have it), rows in random order, and rows all of one length, which need no
padding: the difference is what padding costs.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from lean import Model
from lean_flow import E2E as LeanE2E
from lean_flow import Flow
from lean_rewards import MTR as LeanMTR
from lean_rewards import DiffRO as LeanDiffRO
from lean_rewards import Listener, Spoken, Trained
from machine import Clock, machine, save
from step import LARGER, SIZES, Shape, TakingTurns, fit, summary, table
from torch import Tensor

from tts_align.batch import Batch
from tts_align.data.datamodule import AlignData
from tts_align.data.manifest import read_manifest, write_manifest
from tts_align.models.base.tokenizer import TokenizerHead
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.codec.mel_fsq import FSQSizes, MelFSQ
from tts_align.models.flow.dit import DiTFlow, DiTFlowSizes
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.models.reward.config import Attribute, RewardSizes
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import E2E, MTR, DiffRO, Objective, Part
from tts_align.training.module import AlignModule

Name = Literal["mtr", "diffro", "e2e2", "e2e3"]
Lengths = Literal["similar", "any", "equal"]
VOICES = ("ann", "bob")


@dataclass(frozen=True)
class Parts:
    """Sizes of the models beside the policy.

    Args:
        reward: of the reward model, but for its letters and voices.
        flow: of the flow.
        tokenizer: of the tokenizer.
    """

    reward: dict[str, int]
    flow: DiTFlowSizes
    tokenizer: FSQSizes

    def make(self, letters: str) -> dict[str, torch.nn.Module]:
        """Models of random weights, nothing of which is 0."""
        voices = (Attribute("speaker", "classes", VOICES),)
        codes = self.flow.codebook_size
        torch.manual_seed(1)
        models: dict[str, torch.nn.Module] = {
            "reward": RewardModel(sizes=RewardSizes(codes, letters, voices, ctc=True, dropout=0.0, **self.reward)),
            "flow": DiTFlow(self.flow),
            "tokenizer": MelFSQ(sizes=self.tokenizer),
        }
        with torch.no_grad():
            for value in models["flow"].parameters():
                value.add_(0.02 * torch.randn_like(value))
        return models


def parts_of(width: int, layers: int, heads: int, codebook: tuple[int, ...] = (3,) * 8) -> Parts:
    """Reward model and flow of about the policy's size.

    Args:
        width: of both.
        layers: of both.
        heads: of both.
        codebook: levels of the tokenizer's quantiser.
    """
    mel, codes = 80, int(np.prod(codebook))
    flow = DiTFlowSizes(
        codes, mel, len(VOICES), dim=width, depth=layers, heads=heads, head_dim=width // heads, lookahead_channels=width
    )
    reward = {"width": width, "layers": layers, "heads": heads, "feed_forward": 4 * width, "decoder_layers": 1}
    tokenizer = FSQSizes(mel_channels=mel, frames_per_token=2, levels=codebook, encoder_channels=width)
    return Parts(reward, replace(flow, dropout=0.0), tokenizer)


PARTS = {"small": parts_of(256, 4, 4), "larger": parts_of(512, 6, 8)}
SHAPES = {"small": Shape(SIZES, rows_per_step=8), "larger": Shape(LARGER, rows_per_step=4)}


def one_length(shape: Shape) -> Shape:
    """The same with rows that are all as long as the mean."""
    text, speech = (sum(ends) // 2 for ends in (shape.text, shape.speech))
    return replace(shape, text=(text, text), speech=(speech, speech))


class Noise(Vocoder):
    """Speaks no sound, but random features of the right length."""

    sample_rate = 16000

    def speak(self, speech: Sequence[Tensor], speakers: Sequence[str]) -> list[Tensor]:
        """There is no sound."""
        raise NotImplementedError

    def features(self, tokenizer: TokenizerHead, speech: Sequence[Tensor], speakers: Sequence[str]) -> list[Tensor]:
        """What the tokenizer reads."""
        sizes = tokenizer.sizes
        frames = [len(row) * sizes.frames_per_token for row in speech]
        return [
            torch.randn(count, sizes.mel_channels, generator=torch.Generator().manual_seed(int(row.sum())))
            for count, row in zip(frames, speech, strict=True)
        ]


def save_rows(shape: Shape, folder: Path) -> None:
    """Random rows in two voices, and what a recogniser heard in them."""
    path = Path(shape.save_rows(folder))
    rows = read_manifest(path).rows
    spoken = [replace(row, speaker=VOICES[i % 2], notes={"transcript": row.text}) for i, row in enumerate(rows)]
    write_manifest(spoken, path)


class Turns(TakingTurns):
    """Turns of a loop that reads texts and voices, too."""

    def rows_of(self, batch: Batch) -> Spoken:
        """Text ids and voices as the reward model knows them, speech tokens as the tokenizer makes them."""
        said, sound = batch.utterances, batch.recordings
        assert said is not None
        labels = said.labels or said.target_labels
        speech, mel = [row.speech for row in said.rows], ()
        if sound is not None:
            with torch.no_grad():
                made = self.module.parts.tokenizer(sound.features, sound.frames)
            speech = [tuple(row[real].tolist()) for row, real in zip(made.tokens, made.mask, strict=True)]
            mel = tuple(row[real] for row, real in zip(sound.mel, sound.mel_mask, strict=True))
        return Spoken(
            rows=[(row.text, tokens) for row, tokens in zip(said.rows, speech, strict=True)],
            letters=[row[real] for row, real in zip(labels.text, labels.text_mask, strict=True)],
            voice=labels.attribute("speaker").target,
            seeds=said.seeds,
            mel=mel,
        )

    def on_train_start(self, trainer: Any, module: AlignModule, *_: Any) -> None:
        """Keep the module, whose tokenizer is asked."""
        self.module = module
        super().on_train_start(trainer)


def objective_of(name: Name) -> Objective:
    """With its defaults."""
    if name in ("e2e2", "e2e3"):
        return E2E(stage=int(name[-1]), voices=VOICES)  # type: ignore[arg-type]
    return MTR() if name == "mtr" else DiffRO()


def loop_of(name: Name, policy: Qwen2CodecLM, reference: Qwen2CodecLM, models: dict[str, Any], rate: float) -> Trained:
    """The lean loop, with copies of the weights."""
    listener = Listener(models["reward"])
    if name == "mtr":
        return LeanMTR([listener], rate)
    if name == "diffro":
        return LeanDiffRO([Model(policy)], rate, Model(reference), listener)
    flow = Flow(models["flow"])
    return LeanE2E([Model(policy), flow, *([listener] if name == "e2e2" else [])], rate, listener, len(VOICES))


def compare(
    name: Name,
    lengths: Lengths,
    folder: Path,
    shape: Shape,
    parts: Parts,
    steps: int = 1,
    rounds: int = 5,
    learning_rate: float = 1e-4,
) -> dict[str, Any]:
    """Train ours and the lean loop turn by turn.

    Args:
        name: of the objective; e2e2 and e2e3 are its stages.
        lengths: of the rows that meet: similar, as is the default, or any; equal where ``shape`` has no others.
        folder: holds the models and rows of ``shape``.
        shape: of policy and rows.
        parts: of the other models.
        steps: in a turn.
        rounds: of turns that count; one more is for warming up.
        learning_rate: of all.

    Raises:
        AssertionError: the first step's loss or gradient norm differs between ours and the lean loop.
    """
    objective = objective_of(name)
    policy, reference = (Qwen2CodecLM(str(folder / one)) for one in ("policy", "reference"))
    models = parts.make(shape.letters())
    module = AlignModule(
        objective,
        policy,
        reference=reference if Part.REFERENCE in objective.needs else None,
        cache=str(folder / "cache"),
        optimizer=functools.partial(torch.optim.AdamW, lr=learning_rate),
        **{kind: model for kind, model in models.items() if Part(kind) in objective.needs},
    )
    data = AlignData(
        str(folder / "rows.jsonl"),
        rows_per_step=shape.rows_per_step,
        bucket_steps=1 if lengths == "any" else 8,
        vocoder=Noise() if Part.TOKENIZER in objective.needs else None,
    )
    data.prepare(policy, module.rows_wanted, module.trained_tokenizer)
    turns = Turns(loop_of(name, policy, reference, models, learning_rate), data, steps, Clock())
    fit(module, turns, steps * (rounds + 1), folder)
    return {"objective": name, "lengths": lengths, **summary(turns)}


def main(
    objectives: tuple[Name, ...] = ("mtr", "diffro", "e2e2", "e2e3"),
    sizes: tuple[Literal["small", "larger"], ...] = ("small", "larger"),
    lengths: tuple[Lengths, ...] = ("similar", "any", "equal"),
    rounds: int = 5,
    out: str = "step_rewards",
) -> None:
    """Measure, print a table, and save it.

    Args:
        objectives: which.
        sizes: of the models; the larger ones train on half as many rows in a step.
        lengths: of the rows that meet.
        rounds: of turns that count.
        out: name of the results.
    """
    rows: list[dict[str, Any]] = []
    for size, kind in itertools.product(sizes, lengths):
        shape = one_length(SHAPES[size]) if kind == "equal" else SHAPES[size]
        with tempfile.TemporaryDirectory() as scratch:
            shape.save_models(Path(scratch))
            save_rows(shape, Path(scratch))
            for name in objectives:
                found = compare(name, kind, Path(scratch), shape, PARTS[size], 1, rounds)
                rows.append({"size": size, **found})
                print(table(rows[-1:]), flush=True)
                path = save(out, {"machine": machine(), "rounds": rounds, "rows": rows})
    print(path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
