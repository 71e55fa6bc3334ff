# SPDX-License-Identifier: Apache-2.0
"""TKTO, equation by equation and option by option, against loops over rows and tokens."""

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from steps import LENGTHS, gradient, make_step, outcome, sigmoid, slow_anchor, tokens

from tts_align.batch import Totals
from tts_align.objectives import KTO, TKTO, Part
from tts_align.objectives.base import Step
from tts_align.objectives.tkto import token_values, token_weights

LABELS = (True, False, True, False)
DEFAULTS: dict[str, Any] = {
    "beta": 0.1,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "mu": 1.0,
    "lower": -2.0,
    "upper": 2.0,
    "reference_point": "token",
    "weigh_end": True,
    "normalise_weights": False,
    "reduction": "sum",
    "sft_weight": 0.0,
}
"""The paper's constants."""


def test_golden_weights():
    """Eq. 2: desirable e^0.5 = 1.648721, e^2 at the clamp; undesirable e^−0.5 = 0.606531, e^2 for −3 clamped to −2."""
    found = token_weights(torch.tensor([[0.5, 4.0], [0.5, -3.0]]), torch.tensor([True, False]))
    assert found.flatten().tolist() == pytest.approx([1.648721, 7.389056, 0.606531, 7.389056], abs=1e-5)


def test_golden_values():
    """Eq. 5 with r = 3, z = 1, β = 0.5: σ(1) = 0.731059 desirable, 2 σ(−1) = 0.537883 undesirable with λ_U = 2."""
    reward, anchor = torch.full((2, 1), 3.0), torch.full((2, 1), 1.0)
    found = token_values(reward, anchor, torch.tensor([True, False]), 0.5, undesirable_weight=2.0)
    assert found.flatten().tolist() == pytest.approx([0.731059, 0.537883], abs=1e-6)


def slow_kl(step: Step) -> list[list[float]]:
    """Eq. 4 at every real token: Σ_v p log(p / q) over the whole vocabulary."""
    flat = []
    for ours, theirs in zip(step.policy.logits.double(), step.reference.logits.double(), strict=True):
        p = [math.exp(x) / sum(math.exp(y) for y in ours.tolist()) for x in ours.tolist()]
        q = [math.exp(x) / sum(math.exp(y) for y in theirs.tolist()) for x in theirs.tolist()]
        flat.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    numbers = iter(flat)
    return [[next(numbers) for _ in range(length + 1)] for length in LENGTHS]


def slow_loss(step: Step, **knobs: Any) -> float:
    """Equations 2 to 6, a row and a token at a time."""
    o = DEFAULTS | knobs
    kl = slow_kl(step)
    everything = [z for row in kl for z in row]
    policy, reference = tokens(step, step.policy.logp), tokens(step, step.reference.logp)
    contrast = tokens(step, step.contrast)
    losses = []
    for i, label in enumerate(step.batch.desirable.tolist()):
        count = len(policy[i])
        weights, values = [], []
        for t in range(count):
            power = o["mu"] * min(max(contrast[i][t], o["lower"]), o["upper"])
            weight = math.exp(power if label else -power)
            if not o["weigh_end"] and t == count - 1:
                weight = 1.0
            weights.append(weight)
            if o["reference_point"] == "token":
                z = kl[i][t]
            elif o["reference_point"] == "batch":
                z = sum(everything) / len(everything)
            else:
                here = [row[t] for row in kl if t < len(row)]
                z = sum(here) / len(here)
            r = policy[i][t] - reference[i][t]
            values.append(
                o["desirable_weight"] * sigmoid(o["beta"] * (r - z))
                if label
                else o["undesirable_weight"] * sigmoid(o["beta"] * (z - r))
            )
        if o["normalise_weights"]:
            weights = [weight * count / sum(weights) for weight in weights]
        row = -sum(w * v for w, v in zip(weights, values, strict=True))
        losses.append(row / count if o["reduction"] == "mean" else row)
    return sum(losses) / len(losses) + o["sft_weight"] * slow_anchor(step)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta": 0.8},
    {"desirable_weight": 1.7, "undesirable_weight": 0.4},
    {"mu": 0.25},
    {"mu": 0.0},
    {"lower": -0.5},
    {"upper": 0.3},
    {"lower": -8.0, "upper": 8.0, "mu": 0.5},
    {"reference_point": "batch_position"},
    {"reference_point": "batch"},
    {"weigh_end": False},
    {"normalise_weights": True},
    {"normalise_weights": True, "weigh_end": False},
    {"reduction": "mean"},
    {"sft_weight": 3.0},
]


@pytest.mark.parametrize("labels", [LABELS, (True,) * 4, (False,) * 4])
@pytest.mark.parametrize("knobs", OPTIONS, ids=str)
def test_equals_the_equations(knobs: dict[str, Any], labels: tuple[bool, ...]):
    step = make_step(labels, seed=5)
    assert outcome(TKTO(**knobs), step).loss.item() == pytest.approx(slow_loss(step, **knobs), rel=1e-6, abs=1e-6)


def test_float64_is_computed_in_float64():
    ratio, label = torch.tensor([[0.3], [-0.4]], dtype=torch.float64), torch.tensor([True, False])
    assert token_weights(ratio, label, mu=0.1)[:, 0].tolist() == pytest.approx(
        [math.exp(0.03), math.exp(0.04)], rel=1e-14
    )
    found = token_values(ratio, torch.zeros_like(ratio), label, 0.1, 0.1, 0.7)[:, 0].tolist()
    assert found == pytest.approx([0.1 / (1 + math.exp(-0.03)), 0.7 / (1 + math.exp(-0.04))], rel=1e-14)


def test_every_option_has_an_effect():
    step = make_step(LABELS, seed=5)
    found = [outcome(TKTO(**knobs), step).loss.item() for knobs in OPTIONS]
    assert len({round(loss, 5) for loss in found}) == len(OPTIONS)


def test_the_papers_constants_are_the_defaults():
    objective = TKTO()
    assert {name: getattr(objective, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("reference_point", ["token", "batch_position", "batch"])
def test_with_equal_weights_at_the_reference_the_gradient_is_that_of_kto(reference_point: str):
    """Both are β/4 for each token, up for desirable rows and down for undesirable ones."""
    step = make_step(LABELS, same=True, mismatched=0.0)
    for knobs in ({}, {"desirable_weight": 1.3, "undesirable_weight": 0.6}):
        torch.testing.assert_close(
            gradient(TKTO(mu=0.0, reference_point=reference_point, **knobs), step), gradient(KTO(**knobs), step)
        )


def test_at_the_reference_the_loss_is_minus_half_of_each_weight():
    step = make_step(LABELS, same=True)
    weights = tokens(step, token_weights(step.contrast, step.batch.desirable))
    expected = -sum(0.5 * sum(row) for row in weights) / 4
    assert outcome(TKTO(), step).loss.item() == pytest.approx(expected, rel=1e-6)


def test_desirable_tokens_are_pushed_up_and_undesirable_down_each_by_its_weight():
    step = make_step(LABELS, same=True)
    pull, mask = gradient(TKTO(), step), step.policy.mask
    weights = token_weights(step.contrast, step.batch.desirable)
    expected = torch.where(step.batch.desirable, -1.0, 1.0)[:, None] * mask * weights * 0.1 / 4 / 4
    torch.testing.assert_close(pull, expected)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8), st.booleans())
def test_weights_stay_between_e_to_minus_2_and_e_to_2(ratios: list[float], label: bool):
    found = token_weights(torch.tensor([ratios]), torch.tensor([label]))
    assert (found >= math.exp(-2) * (1 - 1e-6)).all()
    assert (found <= math.exp(2) * (1 + 1e-6)).all()


def test_normalised_weights_have_mean_1():
    step = make_step(LABELS)
    weights = TKTO(normalise_weights=True).weights(step)
    assert [sum(row) / len(row) for row in tokens(step, weights)] == pytest.approx([1.0] * 4)


def test_weights_and_reference_point_get_no_gradient():
    step = make_step(LABELS)
    step = replace(
        step, contrast=step.contrast.requires_grad_(), policy=replace(step.policy, logits=step.policy.logits.clone())
    )
    step.policy.logits.requires_grad_()
    objective = TKTO()
    assert not objective.weights(step).requires_grad
    assert not objective.kl(step).requires_grad
    assert torch.autograd.grad(objective(step).loss, step.policy.logits, allow_unused=True) == (None,)


@pytest.mark.parametrize("knobs", OPTIONS, ids=str)
def test_what_stands_at_padding_does_not_matter(knobs: dict[str, Any]):
    step = make_step(LABELS)
    dirty = replace(step, contrast=step.contrast.where(step.policy.mask, torch.nan))
    one, other = outcome(TKTO(**knobs), step), outcome(TKTO(**knobs), dirty)
    assert one.loss.item() == other.loss.item()
    for name, mean in one.metrics.items():
        assert mean.value.item() == other.metrics[name].value.item(), name
    torch.testing.assert_close(gradient(TKTO(**knobs), step), gradient(TKTO(**knobs), dirty), rtol=0, atol=0)


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("knobs", OPTIONS, ids=str)
def test_one_class_alone(knobs: dict[str, Any], label: bool):
    step = make_step((label,) * 4)
    found = outcome(TKTO(**knobs), step)
    assert found.loss.isfinite()
    assert gradient(TKTO(**knobs), step).isfinite().all()
    present, absent = ("desirable", "undesirable") if label else ("undesirable", "desirable")
    for name in ("weight", "logp", "reward"):
        assert found.metrics[f"{present}_{name}"].count.item() == sum(LENGTHS) + 4
        assert found.metrics[f"{absent}_{name}"].count.item() == 0
        assert found.metrics[f"{absent}_{name}"].value.item() == 0


def test_the_share_is_of_the_whole_step():
    whole, share = make_step(LABELS), make_step(LABELS, totals=Totals(12, 45, 6, 20))
    torch.testing.assert_close(outcome(TKTO(), share).loss * 3, outcome(TKTO(), whole).loss)


def test_metrics():
    step = make_step(LABELS)
    metrics = outcome(TKTO(lower=-1.0), step).metrics
    ratios = [x for row in tokens(step, step.contrast) for x in row]
    assert metrics["clamped"].value.item() == pytest.approx(sum(x <= -1 or x >= 2 for x in ratios) / len(ratios))
    kl = [z for row in slow_kl(step) for z in row]
    assert metrics["kl"].value.item() == pytest.approx(sum(kl) / len(kl), rel=1e-5)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"mu": -1.0}, "mu must not be negative"),
        ({"sft_weight": -1.0}, "sft_weight must not be negative"),
        ({"lower": 1.0}, "expected lower <= 0 <= upper"),
        ({"lower": 0.0, "upper": 0.0}, "not both 0"),
        ({"mu": 0.0, "normalise_weights": True}, "normalise_weights has no effect with mu: 0"),
        ({"mu": 0.0, "weigh_end": False}, "weigh_end has no effect with mu: 0"),
    ],
)
def test_knobs_that_cannot_work_or_have_no_effect_raise(knobs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TKTO(**knobs)


def test_without_weights_no_pair_is_needed():
    assert TKTO(mu=0.0).needs == {Part.REFERENCE}
    assert TKTO().needs == {Part.REFERENCE, Part.CONTRAST}
