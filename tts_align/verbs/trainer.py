# SPDX-License-Identifier: Apache-2.0
"""Lightning's trainer with verbs of its own: what needs models and devices, but no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from tts_align.messages import say
from tts_align.module import AlignModule


class _Work(LightningModule):
    """Carries a function into the processes and onto the devices of a trainer, as one step of a prediction.

    Args:
        module: what the function works with.
        function: called with ``module``, ``rank``, ``world`` and ``barrier``.
        datamodule: attached to the trainer; by Lightning's own way it would have to have rows to predict.
    """

    def __init__(
        self, module: LightningModule, function: Callable[..., object], datamodule: LightningDataModule | None
    ) -> None:
        super().__init__()
        self.module, self.function, self.datamodule = module, function, datamodule

    def predict_step(self, batch: Any, *_: Any) -> Any:
        """Do this process's share."""
        trainer = self.trainer
        if self.datamodule is not None:
            trainer.datamodule, self.datamodule.trainer = self.datamodule, trainer  # type: ignore[attr-defined]
        barrier = trainer.strategy.barrier if trainer.world_size > 1 else None
        self.function(self.module, rank=trainer.global_rank, world=trainer.world_size, barrier=barrier)
        return batch


class AlignTrainer(Trainer):
    """Lightning's trainer, which also samples and judges, on whatever devices it trains on."""

    def sample(
        self,
        model: AlignModule,
        prompts: Path,
        out: Path,
        samples: int = 5,
        speakers: Sequence[str] = (),
        batch_rows: int = 64,
        seed: int = 0,
        overwrite: bool = False,
        ckpt_path: Path | None = None,
    ) -> None:
        """Speak every sentence several times in every voice with the recipe's policy; goes on where it stopped.

        Args:
            model: its policy speaks, as its sampling says.
            prompts: JSONL file of sentences.
            out: JSONL file of candidates, written when all are there.
            samples: utterances per sentence and voice.
            speakers: voices; a sentence that names its own is spoken in that one only.
            batch_rows: utterances at a time on each device; does not change them.
            seed: of all utterances.
            overwrite: replace a file made with other settings.
            ckpt_path: a run's checkpoint; without one the policy speaks as its directory holds it.
        """
        if ckpt_path is not None:
            saved = torch.load(ckpt_path, map_location="cpu", weights_only=True)
            model.on_load_checkpoint(saved)
            model.load_state_dict(saved["state_dict"], strict=model.strict_loading)
        from tts_align.verbs.sample import sample

        self.work(
            model,
            partial(
                sample,
                prompts=prompts,
                out=out,
                samples=samples,
                speakers=speakers,
                batch_rows=batch_rows,
                seed=seed,
                overwrite=overwrite,
            ),
        )
        say(f"candidates:   {out}")

    def judge(
        self, model: AlignModule, candidates: Path, out: Path, batch_rows: int = 64, overwrite: bool = False
    ) -> None:
        """Listen to every candidate with the recipe's judge, and write what was heard; goes on where it stopped.

        Args:
            model: its judge listens; its vocoder speaks, if the judge hears sound.
            candidates: what ``sample`` wrote.
            out: JSONL file of judged candidates, written when all are there.
            batch_rows: candidates at a time on each device; does not change the verdicts.
            overwrite: replace a file made from other candidates or with another judge.
        """
        from tts_align.verbs.judge import judge

        self.work(model, partial(judge, candidates=candidates, out=out, batch_rows=batch_rows, overwrite=overwrite))
        say(f"judged:       {out}")

    def work(
        self, model: AlignModule, function: Callable[..., object], datamodule: LightningDataModule | None = None
    ) -> None:
        """Call a function in every process, with the model on its device and in the trainer's precision.

        Args:
            model: what the function works with; knows this trainer while it works.
            function: called with the model, and ``rank``, ``world`` and ``barrier`` by name.
            datamodule: attached to the trainer meanwhile.
        """
        nothing = DataLoader(TensorDataset(torch.zeros(1)))
        self.predict(_Work(model, function, datamodule), dataloaders=nothing, return_predictions=False)
