# SPDX-License-Identifier: Apache-2.0
"""Token-level KTO (arXiv 2510.05799): single labelled rows, and a weight for every token from a contrastive pair."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tts_align.batch import Mean, Reads, across_ranks
from tts_align.logprobs import by_label, masked_sum
from tts_align.objectives.base import Objective, Outcome, Part, Step, check_not_negative, check_positive

ReferencePoint = Literal["token", "batch_position", "batch"]


def token_weights(
    log_ratio: Float[Tensor, "r t"],
    desirable: Bool[Tensor, " r"],
    mu: float = 1.0,
    lower: float = -2.0,
    upper: float = 2.0,
) -> Float[Tensor, "r t"]:
    """W = exp(±μ · clamp(log π⁺ − log π⁻, L, U)); arXiv 2510.05799, eq. 2, with + for desirable rows.

    Args:
        log_ratio: log π⁺ − log π⁻ of each token.
        desirable: label of each row.
        mu: μ.
        lower: L.
        upper: U.

    Example:
        >>> from tts_align import token_weights
        >>> positive = torch.tensor([[-1.0, -1.0, -2.0]])  # log-probability of each token under π⁺
        >>> negative = torch.tensor([[-1.0, -10.0, -1.5]])  # and under π⁻
        >>> token_weights(positive - negative, torch.tensor([True]))  # the second token decides
        tensor([[1.0000, 7.3891, 0.6065]])
    """
    sign = by_label(desirable, mu, -mu, log_ratio)[:, None]
    return torch.exp(sign * log_ratio.clamp(lower, upper))


def token_values(
    reward: Float[Tensor, "r t"],
    reference_point: Float[Tensor, "r t"],
    desirable: Bool[Tensor, " r"],
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, "r t"]:
    """V = λ_D σ(β(r − z₀)) or λ_U σ(β(z₀ − r)) of each token; arXiv 2510.05799, eq. 5.

    Args:
        reward: r, the log-ratio of each token.
        reference_point: z₀ of each token.
        desirable: label of each row.
        beta: how quickly gains and losses saturate.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    Example:
        The loss of token-level KTO is −Σ w v:

        >>> from tts_align import full_kl, masked_sum, token_values, token_weights
        >>> reward, mask = torch.zeros(2, 3), torch.tensor([[True, True, True], [True, True, False]])
        >>> desirable = torch.tensor([True, False])
        >>> kl = full_kl(torch.zeros(6, 4), torch.zeros(6, 4)).view(2, 3)  # of the logits at each token
        >>> weights = token_weights(torch.zeros(2, 3), desirable)
        >>> -masked_sum(weights * token_values(reward, kl, desirable, beta=0.1), mask)
        tensor([-1.5000, -1.0000])
    """
    sign = by_label(desirable, beta, -beta, reward)[:, None]
    weight = by_label(desirable, desirable_weight, undesirable_weight, reward)[:, None]
    return weight * torch.sigmoid(sign * (reward - reference_point))


class TKTO(Objective, name="tkto"):
    """Token-level KTO: every token gains or loses on its own, weighted by what a contrastive pair says of it.

    The loss is −Σ w v over the tokens of a row (eq. 6), averaged over rows. Without ``model.contrast`` in the recipe
    ``fit`` first fits the pair: KTO on the labels gives π⁺, KTO on the flipped labels π⁻.

    Args:
        beta: steepness β: how quickly a token's gain or loss saturates (eq. 5).
        desirable_weight: weight of desirable rows, λ_D (eq. 5).
        undesirable_weight: weight of undesirable rows, λ_U (eq. 5).
        mu: power μ of the contrastive ratio in the weight (eq. 2). The paper uses 1. With 0 every weight is 1 and no
            pair is needed.
        lower: lower clamp L of the pair's log-ratio (eq. 2).
        upper: upper clamp U of the pair's log-ratio (eq. 2).
        reference_point: reference point z₀ (eq. 4), the exact KL over the whole vocabulary: of each token itself, its
            mean over the micro-batch at the same position, or one mean over all tokens of the micro-batch and ranks.
            With the last two the gradient depends on how rows are cut into micro-batches.
        weigh_end: whether to weigh the end-of-speech token like any other; otherwise its weight is 1.
        normalise_weights: whether to divide the weights of a row by their mean.
        reduction: reduction over the tokens of a row: sum, as in the paper, or mean.
        sft_weight: weight of the mean token cross-entropy of the desirable rows.
    """

    reads = Reads.LABELLED
    wants_logits = True

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        mu: float = 1.0,
        lower: float = -2.0,
        upper: float = 2.0,
        reference_point: ReferencePoint = "token",
        weigh_end: bool = True,
        normalise_weights: bool = False,
        reduction: Literal["sum", "mean"] = "sum",
        sft_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        check_not_negative(mu=mu, sft_weight=sft_weight)
        if not lower <= 0 <= upper or lower == upper:
            raise ValueError(f"expected lower <= 0 <= upper, not both 0, got {lower} and {upper}")
        if mu == 0:
            idle = [name for name, on in (("normalise_weights", normalise_weights), ("weigh_end", not weigh_end)) if on]
            if idle:
                raise ValueError(f"{idle[0]} has no effect with mu: 0, where every weight is 1; leave it out")
        self.beta, self.mu, self.lower, self.upper = beta, mu, lower, upper
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.reference_point, self.weigh_end, self.normalise_weights = reference_point, weigh_end, normalise_weights
        self.reduction, self.sft_weight = reduction, sft_weight

    @property
    def needs(self) -> frozenset[Part]:  # type: ignore[override]  # a knob decides
        """The reference, and the contrast unless all weights are 1."""
        return frozenset({Part.REFERENCE, Part.CONTRAST} if self.mu else {Part.REFERENCE})

    def forward(self, step: Step) -> Outcome:
        """Share of the mean over all rows of the step."""
        mask = step.policy.mask
        weights, kl = self.weights(step), self.kl(step)
        values = token_values(
            step.log_ratio, kl, step.batch.desirable, self.beta, self.desirable_weight, self.undesirable_weight
        )
        losses = -masked_sum(weights * values, mask)
        if self.reduction == "mean":
            losses = losses / mask.sum(-1)
        loss = step.anchored(step.mean(losses), self.sft_weight)
        metrics = {"kl": Mean.of(kl, mask)} | step.sides("weight", weights)
        if step.contrast is not None:
            outside = (step.contrast <= self.lower) | (step.contrast >= self.upper)
            metrics["clamped"] = Mean.of(outside.float(), mask)
        return Outcome(loss, metrics | step.sides("logp", step.policy.logp) | step.sides("reward", step.log_ratio))

    def weights(self, step: Step) -> Float[Tensor, "r t"]:
        """Weight of each token, a constant; what stands at padding does not matter."""
        if self.mu == 0:
            return torch.ones_like(step.policy.logp)
        assert step.contrast is not None
        mask = step.policy.mask
        weights = token_weights(step.contrast, step.batch.desirable, self.mu, self.lower, self.upper)
        if not self.weigh_end:
            weights = torch.where(step.batch.rows.end, 1.0, weights)
        if self.normalise_weights:
            weights = weights * mask.sum(-1, keepdim=True) / masked_sum(weights, mask)[:, None]
        return weights.detach()

    def kl(self, step: Step) -> Float[Tensor, "r t"]:
        """Reference point of each token, without gradient."""
        with torch.no_grad():
            exact = step.batch.rows.scatter(step.exact_kl())
            mask = step.policy.mask
            if self.reference_point == "batch":
                return across_ranks(Mean.of(exact, mask)).value.expand_as(exact)
            if self.reference_point == "batch_position":
                return (exact.sum(0) / mask.sum(0).clamp(min=1)).expand_as(exact)
            return exact
