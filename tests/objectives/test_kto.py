# SPDX-License-Identifier: Apache-2.0
"""KTO against golden values and a slow formula."""

import math

import pytest
import torch
from steps import LENGTHS, gradient, make_step, outcome, sigmoid, slow_anchor, tokens

from tts_align.batch import Reads, Totals
from tts_align.objectives import KTO
from tts_align.objectives.kto import kto_loss

LABELS = (True, False, True, False)


def test_golden_values():
    """With β = 0.5, z₀ = 1, λ_U = 2, R = 3 desirable and R = −1 undesirable.

    desirable:   1 · (1 − σ(0.5 · (3 − 1)))  = 1 − σ(1) = 0.268941
    undesirable: 2 · (1 − σ(0.5 · (1 + 1)))  = 2 (1 − σ(1)) = 0.537883
    """
    found = kto_loss(
        torch.tensor([3.0, -1.0]), torch.tensor(1.0), torch.tensor([True, False]), 0.5, undesirable_weight=2.0
    )
    assert found.tolist() == pytest.approx([0.268941, 0.537883], abs=1e-6)


@pytest.mark.parametrize("mismatched", [-0.4, 0.0, 1.3])
@pytest.mark.parametrize(("up", "down"), [(1.0, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize("beta", [0.1, 0.6])
@pytest.mark.parametrize("labels", [LABELS, (True,) * 4, (False,) * 4, (False, False, False, True)])
def test_equals_the_published_formula(labels: tuple[bool, ...], beta: float, up: float, down: float, mismatched: float):
    """TRL and the authors: λ_D (1 − σ(β(R − z))) and λ_U (1 − σ(β(z − R))), z the mean mismatched ratio, at least 0."""
    step = make_step(labels, seed=3, mismatched=mismatched)
    policy, reference = tokens(step, step.policy.logp), tokens(step, step.reference.logp)
    anchor, losses = max(mismatched, 0.0), []
    for ours, theirs, label in zip(policy, reference, labels, strict=True):
        reward = sum(ours) - sum(theirs)
        value = sigmoid(beta * (reward - anchor)) if label else sigmoid(beta * (anchor - reward))
        losses.append((up if label else down) * (1 - value))
    found = outcome(KTO(beta, up, down), step)
    assert found.loss.item() == pytest.approx(sum(losses) / 4, abs=1e-6)
    assert found.metrics["kl"].value.item() == pytest.approx(anchor, abs=1e-6)


def test_float64_is_computed_in_float64():
    """The numbers of labels, too: in float32 a weight of 0.1 is wrong by 1.5e-9."""
    reward, label = torch.tensor([0.3, -0.4], dtype=torch.float64), torch.tensor([True, False])
    found = kto_loss(reward, torch.zeros((), dtype=torch.float64), label, 0.1, 0.1, 0.7)
    expected = [0.1 * (1 - 1 / (1 + math.exp(-0.03))), 0.7 * (1 - 1 / (1 + math.exp(-0.04)))]
    assert found.tolist() == pytest.approx(expected, rel=1e-14)


def test_the_same_model_gives_a_half():
    step = make_step(LABELS, same=True, mismatched=0.0)
    assert outcome(KTO(), step).loss.item() == 0.5


def test_desirable_tokens_are_pushed_up_and_undesirable_down():
    step = make_step(LABELS, same=True, mismatched=0.0)
    pull, mask = gradient(KTO(), step), step.policy.mask
    expected = torch.where(step.batch.desirable, -1.0, 1.0)[:, None] * mask * 0.1 / 4 / 4  # β/4 each, four rows
    torch.testing.assert_close(pull, expected)


@pytest.mark.parametrize("label", [True, False])
def test_one_class_alone(label: bool):
    step = make_step((label,) * 4)
    found = outcome(KTO(sft_weight=1.0), step)
    assert found.loss.isfinite()
    assert gradient(KTO(sft_weight=1.0), step).isfinite().all()
    present, absent = ("desirable", "undesirable") if label else ("undesirable", "desirable")
    for name in ("logp", "reward"):
        assert found.metrics[f"{present}_{name}"].count.item() == sum(LENGTHS) + 4
        assert found.metrics[f"{absent}_{name}"].count.item() == 0
        assert found.metrics[f"{absent}_{name}"].value.item() == 0


def test_the_anchor_is_added():
    step = make_step(LABELS)
    plain, anchored = outcome(KTO(), step).loss, outcome(KTO(sft_weight=2.0), step).loss
    assert (anchored - plain).item() == pytest.approx(2 * slow_anchor(step), abs=1e-5)


def test_the_share_is_of_the_whole_step():
    whole, share = make_step(LABELS), make_step(LABELS, totals=Totals(12, 45, 6, 20))
    torch.testing.assert_close(outcome(KTO(), share).loss * 3, outcome(KTO(), whole).loss)


def test_the_reference_point_gets_no_gradient():
    assert not outcome(KTO(), make_step(LABELS)).metrics["kl"].total.requires_grad


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"beta": -0.1}, "beta must be above 0"),
        ({"desirable_weight": 0.0, "undesirable_weight": -1.0}, "desirable_weight .*; undesirable_weight must"),
        ({"sft_weight": -1.0}, "sft_weight must not be negative"),
    ],
)
def test_knobs_that_cannot_work_raise(knobs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        KTO(**knobs)


def test_facts():
    assert KTO.reads is Reads.LABELLED
    assert KTO.wants_mismatched
