# SPDX-License-Identifier: Apache-2.0
"""One training step for every objective; the only file that knows models and objectives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from tts_align.batch import Batch, Mean, Record, RowsWanted, Scored
from tts_align.evaluation.judges.base import Judge
from tts_align.evaluation.speech import TestSettings
from tts_align.models.base.flow import FlowHead
from tts_align.models.base.generation import Sampling
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.reward import RewardHead
from tts_align.models.base.tokenizer import TokenizerHead
from tts_align.models.base.vocoder import Vocoder
from tts_align.objectives.base import Objective, Part, Step, checked_outcome
from tts_align.training.callbacks.tokens import KeepParts, TokenStatistics
from tts_align.training.checkpoint import check_fits, trained_state
from tts_align.training.contrast import Contrast
from tts_align.training.means import StageMeans
from tts_align.training.optimizers import GroupedModule, PartOptimizer, unfused
from tts_align.training.parts import check_can_learn, check_settings, keep_double, make_parts
from tts_align.training.scoring import Scoring
from tts_align.training.seeds import seed_generators, seed_of
from tts_align.training.settings import RewardFit, StageFit
from tts_align.training.testing import Testing
from tts_align.utils.seeds import run_seed


class AlignModule(GroupedModule):
    """A codec language model, the other parts an objective asks for, and one shared step.

    Args:
        objective: objective to optimise.
        policy: language model to train: a class and where its weights lie.
        reference: frozen model that the policy is compared with; by default the policy as its directory holds it, or
            its base when it trains adapters.
        contrast: π⁺ and π⁻ of token-level KTO, or the token weights made with them; without it ``fit`` fits its own
            pair.
        reward: model that scores speech tokens, differentiably; a new one is trained by ``fit`` first.
        reward_fit: training of a new reward model by ``fit``.
        flow: model that turns speech tokens into mel frames, for objectives that train through it.
        tokenizer: model that turns sound into speech tokens, for objectives that train it.
        stage_fit: training by ``fit`` of the stages before the objective's, if it has stages.
        vocoder: model that turns speech tokens into sound, for ``judge`` and ``test``.
        judge: listener of ``judge`` and ``test``; never the one that labelled the training data.
        sampling: settings by which speech tokens are drawn in sample and test.
        test: sentences of ``test``, and how many of them; without it nothing is tested.
        cache: folder for numbers of frozen models; ``cache`` in the run's folder by default.
        optimizer: optimiser class and its arguments.
        optimizer_groups: settings of single parts: policy, tokenizer, reward, flow, or objective (bridges of e2e).
        lr_scheduler: learning-rate schedule, in optimiser steps; constant by default.
    """

    def __init__(
        self,
        objective: Objective,
        policy: CodecLM,
        reference: CodecLM | None = None,
        contrast: Contrast | None = None,
        reward: RewardHead | None = None,
        reward_fit: RewardFit | None = None,
        flow: FlowHead | None = None,
        tokenizer: TokenizerHead | None = None,
        stage_fit: StageFit | None = None,
        vocoder: Vocoder | None = None,
        judge: Judge | None = None,
        sampling: Sampling | None = None,
        test: TestSettings | None = None,
        cache: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        optimizer_groups: Mapping[str, PartOptimizer] | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # frozen parts are rebuilt from their own paths, not saved
        check_settings(objective, policy, reference, contrast, reward, reward_fit, stage_fit, optimizer_groups or {})
        self.objective, self.policy, self.contrast = objective, policy, contrast
        self.sampling, self.test_settings = sampling or Sampling(), test
        self.vocoder, self.judge, self.reward_fit, self.stage_fit = vocoder, judge, reward_fit, stage_fit
        self.optimizer, self.lr_scheduler, self.cache_folder = optimizer, lr_scheduler, cache
        self.optimizer_groups = dict(optimizer_groups or {})
        self.test_listeners = torch.nn.ModuleList([] if test is None else test.listeners)
        for listener in self._listeners:
            listener.requires_grad_(False).eval()
        if vocoder is not None:
            vocoder.bind(policy)
        self.parts = make_parts(objective, policy, reference, reward, flow, tokenizer)
        objective.bind(policy, self.parts)
        if vocoder is not None and Part.FLOW in self.parts and Part.TOKENIZER in self.parts:
            vocoder.attach(self.parts.flow, self.parts.tokenizer, objective.voices)
        self.scoring = Scoring(objective, policy, self.parts)
        self.means = {stage: StageMeans(stage) for stage in ("train", "val")}
        self.testing: Testing

    @property
    def _listeners(self) -> Iterable[torch.nn.Module]:
        return [one for one in (self.vocoder, self.judge, *self.test_listeners) if one is not None]

    @property
    def rows_wanted(self) -> RowsWanted:
        """What the data must bring; the data module follows it."""
        return self.objective.rows_wanted

    @property
    def trained_tokenizer(self) -> TokenizerHead | None:
        """The tokenizer whose speech tokens the rows are made of, if it is part of the training."""
        return self.parts.tokenizer if Part.TOKENIZER in self.parts else None

    def step(self, batch: Batch, stage: str) -> Float[Tensor, ""]:
        """Score a micro-batch, apply the objective, note its numbers; returns its share of the step's loss."""
        outcome = checked_outcome(self.objective, self.objective(self.score(batch)), learns=stage == "train")
        micro_batches = self.trainer.world_size * (self.trainer.accumulate_grad_batches if stage == "train" else 1)
        share = Mean(outcome.loss.detach().float(), outcome.loss.new_full((), 1 / micro_batches, dtype=torch.float32))
        self.means[stage].note({"loss": share, **outcome.metrics})
        return outcome.loss * micro_batches  # Lightning and the strategy divide by as many

    def score(self, batch: Batch) -> Step:
        """One policy forward over all rows, and of the other parts no more than the objective needs."""
        return self.scoring.step(batch, self.trainer.global_step if self._trainer is not None else 0)

    def setup(self, stage: str) -> None:
        """Keep Lightning's precisions away from batches, which hold whole numbers; refuse those that cannot train."""
        self.trainer.precision_plugin.convert_input = _as_it_is  # type: ignore[method-assign,assignment]
        if stage == "fit":
            check_can_learn(self.policy, self.parts, self.trainer.precision)
        keep_double(self, self.trainer.precision)

    def configure_callbacks(self) -> list[Callback]:
        """Watch the speech tokens and keep the parts of a training that makes its own speech tokens."""
        there = {type(one) for one in self.trainer.callbacks}  # type: ignore[attr-defined]
        kinds = () if self.trained_tokenizer is None else (KeepParts, TokenStatistics)
        return [kind() for kind in kinds if kind not in there]

    def _prepare_scoring(self) -> None:
        folder = Path(self.cache_folder or Path(self.trainer.default_root_dir, "cache"))
        rows = self.trainer.datamodule.rows()  # type: ignore[attr-defined]
        self.scoring.prepare(rows, self.contrast.weights if self.contrast else None, folder, self.trainer)

    def on_fit_start(self) -> None:
        """Compute what frozen parts say, now that everything is on its device."""
        self._prepare_scoring()

    def on_train_start(self) -> None:
        """A resumed run has logged what came before: its first micro-batch is not yet a step."""
        super().on_train_start()
        self.means["train"].begin(self.trainer.global_step)

    def on_validation_start(self) -> None:
        """Likewise when only validating."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._prepare_scoring()

    def train(self, mode: bool = True) -> AlignModule:
        """Switch to training mode; parts that are not trained, and listeners, never leave evaluation mode."""
        super().train(mode)
        for name, part in self.parts.items():
            if Part(name) not in self.objective.trains:
                part.eval()
        if not self.objective.scores:
            self.policy.eval()
        for listener in self._listeners:
            listener.eval()
        return self

    def training_step(self, batch: Batch, _: int) -> Float[Tensor, ""]:
        """One micro-batch; what is random in it depends on its number alone, so a resumed run repeats nothing."""
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        seed_generators(seed_of(run_seed(), number, self.trainer.global_rank), self.device)
        return self.step(batch, "train")

    def on_train_batch_end(self, *_: Any) -> None:
        """Log when it is time."""
        self.log_when_due()

    def log_when_due(self) -> bool:
        """Log the means of training when it is time, which it tells; callbacks, whose turn is before, may ask, too."""
        return self.means["train"].log_when_due(self.trainer)

    def on_train_end(self) -> None:
        """Log what is left."""
        self.means["train"].log(self.trainer)

    def validation_step(self, batch: Batch, _: int) -> None:
        """The same step on held-out rows."""
        self.step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log the means over all held-out rows."""
        self.means["val"].log(self.trainer)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Records move as one, with what the objective makes of texts and names; test sentences stay where they are."""
        if isinstance(batch, Batch):
            batch = self.objective.encode(batch, self.parts)
        return batch.to(device, non_blocking=True) if isinstance(batch, Record) else batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains; the rest is rebuilt from its own path."""
        checkpoint["state_dict"] = trained_state(self, checkpoint["state_dict"], self.objective.trains)
        checkpoint |= {"means": self.means["train"].to_state(self.trainer), "reference": self.scoring.reference_digest}
        unfused(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks what trains here, or holds numbers that are none."""
        check_fits(self, checkpoint["state_dict"])
        self.means["train"].from_state(checkpoint.get("means", {}), self.device)
        self.scoring.reference_before = checkpoint.get("reference", "")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test sentences of this rank, a batch of utterances at a time; held-out rows for a reward model."""
        self.testing = Testing(self, self.trainer, getattr(self.trainer, "datamodule", None))
        return self.testing.loader

    def on_test_start(self) -> None:
        """What is tested are models on their own."""
        self.testing.start()

    def on_test_end(self) -> None:
        """Put back what was learnt besides."""
        self.testing.end()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Speak a batch before and after training, and judge it."""
        self.testing.evaluation.step(batch)

    def on_test_epoch_end(self) -> None:
        """Gather the utterances of all ranks; write table, figures and audio."""
        self.testing.finish(self.scoring.contrast_cache)

    def predict_step(self, batch: Batch, _: int) -> Scored:
        """Score rows, of the speech tokens that the tokenizer makes if that is part of the training."""
        if self.trained_tokenizer is not None:
            batch = self.objective.prepare(batch, self.policy, self.parts)
        return self.policy(batch.rows)


def _as_it_is(batch: Any) -> Any:
    return batch
