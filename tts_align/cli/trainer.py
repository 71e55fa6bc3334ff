# SPDX-License-Identifier: Apache-2.0
"""Lightning's trainer with verbs of its own: what needs models and devices, but no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from tts_align.training.module import AlignModule
from tts_align.utils.files import write_json
from tts_align.utils.messages import first_process, say


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


def load_trained(model: AlignModule, checkpoint: str | Path) -> None:
    """Give a module the weights of a checkpoint, and nothing else of it.

    Args:
        model: the module.
        checkpoint: what its training left.

    Raises:
        ValueError: it is another model's, or in several files.
    """
    if Path(checkpoint).is_dir():
        raise ValueError(
            f"{checkpoint} is sharded: join it with `python -m lightning.pytorch.utilities.consolidate_checkpoint "
            f"{checkpoint}` and pass the result as --ckpt_path"
        )
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    model.on_load_checkpoint(saved)
    model.load_state_dict(saved["state_dict"], strict=model.strict_loading)


class AlignTrainer(Trainer):
    """Lightning's trainer, which also samples and judges on whatever devices it trains on, and exports."""

    def sample(
        self,
        model: AlignModule,
        prompts: Path,
        out: Path,
        samples: int = 5,
        speakers: Sequence[str] = (),
        batch_rows: int = 64,
        seed: int | None = None,
        overwrite: bool = False,
        audio: Path | None = None,
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
            seed: of all utterances; that of the run (seed_everything) by default.
            overwrite: replace a file made with other settings.
            audio: folder for a WAV file of each utterance, made by the recipe's vocoder.
            ckpt_path: a run's checkpoint; without one the policy speaks as its directory holds it.
        """
        if ckpt_path is not None:
            load_trained(model, ckpt_path)
        from tts_align.cli.sample import sample

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
                audio=audio,
            ),
        )
        say(f"candidates:   {out}")
        if audio is not None:
            say(f"audio:        {audio}")

    def judge(
        self,
        model: AlignModule,
        candidates: Path,
        out: Path,
        batch_rows: int = 64,
        overwrite: bool = False,
        max_failed_share: float = 0.01,
    ) -> None:
        """Listen to every candidate with the recipe's judge, and write what was heard; goes on where it stopped.

        Args:
            model: its judge listens; its vocoder speaks, if the judge hears sound.
            candidates: what ``sample`` wrote.
            out: JSONL file of judged candidates, written when all are there.
            batch_rows: candidates at a time on each device; does not change the verdicts.
            overwrite: replace a file made from other candidates or with another judge.
            max_failed_share: largest share of the candidates that may go without a verdict because vocoder or judge
                failed on them.
        """
        from tts_align.cli.judge import judge

        self.work(
            model,
            partial(
                judge,
                candidates=candidates,
                out=out,
                batch_rows=batch_rows,
                overwrite=overwrite,
                max_failed_share=max_failed_share,
            ),
        )
        say(f"judged:       {out}")

    def export(
        self,
        model: AlignModule,
        to: Path,
        format: Literal["cosyvoice", "vllm"] | None = None,
        overwrite: bool = False,
        ckpt_path: Path | None = None,
        manifest: str | None = None,
        report: Path | None = None,
    ) -> None:
        """Write the policy as a model directory, read it back, and compare the two; nothing is kept if they differ.

        Args:
            model: its policy is written.
            to: directory to write; for vllm best the folder vllm in a directory exported before.
            format: cosyvoice is a whole directory as the runtime loads it, with everything but llm.pt from the
                policy's own; vllm its language model alone, as vLLM reads it. By default what the policy itself is.
            overwrite: replace an earlier export.
            ckpt_path: a run's checkpoint; the run's last one by default.
            manifest: rows to compare on.
            report: JSON file for what was found.
        """
        if not first_process():
            return
        if ckpt_path is not None:
            load_trained(model, ckpt_path)
        model.parts.clear()  # a reference is as large as the policy, and not needed
        from tts_align.cli.export import export

        found = export(model.policy, Path(to), format, overwrite, manifest)
        say("\n".join(found.lines()))
        if report is not None:
            write_json(report, {**vars(found), "checkpoint": None if ckpt_path is None else str(ckpt_path)})

    def work(
        self, model: LightningModule, function: Callable[..., object], datamodule: LightningDataModule | None = None
    ) -> None:
        """Call a function in every process, with the model on its device and in the trainer's precision.

        Args:
            model: what the function works with; knows this trainer while it works.
            function: called with the model, and ``rank``, ``world`` and ``barrier`` by name.
            datamodule: attached to the trainer meanwhile.
        """
        nothing = DataLoader(TensorDataset(torch.zeros(1)))
        self.predict(_Work(model, function, datamodule), dataloaders=nothing, return_predictions=False)
