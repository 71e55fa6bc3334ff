# SPDX-License-Identifier: Apache-2.0
"""Scored steps for the objectives, made of random numbers, and their slow twins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tts_align.batch import Batch, Mean, Rows, Scored, Totals
from tts_align.logprobs import chosen_logp
from tts_align.models.base.layout import Layout, TokenRow, collate
from tts_align.objectives.base import Outcome, Step

LAYOUT = Layout("cosyvoice2", codebook_size=6)
LENGTHS = (3, 1, 5, 2)
"""Speech tokens of each row; one more target, end-of-speech, in each."""


def make_rows(lengths: Sequence[int], seed: int = 0) -> Rows:
    random = torch.Generator().manual_seed(seed)
    speech = [tuple(torch.randint(6, (length,), generator=random).tolist()) for length in lengths]
    return collate([TokenRow((1, 2), speech_tokens) for speech_tokens in speech], LAYOUT)


def make_step(
    desirable: Sequence[bool],
    lengths: Sequence[int] = LENGTHS,
    *,
    seed: int = 0,
    same: bool = False,
    mismatched: float = 0.7,
    totals: Totals | None = None,
) -> Step:
    """A step of random numbers; the policy's log-probabilities are a leaf, so gradients can be asked of them.

    Args:
        desirable: label of each row.
        lengths: speech tokens of each row.
        seed: of the numbers.
        same: the policy is the reference.
        mismatched: mean log-ratio of the mismatched rows.
        totals: of the whole step; by default this is all of it.
    """
    rows, labels = make_rows(lengths, seed), torch.tensor(desirable)
    random = torch.Generator().manual_seed(seed + 1)
    shape = (len(rows.target), LAYOUT.vocabulary)
    reference_logits = 2 * torch.randn(shape, generator=random)
    logits = reference_logits if same else reference_logits + 1.5 * torch.randn(shape, generator=random)
    policy = Scored(rows.scatter(chosen_logp(logits, rows.target)).requires_grad_(), rows.mask, logits)
    reference = Scored(rows.scatter(chosen_logp(reference_logits, rows.target)), rows.mask, reference_logits)
    contrast = 2 * torch.randn(rows.mask.shape, generator=random) * rows.mask
    if totals is None:
        tokens = rows.mask.sum(-1)
        totals = Totals(len(labels), int(tokens.sum()), int(labels.sum()), int(tokens[labels].sum()))
    found = Mean(torch.tensor(2 * mismatched), torch.tensor(2.0))
    return Step(Batch(rows, labels, totals), policy, reference, contrast, found)


def gradient(objective: torch.nn.Module, step: Step) -> Tensor:
    """Of the loss, with respect to each token's log-probability under the policy; padding is a constant."""
    pull = torch.autograd.grad(outcome(objective, step).loss, step.policy.logp)[0]
    return torch.where(step.policy.mask, pull, 0.0)


def outcome(objective: torch.nn.Module, step: Step) -> Outcome:
    return objective(step)


def with_logp(step: Step, logp: Tensor) -> Step:
    return replace(step, policy=replace(step.policy, logp=logp))


def tokens(step: Step, values: Tensor) -> list[list[float]]:
    """The real entries of each row, as Python numbers in double precision."""
    return [row[mask].double().tolist() for row, mask in zip(values.detach(), step.policy.mask, strict=True)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_anchor(step: Step) -> float:
    """Mean cross-entropy over the tokens of the desirable rows."""
    logp = tokens(step, step.policy.logp)
    good = [x for row, label in zip(logp, step.batch.desirable.tolist(), strict=True) if label for x in row]
    return -sum(good) / max(len(good), 1)
