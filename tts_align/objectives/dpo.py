# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation on pairs (arXiv 2305.18290), its conservative form, and IPO (arXiv 2310.12036)."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from tts_align.batch import Mean, Reads
from tts_align.objectives.base import Objective, Outcome, Part, Step, check_not_negative, check_positive


def dpo_loss(margin: Float[Tensor, " p"], beta: float, label_smoothing: float = 0.0) -> Float[Tensor, " p"]:
    """−(1−ε) log σ(β m) − ε log σ(−β m); arXiv 2305.18290, eq. 7, with cDPO's smoothing ε.

    Args:
        margin: log-ratio of the chosen row minus that of the rejected row.
        beta: strength of the pull to the reference.
        label_smoothing: share of pairs taken to be labelled the wrong way round.

    Example:
        >>> import torch
        >>> from tts_align import dpo_loss
        >>> policy = torch.tensor([[-10.0, -9.0], [-8.0, -11.0]], requires_grad=True)  # chosen rows, rejected rows
        >>> reference = torch.tensor([[-10.0, -9.0], [-8.0, -11.0]])  # log-probabilities of the same rows
        >>> chosen, rejected = policy - reference
        >>> loss = dpo_loss(chosen - rejected, beta=0.1).mean()
        >>> loss.backward()
        >>> loss, policy.grad  # ln 2 at the start; chosen rows are to gain, rejected ones to lose
        (tensor(0.6931, grad_fn=<MeanBackward0>), tensor([[-0.0250, -0.0250],
                [ 0.0250,  0.0250]]))
    """
    return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)


def ipo_loss(margin: Float[Tensor, " p"], beta: float) -> Float[Tensor, " p"]:
    """(m − 1 / 2β)²; arXiv 2310.12036, eq. 17, where β is called τ.

    Args:
        margin: log-ratio of the chosen row minus that of the rejected row.
        beta: strength of the pull to the reference; the margin that is aimed at is 1 / 2β.

    Example:
        >>> import torch
        >>> from tts_align import ipo_loss
        >>> ipo_loss(torch.tensor([0.0, 5.0]), beta=0.1)
        tensor([25.,  0.])
    """
    return (margin - 1 / (2 * beta)) ** 2


class DPO(Objective, name="dpo"):
    """Direct preference optimisation: the chosen row should gain more than the rejected one.

    Args:
        beta: strength of the pull to the reference, β.
        loss: loss of a pair: sigmoid (DPO), or ipo (squared distance to a fixed margin).
        label_smoothing: share of pairs taken to be labelled the wrong way round; sigmoid only.
        average_tokens: whether log-ratios are means over the tokens of a row instead of sums. Implementations of IPO
            differ in this; the papers sum.
        sft_weight: weight of the mean token cross-entropy of the chosen rows.
    """

    needs: ClassVar[frozenset[Part]] = frozenset({Part.REFERENCE})
    reads = Reads.PAIR

    def __init__(
        self,
        beta: float = 0.1,
        loss: Literal["sigmoid", "ipo"] = "sigmoid",
        label_smoothing: float = 0.0,
        average_tokens: bool = False,
        sft_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(beta=beta)
        check_not_negative(sft_weight=sft_weight)
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
        if loss == "ipo" and label_smoothing:
            raise ValueError("label_smoothing has no effect with loss: ipo; set it to 0")
        self.beta, self.loss, self.label_smoothing = beta, loss, label_smoothing
        self.average_tokens, self.sft_weight = average_tokens, sft_weight

    def forward(self, step: Step) -> Outcome:
        """Share of the mean over all pairs of the step."""
        rewards = step.log_ratio.sum(-1)
        if self.average_tokens:
            rewards = rewards / step.policy.mask.sum(-1)
        chosen, rejected = rewards.chunk(2)
        margin = chosen - rejected
        if self.loss == "ipo":
            losses = ipo_loss(margin, self.beta)
        else:
            losses = dpo_loss(margin, self.beta, self.label_smoothing)
        loss = step.anchored(step.mean(losses), self.sft_weight)
        metrics = {"margin": Mean.of(self.beta * margin), "accuracy": Mean.of((margin > 0).float())}
        return Outcome(loss, metrics | step.sides("logp", step.policy.logp) | step.sides("reward", step.log_ratio))
