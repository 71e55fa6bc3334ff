# SPDX-License-Identifier: Apache-2.0
"""Kahneman-Tversky optimisation on single labelled rows (arXiv 2402.01306)."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tts_align.batch import Mean, Reads
from tts_align.logprobs import by_label
from tts_align.objectives.base import Objective, Outcome, Part, Step, check_not_negative, check_positive


def kto_loss(
    reward: Float[Tensor, " r"],
    reference_point: Float[Tensor, ""],
    desirable: Bool[Tensor, " r"],
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " r"]:
    """λ_D (1 − σ(β(R − z₀))) or λ_U (1 − σ(β(z₀ − R))); arXiv 2402.01306, eq. 8.

    Args:
        reward: R, the sum of each row's token log-ratios.
        reference_point: z₀.
        desirable: label of each row.
        beta: how quickly gains and losses saturate.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    Example:
        >>> from tts_align import kto_loss
        >>> policy = torch.tensor([-10.0, -12.0], requires_grad=True)  # log-probability of each row
        >>> reference, desirable = torch.tensor([-10.0, -12.0]), torch.tensor([True, False])
        >>> mismatched = torch.tensor([-0.2, 0.4])  # log-ratios of speech under another row's text
        >>> losses = kto_loss(policy - reference, mismatched.mean().clamp(min=0), desirable, beta=0.1)
        >>> losses.mean().backward()
        >>> losses, policy.grad
        (tensor([0.5025, 0.4975], grad_fn=<MulBackward0>), tensor([-0.0125,  0.0125]))
    """
    sign = by_label(desirable, 1.0, -1.0, reward)
    weight = by_label(desirable, desirable_weight, undesirable_weight, reward)
    return weight * (1 - torch.sigmoid(sign * beta * (reward - reference_point)))


class KTO(Objective, name="kto"):
    """Kahneman-Tversky optimisation: single utterances that are good or bad, no pairs.

    The reference point z₀ estimates KL(policy ‖ reference): the mean log-ratio of speech under another sentence's text,
    over all ranks and micro-batches of the step, clamped at 0, without gradient.

    Args:
        beta: steepness β: how quickly gains and losses saturate.
        desirable_weight: weight of desirable rows, λ_D. The paper advises λ_D n_D / (λ_U n_U) between 1 and 4/3.
        undesirable_weight: weight of undesirable rows, λ_U.
        sft_weight: weight of the mean token cross-entropy of the desirable rows.
    """

    needs: ClassVar[frozenset[Part]] = frozenset({Part.REFERENCE})
    reads = Reads.LABELLED
    wants_mismatched = True

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        sft_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        check_not_negative(sft_weight=sft_weight)
        self.beta, self.sft_weight = beta, sft_weight
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def forward(self, step: Step) -> Outcome:
        """Share of the mean over all rows of the step."""
        assert step.mismatched is not None
        reference_point = step.mismatched.value.clamp(min=0)
        losses = kto_loss(
            step.log_ratio.sum(-1),
            reference_point,
            step.batch.desirable,
            self.beta,
            self.desirable_weight,
            self.undesirable_weight,
        )
        loss = step.anchored(step.mean(losses), self.sft_weight)
        metrics = {"kl": Mean.of(reference_point)}
        return Outcome(loss, metrics | step.sides("logp", step.policy.logp) | step.sides("reward", step.log_ratio))
