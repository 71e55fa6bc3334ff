# SPDX-License-Identifier: Apache-2.0
"""What the models say of a micro-batch: one forward of the policy, and of the others no more than is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from tts_align.batch import Batch, Mean, Rows, Scored, across_ranks
from tts_align.models.base.layout import TokenRow
from tts_align.models.base.policy import CodecLM
from tts_align.objectives.base import Objective, Part, Parts, Step
from tts_align.training.cache import TOLERANCE, TOLERANCE_HALF, TokenCache
from tts_align.utils.sharded import whole


class Scoring:
    """Scores micro-batches as an objective needs it; numbers of frozen models come from caches where there are any.

    Args:
        objective: says what it needs.
        policy: the model that is trained.
        parts: the others.
    """

    def __init__(self, objective: Objective, policy: CodecLM, parts: Parts) -> None:
        self.objective, self.policy, self.parts = objective, policy, parts
        self.reference_cache: TokenCache | None = None
        self.reference_digest, self.reference_before = "", ""
        self.contrast_cache: TokenCache | None = None
        self._mismatched: dict[bool, Mean] = {}  # of a training step, and of a validation step that falls into it

    def step(self, batch: Batch, number: int) -> Step:
        """Score a micro-batch of the optimiser step of this number."""
        objective = self.objective
        batch = objective.prepare(batch, self.policy, self.parts)
        if not isinstance(batch, Batch):
            raise ValueError(f"{type(objective).__name__}.prepare must return a Batch, got {type(batch).__name__}")
        rows = batch.rows
        if objective.scores:
            policy: Scored = self.policy(rows, logits=objective.wants_logits)
        else:
            policy = Scored(torch.zeros(0, 0, device=rows.mask.device), rows.mask.new_zeros(0, 0))
        reference = contrast = None
        if Part.REFERENCE in objective.needs:
            reference = self.reference(rows)
        if Part.CONTRAST in objective.needs:
            assert self.contrast_cache is not None
            contrast = _cached(self.contrast_cache, rows)
        mismatched = self.mismatched(batch) if objective.wants_mismatched else None
        return Step(batch, policy, reference, contrast, mismatched, self.parts, number)

    @torch.no_grad()
    def reference(self, rows: Rows) -> Scored:
        """What the reference says: from the cache, or by one forward when distributions are wanted."""
        if self.reference_cache is not None and not self.objective.wants_logits:
            return Scored(_cached(self.reference_cache, rows), rows.mask)
        return self._frozen_reference(rows, self.objective.wants_logits)

    def _frozen_reference(self, rows: Rows, logits: bool = False) -> Scored:
        if Part.REFERENCE in self.parts:
            assert not self.parts.reference.training, "the reference must not use dropout"
            return self.parts.reference(rows, logits=logits)
        with self._without_dropout(), self.policy.without_adapter():
            return self.policy(rows, logits=logits)

    def _without_dropout(self) -> AbstractContextManager[None]:
        return _evaluating(self.policy) if self.policy.training else nullcontext()

    @torch.no_grad()
    def mismatched(self, batch: Batch) -> Mean:
        """Mean log-ratio of speech under another sentence's text, over the whole optimiser step and all ranks."""
        training = self.policy.training
        if batch.first or training not in self._mismatched:
            ratios = []
            with self._without_dropout(), whole(self.policy):  # ranks may have unequal numbers of such rows
                for rows in batch.mismatched:
                    ratios.append(self.policy(rows).sums() - self.reference(rows).sums())
            found = torch.cat(ratios) if ratios else torch.zeros(0, device=batch.rows.mask.device)
            self._mismatched[training] = across_ranks(Mean.of(found))
        return self._mismatched[training]

    # ------------------------------------------------------------------ numbers of frozen models

    def prepare(self, rows: Mapping[str, TokenRow], weights: str | None, folder: Path, trainer: Trainer) -> None:
        """Compute or load what frozen models say of rows, now that everything is on its device.

        Args:
            rows: all that will be scored, by key.
            weights: file of token weights, for objectives that need a contrastive pair.
            folder: where numbers of the reference are kept.
            trainer: its device, precision and ranks are used.
        """
        if Part.REFERENCE in self.objective.needs and not self.objective.wants_logits:
            self.reference_digest = self._reference_digest()
            if trainer.state.fn == TrainerFn.FITTING:
                self._check_reference()
            self.reference_cache = TokenCache(folder, "reference", identity(self.reference_digest, trainer))
            self.fill(
                self.reference_cache, rows, lambda these: self._frozen_reference(these).logp, "reference", trainer
            )
        if Part.CONTRAST in self.objective.needs:
            if weights is None:
                raise ValueError(
                    f"{type(self.objective).__name__} cannot run: the recipe must set model.contrast.weights, or be "
                    "run by `tts-align fit`, which makes them"
                )
            self.contrast_cache = TokenCache.read(Path(weights), needed=rows, everywhere=True)

    def _check_reference(self) -> None:
        if self.reference_before not in ("", self.reference_digest):
            raise ValueError(
                "the training of the checkpoint was begun with another reference: digest of its weights "
                f"{self.reference_before[:12]}, now {self.reference_digest[:12]}. They are read from model.reference, "
                "or without it from the directory of model.policy: put the weights of model.reference back, "
                "or begin a new run"
            )

    def _reference_digest(self) -> str:
        if Part.REFERENCE in self.parts:
            return self.parts.reference.digest()
        with self.policy.without_adapter():
            return self.policy.digest()

    def fill(
        self,
        cache: TokenCache,
        rows: Mapping[str, TokenRow],
        score: Callable[[Rows], Float[Tensor, "r t"]],
        what: str,
        trainer: Trainer,
    ) -> None:
        """Load a cache or compute it, on a trainer's device, precision and ranks."""

        def scored(these: Rows) -> Float[Tensor, "r t"]:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                return score(these)

        half = "16" in str(trainer.precision)
        cache.ensure(
            rows,
            scored,
            self.policy.layout,
            what,
            device=trainer.strategy.root_device,
            tolerance=TOLERANCE_HALF if half else TOLERANCE,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )


def identity(digest: str, trainer: Trainer) -> dict[str, str]:
    """What changes the numbers of a model with these weights."""
    return {"weights": digest, "precision": str(trainer.precision)}


def _cached(cache: TokenCache, rows: Rows) -> Float[Tensor, "r t"]:
    return cache.gather(rows.keys, rows.mask.shape[1]).to(rows.mask.device, non_blocking=True)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block a module is in evaluation mode."""
    module.eval()
    try:
        yield
    finally:
        module.train()
