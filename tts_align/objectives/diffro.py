# SPDX-License-Identifier: Apache-2.0
"""Differentiable reward optimisation (DiffRO, arXiv 2507.05911; also section 3.2 of CosyVoice 3, arXiv 2505.17589)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.batch import Batch, Mean, Reads, Utterances
from tts_align.gumbel import RowNoise, annealed, relaxed_tokens, row_generators, sampled_vectors
from tts_align.objectives.base import (
    Objective,
    Outcome,
    Part,
    Parts,
    Step,
    check_codebook,
    check_not_negative,
    check_positive,
)
from tts_align.objectives.mtr import speech_lengths

if TYPE_CHECKING:
    from tts_align.models.base.policy import CodecLM
    from tts_align.models.base.reward import RewardHead
    from tts_align.models.base.reward_records import RewardLabels, RewardScores

BINS = 5
"""Of the histogram of rewards that :class:`tts_align.training.callbacks.guards.CollapseGuard` watches."""
SATURATED = 0.99
"""A reward counts as saturated when the reward model is this sure."""


class DiffRO(Objective, name="diffro"):
    """Gradients of a reward model flow through sampled speech tokens into the policy.

    Every row serves, good or bad, for its text and as a prefix. At every position of its speech a token is drawn from
    the policy's distribution by Gumbel-softmax, all positions in one parallel forward; the reward model says how
    probable the wanted text and attributes are given these tokens; minus that, plus β KL(policy ‖ reference) over the
    full vocabulary, is the loss. The text always counts. The paper fixes β 0.1 and learning rate 1e-5; the estimator,
    the reductions, the clipping, ``rollout`` and ``resample`` are this project's choices where the paper is silent.

    Args:
        beta: weight of the KL to the reference, β.
        tasks: reward-model tasks to optimise: ``asr``, ``ctc`` or both, plus any attributes; ``ctc`` counts in rows
            that have enough speech tokens for their text.
        targets: wanted value of each attribute, for every row; each row's own by default.
        estimator: gradient estimator: straight_through (exactly one token at each position, the gradient of the soft
            sample) or soft.
        temperature: temperature τ of the Gumbel-softmax.
        final_temperature: temperature of the last step, reached linearly; τ stays by default.
        anneal_steps: optimiser steps until the last temperature.
        reduction: reduction over tokens: mean (reward over text tokens, KL over speech tokens) or sum (both over the
            tokens of a row).
        gradient_clip: largest norm of one row's reward gradient with respect to the reward model's input; 0 for no
            limit.
        sft_weight: weight of the cross-entropy on the stored rows that are desirable; not with free roll-outs.
        rollout: prefixes of the sampled tokens: teacher_forced (the stored rows) or free (in every step the policy
            speaks each row anew from its whole distribution).
        resample: whether to draw a token anew at each position, as the paper does; otherwise the reward model reads the
            prefix itself, with the gradient that this draw would have had.
    """

    needs = frozenset({Part.REFERENCE, Part.REWARD})
    reads = Reads.ANY
    wants_logits = True
    wants_utterances = True

    def __init__(
        self,
        beta: float = 0.1,
        tasks: Sequence[str] = ("asr",),
        targets: Mapping[str, str | float] | None = None,
        estimator: Literal["straight_through", "soft"] = "straight_through",
        temperature: float = 1.0,
        final_temperature: float | None = None,
        anneal_steps: int | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        gradient_clip: float = 1.0,
        sft_weight: float = 0.0,
        rollout: Literal["teacher_forced", "free"] = "teacher_forced",
        resample: bool = True,
    ) -> None:
        super().__init__()
        check_not_negative(beta=beta, gradient_clip=gradient_clip, sft_weight=sft_weight)
        check_positive(temperature=temperature, final_temperature=final_temperature or temperature)
        if not {"asr", "ctc"} & set(tasks):
            raise ValueError(
                f"tasks must name asr or ctc, got {', '.join(tasks) or 'none'}: without the text the speech decays"
            )
        if (final_temperature is None) != (anneal_steps is None):
            raise ValueError("final_temperature and anneal_steps need each other: give both, or neither")
        if anneal_steps is not None and anneal_steps < 1:
            raise ValueError(f"anneal_steps must be at least 1, got {anneal_steps}")
        if stray := sorted(set(targets or {}) - set(tasks)):
            raise ValueError(f"targets of {', '.join(stray)} have no effect: add them to `tasks`")
        self.beta, self.tasks, self.targets = beta, tuple(tasks), dict(targets or {})
        self.hard, self.reduction = estimator == "straight_through", reduction
        self.temperature, self.final_temperature, self.anneal_steps = temperature, final_temperature, anneal_steps
        self.gradient_clip, self.sft_weight = gradient_clip, sft_weight
        self.free, self.resample = rollout == "free", resample
        if self.free and sft_weight:
            raise ValueError("sft_weight needs stored rows: leave it out with `rollout: free`, or force the teacher")

    def bind(self, policy: CodecLM, parts: Parts) -> None:
        """Check that policy and reward model speak of the same speech tokens, and that the tasks are there."""
        reward = parts.reward
        check_codebook(policy, reward)
        if unknown := [name for name in self.tasks if name not in reward.tasks]:
            raise ValueError(
                f"tasks must be some of model.reward's {', '.join(reward.tasks)}, got {', '.join(unknown)}"
            )

    def prepare(self, batch: Batch, policy: CodecLM, parts: Parts) -> Batch:
        """Let the policy speak, if the prefixes are to be its own."""
        return policy.roll_out(batch) if self.free else batch

    def forward(self, step: Step) -> Outcome:
        """Minus the reward of sampled speech tokens, plus β times the KL to the reference."""
        assert step.policy.logits is not None
        reward, metrics = self._reward(step, step.policy.logits)
        kl = step.batch.rows.scatter(step.exact_kl())
        totals = step.batch.totals
        drift = step.mean(kl, totals.tokens) if self.reduction == "mean" else step.mean(kl.sum(-1), totals.rows)
        loss = step.anchored(self.beta * drift - reward, self.sft_weight)
        if not self.free:  # what the policy has just said has no label
            metrics |= step.sides("logp", step.policy.logp)
        return Outcome(loss, metrics | {"kl": Mean.of(kl, step.policy.mask)})

    def _reward(self, step: Step, logits: Float[Tensor, "m v"]) -> tuple[Float[Tensor, ""], dict[str, Mean]]:
        """This micro-batch's share of the mean reward, with the gradient that reaches the logits."""
        model, said = step.parts.reward, step.utterances
        rows = RowNoise(row_generators(said.seeds, logits.device), said.targets)
        target, temperature = step.batch.rows.target, self._temperature(step)
        if self.hard and model.looks_up:
            table = model.table.weight[: model.codebook_size]
            vectors = sampled_vectors(logits, table, rows, temperature, None if self.resample else target)
        else:
            size = model.codebook_size
            vectors = model.embed(relaxed_tokens(logits, size, target, rows, temperature, self.hard, self.resample))
        # :: (m, h) -> (c, h) -> (r, s, h)
        embedded = said.placed(vectors.index_select(0, said.code_target))
        labels = said.target_labels
        if labels is None:
            labels = self._labels(said, model).to(logits.device)
        asked = embedded.detach().requires_grad_() if torch.is_grad_enabled() else embedded
        scores = model.score_embedded(asked, said.mask, labels, self.tasks)
        rewards = scores.reward(mean=self.reduction == "mean")
        metrics = {"reward": Mean.of(rewards), **_per_task(scores), **_spread(scores, self.tasks)}
        value = step.mean(rewards, step.batch.totals.rows)
        if not asked.requires_grad:
            return value, metrics
        # The reward model's graph ends here: its gradient is known before the policy's backward, so that it can be
        # clipped row by row, whatever the cut into micro-batches, and nothing of that graph is kept.
        (gradient,) = torch.autograd.grad(rewards.sum(), asked)
        norm = torch.linalg.vector_norm(gradient, dim=(1, 2))
        metrics["gradient_norm"] = Mean.of(norm)
        if self.gradient_clip:
            metrics["gradient_clipped"] = Mean.of((norm > self.gradient_clip).float())
            gradient = gradient * (self.gradient_clip / norm.clamp(min=self.gradient_clip))[:, None, None]
        path = step.mean((embedded * gradient).sum((1, 2)), step.batch.totals.rows)
        return path + (value - path).detach(), metrics

    def encode(self, batch: Batch, parts: Parts) -> Batch:
        """Labels of what is wanted; lengths of the stored rows, unless the policy speaks anew."""
        said = batch.utterances
        assert said is not None
        labels = self._labels(said, parts.reward)
        if not self.free:
            labels = replace(labels, speech_lengths=speech_lengths(batch))
        return replace(batch, utterances=replace(said, target_labels=labels))

    def _labels(self, said: Utterances, model: RewardHead) -> RewardLabels:
        return model.encode_labels(said.target_texts, tuple({**row, **self.targets} for row in said.attributes))

    def _temperature(self, step: Step) -> float:
        if self.final_temperature is None or self.anneal_steps is None:
            return self.temperature
        return annealed(step.number, self.anneal_steps, self.temperature, self.final_temperature)


def _per_task(scores: RewardScores) -> dict[str, Mean]:
    """Mean log-probability of each task's labels, per text token or per label."""
    return {f"reward_{rows.name}": Mean(rows.total.detach().sum(), rows.count.sum()) for rows in scores.tasks}


def _spread(scores: RewardScores, tasks: Sequence[str]) -> dict[str, Mean]:
    """Share of saturated rewards, and the histogram of how sure the reward model is, task by task together."""
    sure = torch.cat([rows.mean.detach().exp() for rows in scores.tasks])
    known = torch.cat([rows.count > 0 for rows in scores.tasks])  # to pick those would wait for the GPU
    place = (sure * BINS).long().clamp(0, BINS - 1)
    bins = {f"reward_bin{number}": Mean.of((place == number).float(), known) for number in range(BINS)}
    return {"saturated": Mean.of((sure > SATURATED).float(), known), **bins}
