# SPDX-License-Identifier: Apache-2.0
"""The two embedded corpora as experiments see them: candidates of a seed, one fit, one test."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.optim.lr_scheduler import LinearLR

from tts_align.cli.judge import judge
from tts_align.cli.label import label
from tts_align.cli.sample import sample
from tts_align.data.datamodule import AlignData
from tts_align.data.demo.audio import ALPHABET
from tts_align.evaluation.judges.base import Judge
from tts_align.evaluation.judges.ctc import CTCJudge
from tts_align.evaluation.judges.symbolic import SymbolicJudge
from tts_align.evaluation.listening import speak_and_judge
from tts_align.evaluation.parts import Parts
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.report import JudgedUtterance
from tts_align.evaluation.speaking import utterance_requests
from tts_align.models.base.generation import Sampling
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.reward import RewardHead
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.models.reward.config import Attribute, RewardSizes
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import KTO, MTR, Objective
from tts_align.training.callbacks.moving_average import MovingAverage
from tts_align.training.contrast import SIDES, Contrast, undesirable_weight
from tts_align.training.module import AlignModule
from tts_align.training.stages import write_log_ratios
from tts_align.utils.files import write_json

SPEAKERS = ("sakura", "takumi")
TESTED = Sampling(top_p=0.9, top_k=0, repetition_window=0, min_ratio=1.0, max_ratio=15.0)
DRAWN = Sampling(top_p=0.97, top_k=0, repetition_window=0, min_ratio=1.0, max_ratio=15.0)
FINAL_FACTOR = 0.05
"""Of the learning rate: it falls linearly over the whole training, for every method alike."""
REWARD_EPOCHS, REWARD_RATE = 10, 2e-3
REWARD_SIZES: dict[str, Any] = {
    "characters": ALPHABET,
    "width": 96,
    "layers": 3,
    "heads": 4,
    "feed_forward": 256,
    "decoder_layers": 1,
}
"""Half a million parameters."""
Name = Literal["symbolic", "audio"]


@dataclass(frozen=True)
class Fit:
    """What is trained.

    Args:
        objective: with its knobs.
        learning_rate: of AdamW at the first step.
        paired_only: use only rows that stand in pairs.
        steps: optimiser steps after which the training ends, instead of epochs.
        epochs: passes over the rows.
        contrast: file of token weights.
        reward: directory of a reward model, or one that is built.
        guard: listens while it trains, and may stop it.
        final_factor: share of the learning rate that is left at the last step; it falls linearly.
        average: decay of the moving average of the weights that the training ends with, 0 for none.
    """

    objective: Objective
    learning_rate: float
    paired_only: bool = False
    steps: int = -1
    epochs: int = 1
    contrast: Path | None = None
    reward: Path | RewardHead | None = None
    guard: Callback | None = None
    final_factor: float = FINAL_FACTOR
    average: float = 0.0


@dataclass
class Corpus:
    """One embedded corpus in a working directory.

    Args:
        name: symbolic or audio.
        work: where candidates and caches lie; what is there is not made again.
        rows_per_step: of every fit.
        reward_epochs: of every reward model.
    """

    name: Name
    work: Path
    rows_per_step: int = 16
    reward_epochs: int = REWARD_EPOCHS
    base_heard: dict[tuple[str, int], list[JudgedUtterance]] = field(default_factory=dict)

    @cached_property
    def base(self) -> CodecLM:
        """The base model."""
        return self.policy().requires_grad_(False).eval()

    def policy(self) -> CodecLM:
        """A fresh copy of the base model to train."""
        return Qwen2CodecLM(f"demo:{self.name}/base")

    @cached_property
    def vocoder(self) -> Vocoder | None:
        """Turns speech tokens into sound; symbolic speech tokens are read as they are."""
        return MelVocoder("demo:audio/codec") if self.name == "audio" else None

    def listener(self, who: str) -> Judge:
        """``labeller`` marks training data, ``judge`` only tests; symbolic tokens leave no room for two opinions."""
        return CTCJudge(f"demo:audio/{who}") if self.name == "audio" else SymbolicJudge()

    @cached_property
    def judge(self) -> Judge:
        """Who listens in tests."""
        return self.listener("judge")

    def labelled(self, seed: int, split: str = "preference", sentences: int | None = None) -> Path:
        """Manifest of labelled rows, from candidates drawn with this seed."""
        out = self.work / f"{split}-{seed}-labelled.jsonl"
        if out.exists():
            return out
        prompts = Path(__file__).parents[1] / "tts_align/data/demo/assets/audio" / f"sentences/{split}.jsonl"
        module = Parts(self.base, self.listener("labeller"), DRAWN, self.vocoder)
        drawn, heard = self.work / f"{split}-{seed}-drawn.jsonl", self.work / f"{split}-{seed}-heard.jsonl"
        if not heard.exists():
            sample(module, prompts, drawn, 5, SPEAKERS, 256, seed)
            judge(module, drawn, heard, 256)
        label(heard, out)
        return out

    def data(self, fit: Fit, seed: int, flip: bool = False) -> AlignData:
        """The rows as the objective reads them."""
        return AlignData(
            str(self.labelled(seed)),
            wants=fit.objective.rows_wanted,
            rows_per_step=self.rows_per_step,
            paired_only=fit.paired_only,
            flip_labels=flip,
            seed=seed,
        )

    def fit(self, fit: Fit, seed: int, flip: bool = False) -> tuple[AlignModule, dict[str, Any]]:
        """Train once; returns the module, its data attached, and what it cost."""
        seed_everything(seed, verbose=False)
        data = self.data(fit, seed, flip)
        data.prepare(self.base)
        steps = data.steps_per_epoch * fit.epochs if fit.steps < 0 else fit.steps
        module = AlignModule(
            fit.objective,
            self.policy(),
            contrast=Contrast(weights=str(fit.contrast)) if fit.contrast else None,
            reward=RewardModel(str(fit.reward)) if isinstance(fit.reward, Path) else fit.reward,
            vocoder=self.vocoder if fit.guard else None,
            sampling=TESTED,
            cache=str(self.work / "cache"),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=fit.learning_rate),
            lr_scheduler=lambda optimizer: LinearLR(optimizer, 1.0, fit.final_factor, total_iters=steps),
        )
        callbacks = [MovingAverage(fit.average)] if fit.average else []
        watched = {"callbacks": [*callbacks, *([fit.guard] if fit.guard else [])], "default_root_dir": self.work}
        trainer = quiet_trainer(max_epochs=fit.epochs if fit.steps < 0 else -1, max_steps=fit.steps, **watched)
        begun = time.process_time()
        trainer.fit(module, data)
        cost = {"steps": trainer.global_step, "cpu_seconds": round(time.process_time() - begun, 1)}
        cost["rows"] = len(data.sources("train"))
        return module, cost

    def contrast(self, seed: int, learning_rate: float, sft_weight: float, paired_only: bool = False) -> Path:
        """Token weights of a pair fitted on this seed's rows."""
        name = f"contrast-{seed}-{learning_rate:g}-{sft_weight:g}{'-paired' if paired_only else ''}"
        note = self.work / f"{name}.txt"
        if note.exists():
            return Path(note.read_text())
        pair = {}
        for side in SIDES:
            flip = side == "undesirable"
            knobs: dict[str, float] = {"sft_weight": sft_weight}
            if flip:
                labels = self._labels(seed, paired_only)
                knobs["undesirable_weight"] = undesirable_weight(~labels)
            module, _ = self.fit(Fit(KTO(**knobs), learning_rate, paired_only), seed, flip)
            pair[side] = {name: value.detach().clone() for name, value in module.policy.named_parameters()}
        ratios = write_log_ratios(module, pair, self.work / "cache")
        note.write_text(str(ratios.path))
        return ratios.path

    def reward(
        self,
        seed: int,
        split: str = "preference",
        attributes: tuple[Attribute, ...] = (),
        ctc: bool = False,
        regularised: bool = False,
    ) -> Path:
        """A reward model that has learnt, from this seed's rows, what the labelling recogniser heard in them.

        Args:
            seed: of the rows, the order in which they are read, and the first weights.
            split: of the corpus.
            attributes: further tasks.
            ctc: a CTC head beside the decoder.
            regularised: by RRPO's three regularisers.
        """
        kind = [*(one.name for one in attributes), *["ctc"] * ctc, *["rrpo"] * regularised]
        out = self.work / "-".join(["reward", str(seed), split, *kind])
        if out.exists():
            return out
        seed_everything(seed, verbose=False)
        data = AlignData(str(self.labelled(seed, split)), wants=MTR().rows_wanted, rows_per_step=32, seed=seed)
        policy = self.policy()
        data.prepare(policy)
        steps = data.steps_per_epoch * self.reward_epochs
        sizes = RewardSizes(policy.layout.codebook_size, attributes=attributes, ctc=ctc, **REWARD_SIZES)
        model = RewardModel(sizes=sizes)
        module = AlignModule(
            MTR(label_smoothing=0.1, mixup=0.2, adversarial=0.5, radius=0.5) if regularised else MTR(),
            policy,
            reward=model,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=REWARD_RATE),
            lr_scheduler=lambda optimizer: LinearLR(optimizer, 1.0, FINAL_FACTOR, total_iters=steps),
        )
        begun = time.process_time()
        quiet_trainer(max_epochs=self.reward_epochs).fit(module, data)
        model.eval().save(out)
        cost = {"steps": steps, "cpu_seconds": round(time.process_time() - begun, 1)}
        write_json(self.work / f"{out.name}.json", cost)
        return out

    def _labels(self, seed: int, paired_only: bool) -> Any:
        data = self.data(Fit(KTO(), 1e-3, paired_only), seed)
        data.prepare(self.base)
        return data.labels

    def test(self, policy: CodecLM, system: str, split: str, seed: int) -> list[JudgedUtterance]:
        """Speak and judge every sentence of a split once in both voices."""
        policy.eval()
        prompts = read_prompts(f"demo:audio/sentences/{split}.jsonl")
        items = utterance_requests(prompts, SPEAKERS, 1, 1000 + seed)
        heard = speak_and_judge(policy, Parts(policy, self.judge, TESTED, self.vocoder), items, 256)
        return [JudgedUtterance.of(one, system) for one in heard]

    def base_test(self, split: str, seed: int) -> list[JudgedUtterance]:
        """The same of the base model, once per split and seed."""
        if (split, seed) not in self.base_heard:
            self.base_heard[split, seed] = self.test(self.base, "base", split, seed)
        return self.base_heard[split, seed]


def quiet_trainer(**knobs: Any) -> Trainer:
    """A trainer that says nothing and keeps nothing."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        log_every_n_steps=10,
        **knobs,
    )
