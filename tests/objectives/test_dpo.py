# SPDX-License-Identifier: Apache-2.0
"""DPO, its conservative form and IPO against golden values and slow formulas; rows 0, 1 are chosen, 2, 3 rejected."""

import math

import pytest
import torch
from steps import gradient, make_step, outcome, sigmoid, slow_anchor, tokens

from tts_align.batch import Reads, Totals
from tts_align.objectives import DPO
from tts_align.objectives.base import Step
from tts_align.objectives.dpo import dpo_loss, ipo_loss

SIDES = (True, True, False, False)


def test_golden_values():
    """With m = 2 and β = 0.1.

    sigmoid: −log σ(0.2) = log(1 + e^−0.2) = log 1.818731 = 0.598139
    cDPO, ε = 0.1: 0.9 · 0.598139 + 0.1 · log(1 + e^0.2) = 0.538325 + 0.079814 = 0.618139
    IPO: (2 − 1 / 0.2)² = 9
    """
    margin = torch.tensor([2.0])
    assert dpo_loss(margin, 0.1).item() == pytest.approx(0.598139, abs=1e-6)
    assert dpo_loss(margin, 0.1, 0.1).item() == pytest.approx(0.618139, abs=1e-6)
    assert ipo_loss(margin, 0.1).item() == pytest.approx(9.0, abs=1e-6)


def margins(step: Step, average: bool) -> list[float]:
    """Sum (or mean) over tokens of log π − log π_ref, chosen minus rejected."""
    policy, reference = tokens(step, step.policy.logp), tokens(step, step.reference.logp)
    rewards = []
    for ours, theirs in zip(policy, reference, strict=True):
        reward = sum(a - b for a, b in zip(ours, theirs, strict=True))
        rewards.append(reward / len(ours) if average else reward)
    return [rewards[i] - rewards[i + 2] for i in range(2)]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sigmoid_equals_the_published_formula(seed: int, beta: float, smoothing: float, average: bool):
    """TRL and the authors: −(1 − ε) log σ(β m) − ε log σ(−β m), averaged over pairs."""
    step = make_step(SIDES, seed=seed)
    objective = DPO(beta, label_smoothing=smoothing, average_tokens=average)
    expected = 0.0
    for margin in margins(step, average):
        expected -= (1 - smoothing) * math.log(sigmoid(beta * margin)) + smoothing * math.log(sigmoid(-beta * margin))
    assert outcome(objective, step).loss.item() == pytest.approx(expected / 2, abs=1e-6)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_ipo_equals_the_published_formula(seed: int, average: bool):
    """(m − 1 / 2β)²; TRL and the authors' code take means over tokens, the paper sums."""
    step = make_step(SIDES, seed=seed)
    expected = sum((margin - 1 / (2 * 0.4)) ** 2 for margin in margins(step, average)) / 2
    found = outcome(DPO(0.4, "ipo", average_tokens=average), step).loss.item()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_same_model_gives_ln_2():
    step = make_step(SIDES, same=True)
    assert outcome(DPO(), step).loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert outcome(DPO(label_smoothing=0.3), step).loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert outcome(DPO(0.5, "ipo"), step).loss.item() == pytest.approx(1.0, abs=1e-7)  # (0 − 1/1)²


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_chosen_tokens_are_pushed_up_and_rejected_down(loss: str):
    step = make_step(SIDES, same=True)
    pull, mask = gradient(DPO(loss=loss), step), step.policy.mask
    assert (pull[:2][mask[:2]] < 0).all()
    assert (pull[2:][mask[2:]] > 0).all()
    if loss == "sigmoid":  # β/2 for each token, over two pairs
        torch.testing.assert_close(pull[mask].abs(), torch.full((15,), 0.1 / 2 / 2))


def test_the_anchor_is_added():
    step = make_step(SIDES)
    plain, anchored = outcome(DPO(), step).loss, outcome(DPO(sft_weight=0.5), step).loss
    assert (anchored - plain).item() == pytest.approx(0.5 * slow_anchor(step), abs=1e-5)


def test_the_share_is_of_all_pairs_of_the_step():
    whole, share = make_step(SIDES), make_step(SIDES, totals=Totals(16, 60, 8, 30))
    torch.testing.assert_close(outcome(DPO(), share).loss * 4, outcome(DPO(), whole).loss)


def test_metrics():
    step = make_step(SIDES)
    metrics = outcome(DPO(0.2), step).metrics
    found = margins(step, average=False)
    assert metrics["margin"].value.item() == pytest.approx(0.2 * sum(found) / 2, abs=1e-5)
    assert metrics["accuracy"].value.item() == sum(margin > 0 for margin in found) / 2
    assert (metrics["margin"].count.item(), metrics["desirable_logp"].count.item()) == (2, 6)
    ours, theirs = tokens(step, step.policy.logp), tokens(step, step.reference.logp)
    rewards = [a - b for row in (2, 3) for a, b in zip(ours[row], theirs[row], strict=True)]
    assert metrics["undesirable_reward"].value.item() == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\)"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect with loss: ipo"),
        ({"sft_weight": -1.0}, "sft_weight must not be negative"),
    ],
)
def test_knobs_that_cannot_work_or_have_no_effect_raise(knobs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DPO(**knobs)


def test_facts():
    assert DPO.reads is Reads.PAIR
    assert not DPO.wants_mismatched
