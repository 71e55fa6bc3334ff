# SPDX-License-Identifier: Apache-2.0
"""One training step for every objective; the only file that knows models and objectives."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tts_align.batch import Batch, Mean, Record, Rows, Scored, across_ranks
from tts_align.evaluation.judges.base import Judge
from tts_align.evaluation.reward import RewardEvaluation
from tts_align.evaluation.speech import Evaluation, TestSettings
from tts_align.models.base.flow import FlowHead
from tts_align.models.base.generation import Sampling
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.reward import RewardHead
from tts_align.models.base.tokenizer import TokenizerHead
from tts_align.models.base.vocoder import Vocoder
from tts_align.objectives.base import Objective, Outcome, Part, Step
from tts_align.training.cache import TOLERANCE, TOLERANCE_HALF, TokenCache
from tts_align.training.callbacks.tokens import KeepParts, TokenStatistics
from tts_align.training.contrast import Contrast
from tts_align.training.reward_fit import RewardFit
from tts_align.training.stage_fit import StageFit


class AlignModule(LightningModule):
    """A codec language model, the other parts an objective asks for, and one shared step.

    Args:
        objective: what to optimise.
        policy: the model that is trained.
        reference: frozen model the policy is compared with; by default the policy as its directory holds it, or its
            base when it trains adapters.
        contrast: π⁺ and π⁻ of token-level KTO, or weights made with them; ``fit`` makes its own pair without.
        reward: scores speech tokens, differentiably; ``fit`` trains it first when it is new.
        reward_fit: how ``fit`` does that.
        flow: turns speech tokens into mel frames, for objectives that train through it.
        tokenizer: turns sound into speech tokens, for objectives that train it.
        stage_fit: how ``fit`` trains what comes before the objective's stage, if it has stages.
        vocoder: turns speech tokens into sound, for ``judge`` and ``test``.
        judge: listens, for ``judge`` and ``test``; never the one that labelled the training data.
        sampling: how tokens are drawn in ``sample`` and ``test``.
        test: what ``test`` speaks.
        cache: folder for numbers of frozen models; ``cache`` in the run's directory by default.
        optimizer: builds the optimizer from the trainable parameters.
        lr_scheduler: builds the schedule, in optimiser steps, from the optimizer.
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
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # frozen parts are rebuilt from their own paths, not saved
        self.objective, self.policy, self.contrast = objective, policy, contrast
        self.vocoder, self.judge = vocoder, judge
        self.sampling, self.test_settings, self.reward_fit = sampling or Sampling(), test, reward_fit
        made_here = Part.REWARD in objective.needs - objective.trains and Part.TOKENIZER not in objective.needs
        if reward_fit is not None and not made_here:
            raise ValueError(f"model.reward_fit has no effect: {type(objective).__name__} does not train one first")
        self.stage_fit = stage_fit
        if stage_fit is not None and (Part.TOKENIZER not in objective.needs - objective.trains):
            raise ValueError("model.stage_fit has no effect: there is no stage before the one that is to be trained")
        self.optimizer, self.lr_scheduler, self.cache_folder = optimizer, lr_scheduler, cache
        for listener in (vocoder, judge):
            if listener is not None:
                listener.requires_grad_(False).eval()
        if vocoder is not None:
            vocoder.bind(policy)
        if contrast is not None and Part.CONTRAST not in objective.needs:
            raise ValueError(f"model.contrast has no effect: {type(objective).__name__} does not use it; leave it out")
        if reference is not None and policy.adapted:
            raise ValueError("model.reference has no effect: with adapters the reference is the policy's frozen base")
        self.given_reference = reference is not None
        self.parts = nn.ModuleDict()
        given: dict[Part, nn.Module | None] = {Part.REWARD: reward, Part.FLOW: flow, Part.TOKENIZER: tokenizer}
        for part, model in given.items():
            if model is not None and part not in objective.needs:
                raise ValueError(
                    f"model.{part} has no effect: {type(objective).__name__} does not use it; leave it out"
                )
            if model is not None:
                self.parts[part] = model
        if not objective.scores:
            policy.requires_grad_(False).eval()
        if reference is not None:
            self.parts[Part.REFERENCE] = reference
        elif Part.REFERENCE in objective.needs and not policy.adapted:
            self.parts[Part.REFERENCE] = policy.rebuild()
        missing = objective.needs - {Part.REFERENCE, Part.CONTRAST} - {Part(name) for name in self.parts}
        if missing:
            keys = " and ".join(f"model.{part}" for part in sorted(missing))
            raise ValueError(f"{type(objective).__name__} cannot run: the recipe must set {keys}")
        for name, model in self.parts.items():
            if Part(name) not in objective.trains:
                model.requires_grad_(False).eval()
        objective.bind(policy, self._named_parts)
        if vocoder is not None and {Part.FLOW, Part.TOKENIZER} <= {Part(name) for name in self.parts}:
            voices = tuple(getattr(objective, "voices", ()))
            vocoder.attach(
                cast("FlowHead", self.parts[Part.FLOW]), cast("TokenizerHead", self.parts[Part.TOKENIZER]), voices
            )
        self.reference_cache: TokenCache | None = None
        self.contrast_cache: TokenCache | None = None
        self._mismatched: dict[bool, Mean] = {}  # of a training step, and of a validation step that falls into it
        self._sums: dict[str, dict[str, Mean]] = {"train": {}, "val": {}}
        self._logged = 0
        self.evaluation: Evaluation | RewardEvaluation | None = None

    # ------------------------------------------------------------------ the shared step

    def step(self, batch: Batch, stage: str) -> Float[Tensor, ""]:
        """Score a micro-batch, apply the objective, note its numbers; returns its share of the step's loss."""
        outcome: Outcome = self.objective(self.score(batch))
        micro_batches = self.trainer.world_size * (self.trainer.accumulate_grad_batches if stage == "train" else 1)
        share = Mean(outcome.loss.detach().float(), outcome.loss.new_full((), 1 / micro_batches, dtype=torch.float32))
        self._note(stage, {"loss": share, **outcome.metrics})
        return outcome.loss * micro_batches  # Lightning and the strategy divide by as many

    def score(self, batch: Batch) -> Step:
        """One policy forward over all rows, and of the other parts no more than the objective needs."""
        objective, parts = self.objective, self._named_parts
        batch = objective.prepare(batch, self.policy, parts)
        rows = batch.rows
        nothing = Scored(torch.zeros(0, 0, device=self.device), torch.zeros(0, 0, dtype=torch.bool, device=self.device))
        policy: Scored = self.policy(rows, logits=objective.wants_logits) if objective.scores else nothing
        reference = contrast = None
        if Part.REFERENCE in objective.needs:
            reference = self.score_reference(rows)
        if Part.CONTRAST in objective.needs:
            assert self.contrast_cache is not None
            contrast = self._cached(self.contrast_cache, rows)
        mismatched = self.score_mismatched(batch) if objective.wants_mismatched else None
        return Step(batch, policy, reference, contrast, mismatched, parts, self._step_number)

    @property
    def _named_parts(self) -> dict[Part, nn.Module]:
        return {Part(name): part for name, part in self.parts.items()}

    @property
    def trained_tokenizer(self) -> TokenizerHead | None:
        """The tokenizer whose speech tokens the rows are made of, if it is part of the training."""
        return cast("TokenizerHead", self.parts[Part.TOKENIZER]) if Part.TOKENIZER in self.parts else None

    @property
    def _step_number(self) -> int:
        return self.trainer.global_step if self._trainer is not None else 0

    @torch.no_grad()
    def score_reference(self, rows: Rows) -> Scored:
        """What the reference says: from the cache, or by one forward when distributions are wanted."""
        if self.reference_cache is not None and not self.objective.wants_logits:
            return Scored(self._cached(self.reference_cache, rows), rows.mask)
        return self._frozen_reference(rows, self.objective.wants_logits)

    def _frozen_reference(self, rows: Rows, logits: bool = False) -> Scored:
        if Part.REFERENCE in self.parts:
            reference = cast("CodecLM", self.parts[Part.REFERENCE])
            assert not reference.training, "the reference must not use dropout"
            return reference(rows, logits=logits)
        with self._without_dropout(), self.policy.without_adapter():
            return self.policy(rows, logits=logits)

    def _without_dropout(self) -> AbstractContextManager[None]:
        return _evaluating(self.policy) if self.policy.training else nullcontext()

    @torch.no_grad()
    def score_mismatched(self, batch: Batch) -> Mean:
        """Mean log-ratio of speech under another sentence's text, over the whole optimiser step and all ranks."""
        training = self.policy.training
        if batch.first or training not in self._mismatched:
            ratios = []
            for rows in batch.mismatched:
                with self._without_dropout():
                    policy = self.policy(rows)
                ratios.append(policy.sums() - self.score_reference(rows).sums())
            found = torch.cat(ratios) if ratios else torch.zeros(0, device=self.device)
            self._mismatched[training] = across_ranks(Mean.of(found))
        return self._mismatched[training]

    def _cached(self, cache: TokenCache, rows: Rows) -> Float[Tensor, "r t"]:
        return cache.gather(rows.keys, rows.mask.shape[1]).to(rows.mask.device, non_blocking=True)

    # ------------------------------------------------------------------ numbers of frozen parts

    @property
    def folder(self) -> Path:
        """Where numbers of frozen parts are kept."""
        return Path(self.cache_folder or Path(self.trainer.default_root_dir, "cache"))

    def _prepare_caches(self) -> None:
        rows = self.trainer.datamodule.rows()  # type: ignore[attr-defined]
        if Part.REFERENCE in self.objective.needs and not self.objective.wants_logits:
            self.reference_cache = TokenCache(self.folder, "reference", self.identity(self._reference_digest()))
            self.fill(self.reference_cache, rows, lambda these: self._frozen_reference(these).logp, "reference")
        if Part.CONTRAST in self.objective.needs:
            weights = None if self.contrast is None else self.contrast.weights
            if weights is None:
                raise ValueError(
                    f"{type(self.objective).__name__} cannot run: the recipe must set model.contrast.weights, or be "
                    "run by `tts-align fit`, which makes them"
                )
            self.contrast_cache = TokenCache.read(Path(weights), needed=rows, everywhere=True)

    def _reference_digest(self) -> str:
        if Part.REFERENCE in self.parts:
            return cast("CodecLM", self.parts[Part.REFERENCE]).digest()
        with self.policy.without_adapter():
            return self.policy.digest()

    def identity(self, digest: str) -> dict[str, str]:
        """What changes the numbers of a model with these weights."""
        return {"weights": digest, "precision": str(self.trainer.precision)}

    def fill(
        self, cache: TokenCache, rows: Mapping[str, Any], score: Callable[[Rows], Float[Tensor, "r t"]], what: str
    ) -> None:
        """Load a cache or compute it, on this trainer's device, precision and ranks."""

        def scored(these: Rows) -> Float[Tensor, "r t"]:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                return score(these)

        half = "16" in str(self.trainer.precision)
        cache.ensure(
            rows,
            scored,
            self.policy.layout,
            what,
            device=self.device,
            packed=self.policy.packed,
            tolerance=TOLERANCE_HALF if half else TOLERANCE,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )

    # ------------------------------------------------------------------ hooks

    def setup(self, stage: str) -> None:
        """Keep Lightning's precisions away from batches: these are frozen and hold no floating-point numbers."""
        self.trainer.precision_plugin.convert_input = _as_it_is  # type: ignore[method-assign,assignment]

    def configure_callbacks(self) -> list[Callback]:
        """Watch the speech tokens and keep the parts of a training that makes its own speech tokens."""
        if self.trained_tokenizer is None:
            return []
        there = {type(one) for one in self.trainer.callbacks}  # type: ignore[attr-defined]
        return [kind() for kind in (KeepParts, TokenStatistics) if kind not in there]

    def on_fit_start(self) -> None:
        """Compute what frozen parts say, now that everything is on its device."""
        self._prepare_caches()

    def on_train_start(self) -> None:
        """A resumed run has logged what came before: its first micro-batch is not yet a step."""
        self._logged = self.trainer.global_step

    def on_validation_start(self) -> None:
        """Likewise when only validating."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._prepare_caches()

    def train(self, mode: bool = True) -> AlignModule:
        """Switch to training mode; parts that are not trained, and listeners, never leave evaluation mode."""
        super().train(mode)
        for name, part in self.parts.items():
            if Part(name) not in self.objective.trains:
                part.eval()
        if not self.objective.scores:
            self.policy.eval()
        for listener in (self.vocoder, self.judge):
            if listener is not None:
                listener.eval()
        return self

    def training_step(self, batch: Batch, _: int) -> Float[Tensor, ""]:
        """One micro-batch; what is random in it depends on its number alone, so a resumed run repeats nothing."""
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        _seed_generators(_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)), number, self.trainer.global_rank), self.device)
        return self.step(batch, "train")

    def on_train_batch_end(self, *_: Any) -> None:
        """Log when it is time."""
        self.log_when_due()

    def log_when_due(self) -> bool:
        """Log once in so many steps, reduced over ranks once; a callback, whose turn is before, may ask for it, too.

        Returns:
            Whether this call has logged.
        """
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = step != self._logged and step % every == 0
        if due:
            self._logged = step
            self._log("train")
        return due

    def on_train_end(self) -> None:
        """Log what is left."""
        if self._sums["train"]:
            self._log("train")

    def validation_step(self, batch: Batch, _: int) -> None:
        """The same step on held-out rows."""
        self.step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log the means over all held-out rows."""
        self._log("val")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Records move as one; test sentences stay where they are."""
        return batch.to(device, non_blocking=True) if isinstance(batch, Record) else batch

    def _note(self, stage: str, metrics: Mapping[str, Mean]) -> None:
        sums = self._sums[stage]
        for name, mean in metrics.items():
            before = sums.get(name)
            sums[name] = mean if before is None else Mean(before.total + mean.total, before.count + mean.count)

    def _log(self, stage: str) -> None:
        sums, self._sums[stage] = self._sums[stage], {}
        if not sums:
            return
        names = sorted(sums)
        both = torch.stack([torch.stack([sums[name].total, sums[name].count]) for name in names])
        reduced = self.trainer.strategy.reduce(both, reduce_op="sum") if self.trainer.world_size > 1 else both
        means = {
            f"{stage}/{name}": total / count
            for name, (total, count) in zip(names, reduced.tolist(), strict=True)
            if count > 0
        }
        for logger in self.trainer.loggers:
            logger.log_metrics(means, step=self.trainer.global_step)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in means.items()})
        self.trainer.progress_bar_metrics.update({"loss": means[f"{stage}/loss"]} if stage == "train" else {})

    # ------------------------------------------------------------------ checkpoints and optimiser

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, and the buffers of parts that train; the rest is rebuilt from its own path."""
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        parts = ["policy.", "objective.", *(f"parts.{part}." for part in self.objective.trains)]
        buffers = {name for name, _ in self.named_buffers() if name.startswith(tuple(parts))}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if key in trained | buffers}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks what trains here: it is another model's."""
        trained = {name: value.shape for name, value in self.named_parameters() if value.requires_grad}
        saved = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        wrong = sorted(name for name, shape in trained.items() if saved.get(name) != shape)
        if wrong:
            raise ValueError(
                f"the checkpoint does not fit {len(wrong)} of {len(trained)} trained weights, {wrong[0]} first (there "
                f"{tuple(saved.get(wrong[0], ()))}, here {tuple(trained[wrong[0]])}): it was made with another "
                "model.policy"
            )

    def configure_optimizers(self) -> Any:
        """Build the optimizer from the trainable parameters only."""
        optimizer = self.optimizer([value for value in self.parameters() if value.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    # ------------------------------------------------------------------ test

    def test_dataloader(self) -> DataLoader[Any]:
        """Test sentences of this rank, a batch of utterances at a time; held-out rows for a reward model."""
        if self.objective.trains_reward_only:
            self.evaluation = RewardEvaluation(self, self.trainer.datamodule)  # type: ignore[attr-defined]
            return self.evaluation.loader()
        if self.test_settings is None or self.judge is None:
            raise ValueError("nothing to test with: the recipe must set model.test.prompts and model.judge")
        reference = cast("CodecLM", self.parts[Part.REFERENCE]) if Part.REFERENCE in self.parts else None
        if reference is None and not self.policy.adapted:
            reference = self.objective.initial_policy(self.policy)
            if reference is not None:
                reference.requires_grad_(False).eval()
        self.evaluation = Evaluation(self, reference, replace(self.test_settings))
        return self.evaluation.loader(self.trainer.global_rank, self.trainer.world_size)

    def on_test_start(self) -> None:
        """What is tested are models on their own."""
        self._merged = self.objective.merged(self.policy, self._named_parts)
        self._merged.__enter__()

    def on_test_end(self) -> None:
        """Put back what was learnt besides."""
        self._merged.__exit__(None, None, None)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Speak a batch before and after training, and judge it."""
        assert self.evaluation is not None
        self.evaluation.step(batch)

    def on_test_epoch_end(self) -> None:
        """Gather the utterances of all ranks; write table, figures and audio."""
        assert self.evaluation is not None
        self.evaluation.finish(Path(self.trainer.default_root_dir))

    def predict_step(self, batch: Batch, _: int) -> Scored:
        """Score rows, of the speech tokens that the tokenizer makes if that is part of the training."""
        if self.trained_tokenizer is not None:
            batch = self.objective.prepare(batch, self.policy, self._named_parts)
        return self.policy(batch.rows)


class _evaluating(AbstractContextManager[None]):
    """Within the block a module is in evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train()


def _as_it_is(batch: Any) -> Any:
    return batch


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def _seed_generators(seed: int, device: torch.device) -> None:
    # torch.manual_seed would write down the stack for every back end that is not in use: a millisecond or two a step.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
