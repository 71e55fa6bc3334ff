# SPDX-License-Identifier: Apache-2.0
"""Variants of DiffRO that ``diffro_recipe.py`` tries, and that the package does not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NoReturn

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tts_align.models.base.reward import RewardHead
from tts_align.models.base.reward_records import RewardLabels, RewardScores, TaskRows
from tts_align.objectives import DiffRO, Outcome, Parts
from tts_align.objectives.base import Step

Positive = Literal["labelled", "above_mean"]
Restricted = Literal["desirable", "quiet"]


class _Scorer(RewardHead):
    """A reward model that only scores, from vectors."""

    def _none(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} only scores")

    losses = losses_embedded = rebuild = save = digest = _none


class Ensemble(_Scorer):
    """Several reward models that hear the same utterance.

    Args:
        members: of one alphabet and the same tasks, each with an embedding table of its own.
        pessimistic: of each row the lowest score counts, instead of their mean (arXiv 2310.02743).
    """

    def __init__(self, members: Sequence[RewardHead], pessimistic: bool = False) -> None:
        super().__init__()
        self.members, self.pessimistic = nn.ModuleList(members), pessimistic
        self.codebook_size, self.tasks = members[0].codebook_size, members[0].tasks

    def encode_labels(self, texts: Sequence[str | None], attributes: Sequence[Mapping[str, Any]]) -> RewardLabels:
        """Labels of any member."""
        return self.members[0].encode_labels(texts, attributes)  # type: ignore[operator]

    def embed(self, tokens: Tensor) -> Tensor:
        """Vectors of all members side by side."""
        return torch.cat([member.embed(tokens) for member in self.members], -1)  # type: ignore[operator]

    def score_embedded(
        self,
        embedded: Float[Tensor, "r s h"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        tasks: Sequence[str] | None = None,
    ) -> RewardScores:
        """Mean or lowest score of the members, task by task."""
        parts = embedded.chunk(len(self.members), -1)
        scored = [
            member.score_embedded(part, mask, labels, tasks)  # type: ignore[operator]
            for member, part in zip(self.members, parts, strict=True)
        ]
        found = []
        for rows in zip(*(one.tasks for one in scored), strict=True):
            totals = torch.stack([one.total for one in rows])  # :: k times (r,) -> (k, r)
            total = totals.min(0).values if self.pessimistic else totals.mean(0)
            found.append(TaskRows(rows[0].name, total, rows[0].count))
        return RewardScores(tuple(found))


class _Noted(_Scorer):
    """A reward model some of whose rows do not count; it notes the gradient it is asked for.

    Args:
        model: the reward model.
        counted: (r,) rows that count, or how to tell them by their rewards; all by default.
    """

    def __init__(self, model: RewardHead, counted: Tensor | Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.model, self.counted, self.gradient = model, counted, torch.zeros(0)
        self.codebook_size, self.tasks = model.codebook_size, model.tasks

    def encode_labels(self, texts: Sequence[str | None], attributes: Sequence[Mapping[str, Any]]) -> RewardLabels:
        """Those of the model."""
        return self.model.encode_labels(texts, attributes)

    def embed(self, tokens: Tensor) -> Tensor:
        """Those of the model."""
        return self.model.embed(tokens)

    def score_embedded(
        self,
        embedded: Float[Tensor, "r s h"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        tasks: Sequence[str] | None = None,
    ) -> RewardScores:
        """Scores of the model; 0 in rows that do not count."""
        if embedded.requires_grad:
            embedded.register_hook(self._note)
        scores = self.model.score_embedded(embedded, mask, labels, tasks)
        if self.counted is None:
            return scores
        counted = self.counted if isinstance(self.counted, Tensor) else self.counted(scores.reward().detach())
        return RewardScores(tuple(replace(rows, total=rows.total * counted) for rows in scores.tasks))

    def _note(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach()


def _above_mean(rewards: Float[Tensor, " r"]) -> Bool[Tensor, " r"]:
    return rewards > rewards.mean()


class Variant(DiffRO):
    """DiffRO that learns from some rows only, or stays near the reference at some tokens only.

    Args:
        positive: rows whose reward counts: those labelled desirable, or those with a reward above the mean of their
            batch, an advantage above 0 (arXiv 2509.18569); all by default.
        restricted: tokens at which the divergence from the reference counts: those of desirable rows, or those that the
            reward does not ask to change, the half of each row with the smaller gradient; all by default. The mean
            runs over these.
        knobs: of DiffRO.
    """

    def __init__(self, positive: Positive | None = None, restricted: Restricted | None = None, **knobs: Any) -> None:
        super().__init__(**knobs)
        self.positive, self.restricted = positive, restricted

    def forward(self, step: Step) -> Outcome:
        """As DiffRO's, in one micro-batch."""
        assert step.policy.logits is not None
        desirable = step.batch.desirable
        rows = {None: None, "labelled": desirable, "above_mean": _above_mean}[self.positive]
        heard = _Noted(step.parts.reward, rows)
        reward, metrics = self._reward(replace(step, parts=Parts({"reward": heard})), step.policy.logits)
        kl, counted = step.batch.rows.scatter(step.exact_kl()), step.policy.mask
        if self.restricted == "desirable":
            counted = counted & desirable[:, None]
        elif self.restricted == "quiet" and heard.gradient.numel():
            counted = counted & self._quiet(step, heard.gradient)
        drift = (kl * counted).sum() / counted.sum().clamp(min=1)
        return Outcome(step.anchored(self.beta * drift - reward, self.sft_weight), metrics)

    @staticmethod
    def _quiet(step: Step, gradient: Float[Tensor, "r s h"]) -> Bool[Tensor, "r t"]:
        """Targets whose speech token has a gradient no larger than the median of its row; end-of-speech is one."""
        said = step.utterances
        size = torch.linalg.vector_norm(gradient, dim=-1)
        median = size.masked_fill(~said.mask, torch.nan).nanmedian(-1, keepdim=True).values
        # :: (r, s) -> (c,) speech tokens -> (m,) targets
        flat = (size <= median).flatten().index_select(0, said.code_place)
        targets = torch.ones(int(step.policy.mask.sum()), dtype=torch.bool, device=flat.device)
        targets[said.code_target] = flat
        return step.batch.rows.scatter(targets.float()) > 0
