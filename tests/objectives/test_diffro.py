# SPDX-License-Identifier: Apache-2.0
"""DiffRO against the reward model's own scores, finite differences, torch's divergence, and formulas typed again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from spoken import ATTRIBUTES, CODES, make_reward, spoken_step
from steps import LAYOUT
from tiny import REWARD_SIZES
from torch import Tensor
from torch.nn import functional

from tts_align.batch import Reads, Totals
from tts_align.gumbel import RowNoise, gumbel_softmax_st, row_generators
from tts_align.models.reward.config import RewardSizes
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import DiffRO, Outcome, Part, Parts
from tts_align.objectives.base import Step

LENGTHS = (4, 2, 6)


def drawn(step: Step, temperature: float = 1.0, hard: bool = True) -> Tensor:
    """The same speech tokens again, flat: made of the rows' seeds and of nothing else."""
    said, logits = step.utterances, step.policy.logits
    assert logits is not None
    noise = RowNoise(row_generators(said.seeds), said.targets)
    return gumbel_softmax_st(logits, CODES, noise, temperature, hard)


def in_rows(step: Step, flat: Tensor) -> Tensor:
    """Speech tokens of each row, padded: (r, s, c)."""
    said = step.utterances
    rows = flat.new_zeros(said.speech.numel(), flat.shape[-1])
    return rows.index_copy(0, said.code_place, flat[said.code_target]).view(*said.speech.shape, -1)


def labels(step: Step, model: RewardModel, **targets: Any) -> Any:
    said = step.utterances
    return model.encode_labels(said.target_texts, [{**row, **targets} for row in said.attributes])


def gradient(objective: DiffRO, step: Step) -> Tensor:
    assert step.policy.logits is not None
    return torch.autograd.grad(run(objective, step).loss, step.policy.logits)[0]


def run(objective: DiffRO, step: Step) -> Outcome:
    return objective(step)


def with_logits(step: Step, logits: Tensor) -> Step:
    return replace(step, policy=replace(step.policy, logits=logits))


def test_facts():
    assert DiffRO.needs == {Part.REFERENCE, Part.REWARD}
    assert DiffRO.trains == frozenset()
    assert DiffRO.reads is Reads.ANY
    assert DiffRO.wants_logits
    assert DiffRO.wants_utterances


@pytest.mark.parametrize("tasks", [("asr",), ("ctc", "mood"), ("asr", "ctc", "mood", "mos")])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reward_is_what_the_model_says_of_the_hard_codes(tasks: Sequence[str], reduction: Any):
    step = spoken_step(LENGTHS, rich=True)
    model = step.parts[Part.REWARD]
    assert isinstance(model, RewardModel)
    found = run(DiffRO(tasks=tasks, reduction=reduction, beta=0.0), step)
    soft = in_rows(step, drawn(step))
    assert set(soft.unique().tolist()) == {0.0, 1.0}
    with torch.no_grad():
        scores = model.score(soft.argmax(-1), step.utterances.mask, labels(step, model), tasks)
    expected = scores.reward(mean=reduction == "mean")
    assert found.metrics["reward"].value.item() == pytest.approx(expected.mean().item(), rel=1e-6)
    assert found.loss.item() == pytest.approx(-expected.mean().item(), rel=1e-6)
    for name in tasks:
        mine = scores[name]
        assert found.metrics[f"reward_{name}"].total.item() == pytest.approx(mine.total.sum().item(), rel=1e-6)
        assert found.metrics[f"reward_{name}"].count.item() == mine.count.sum().item()


@pytest.mark.parametrize(("reduction", "temperature"), [("mean", 1.0), ("sum", 0.7)])
def test_soft_codes_have_the_gradient_of_finite_differences(reduction: Any, temperature: float):
    """Reward, divergence and both tasks together, in double precision."""
    step = spoken_step(LENGTHS, rich=True, dtype=torch.float64)
    objective = DiffRO(
        0.3, ("asr", "mood"), estimator="soft", temperature=temperature, reduction=reduction, gradient_clip=0.0
    )
    found, logits = gradient(objective, step), step.policy.logits
    assert logits is not None
    assert found.dtype == torch.float64
    random, small = torch.Generator().manual_seed(5), 1e-5
    with torch.no_grad():
        for _ in range(4):
            way = torch.randn(logits.shape, generator=random, dtype=torch.float64)
            ahead, behind = (run(objective, with_logits(step, logits + s * small * way)).loss for s in (1, -1))
            assert ((ahead - behind) / (2 * small)).item() == pytest.approx((found * way).sum().item(), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_straight_through_is_hard_forward_and_soft_backward(temperature: float):
    """dR/d(one-hot) by autograd through the whole model, then the Jacobian of the softmax by hand."""
    step = spoken_step(LENGTHS, dtype=torch.float64)
    model = step.parts[Part.REWARD]
    assert isinstance(model, RewardModel)
    found = gradient(DiffRO(0.0, temperature=temperature, gradient_clip=0.0), step)
    hard, soft = drawn(step, temperature), drawn(step, temperature, hard=False).detach()
    leaf = hard.detach().requires_grad_()
    reward = model.score(in_rows(step, leaf), step.utterances.mask, labels(step, model), ("asr",)).reward().mean()
    (pull,) = torch.autograd.grad(reward, leaf)
    expected = torch.zeros_like(found)
    expected[:, :CODES] = -soft * (pull - (soft * pull).sum(-1, keepdim=True)) / temperature
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_special_ids_are_never_drawn_and_feel_no_reward():
    step = spoken_step(LENGTHS)
    logits = step.policy.logits
    assert logits is not None
    with torch.no_grad():
        logits[:, CODES:] += 50  # they would be drawn, were they not left out
    assert (drawn(step).sum(-1) == 1).all()
    assert gradient(DiffRO(0.0), step)[:, CODES:].abs().max() == 0
    assert gradient(DiffRO(1.0), step)[:, CODES:].abs().max() > 0  # but the divergence is over all of them


def test_only_codes_count():
    """End-of-speech has a target but no token: what is drawn there reaches nothing."""
    step = spoken_step(LENGTHS)
    found = gradient(DiffRO(0.0), step)
    ends = torch.tensor(LENGTHS).add(1).cumsum(0) - 1
    assert found[ends].abs().max() == 0
    assert (found.abs().sum(-1) > 0).sum() == sum(LENGTHS)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_divergence_is_torchs(reduction: Any):
    step = spoken_step(LENGTHS)
    ours, theirs = step.policy.logits, step.reference.logits  # type: ignore[union-attr]
    found = run(DiffRO(2.0, reduction=reduction), step)
    expected = functional.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="sum")
    count = len(ours) if reduction == "mean" else len(LENGTHS)
    assert found.metrics["kl"].value.item() == pytest.approx(expected.item() / len(ours), rel=1e-5)
    without = run(DiffRO(0.0, reduction=reduction), step)
    assert (found.loss - without.loss).item() == pytest.approx(2 * expected.item() / count, rel=1e-4)
    (pull,) = torch.autograd.grad(expected, ours)
    difference = gradient(DiffRO(2.0, reduction=reduction), step) - gradient(DiffRO(0.0, reduction=reduction), step)
    torch.testing.assert_close(difference, 2 * pull / count, rtol=1e-4, atol=1e-6)


def test_a_policy_that_is_its_reference_has_no_divergence():
    found = run(DiffRO(), spoken_step(LENGTHS, same=True))
    assert found.metrics["kl"].total.item() == 0


def test_the_text_that_is_wanted_not_the_one_that_was_heard():
    step = spoken_step(LENGTHS)
    said = step.utterances
    other = replace(step, batch=replace(step.batch, utterances=replace(said, transcripts=(None,) * len(LENGTHS))))
    assert run(DiffRO(), other).loss == run(DiffRO(), step).loss
    other = replace(step, batch=replace(step.batch, utterances=replace(said, target_texts=("う",) * len(LENGTHS))))
    assert run(DiffRO(), other).loss != run(DiffRO(), step).loss


def test_a_target_of_the_recipe_stands_above_a_rows_own():
    step = spoken_step(LENGTHS, rich=True)
    model = step.parts[Part.REWARD]
    assert isinstance(model, RewardModel)
    tasks = ("asr", "mood", "mos")
    targets: dict[str, str | float] = {"mood": "sad", "mos": 5.0}
    found = run(DiffRO(tasks=tasks, targets=targets), step)
    with torch.no_grad():
        speech_tokens = in_rows(step, drawn(step)).argmax(-1)
        scores = model.score(speech_tokens, step.utterances.mask, labels(step, model, **targets), tasks)
    assert scores["mood"].count.tolist() == [1.0] * len(LENGTHS)  # a row without a mood has one now
    assert found.metrics["reward_mood"].total.item() == pytest.approx(scores["mood"].total.sum().item(), rel=1e-6)
    plain = run(DiffRO(tasks=tasks), step)
    assert plain.metrics["reward_mood"].count.item() == len(LENGTHS) - 1


def test_the_gradient_of_each_row_is_clipped_by_itself():
    step = spoken_step(LENGTHS)
    free = run(DiffRO(0.0, gradient_clip=0.0), step)
    mean_norm = free.metrics["gradient_norm"].value.item()
    assert "gradient_clipped" not in free.metrics
    clip = mean_norm / 2
    tight = run(DiffRO(0.0, gradient_clip=clip), step)
    assert tight.metrics["gradient_norm"].value.item() == pytest.approx(mean_norm)
    assert tight.metrics["gradient_clipped"].value.item() > 0
    assert tight.loss == free.loss  # the value is not touched
    whole, clipped = gradient(DiffRO(0.0, gradient_clip=0.0), step), gradient(DiffRO(0.0, gradient_clip=clip), step)
    for one, other in zip(whole.split(step.utterances.targets), clipped.split(step.utterances.targets), strict=True):
        scale = (other * one).sum() / (one * one).sum()
        torch.testing.assert_close(other, scale * one, rtol=1e-4, atol=1e-7)
        assert scale <= 1 + 1e-5
    torch.testing.assert_close(gradient(DiffRO(0.0, gradient_clip=1e6), step), whole)


def test_the_cut_into_micro_batches_changes_nothing():
    """Each row has its own noise, its own clip, and counts by the totals of the whole step."""
    objective = DiffRO(0.4, ("asr", "mood"), sft_weight=0.5)
    step = spoken_step(LENGTHS, rich=True)
    whole = run(objective, step)
    pull = gradient(objective, step)
    parts = [spoken_step(LENGTHS, rich=True, only=rows, totals=step.batch.totals) for rows in ([0], [1, 2])]
    assert sum(run(objective, part).loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat([gradient(objective, part) for part in parts]), pull, rtol=1e-4, atol=1e-7)


def test_the_anchor_is_the_cross_entropy_of_the_desirable_rows():
    step = spoken_step(LENGTHS)
    both = run(DiffRO(sft_weight=3.0), step).loss - run(DiffRO(), step).loss
    assert both.item() == pytest.approx(3 * step.cross_entropy().item(), rel=1e-4)


def test_temperature_falls_with_the_steps():
    objective = DiffRO(estimator="soft", temperature=2.0, final_temperature=0.8, anneal_steps=4)
    for number, temperature in ((0, 2.0), (1, 1.7), (4, 0.8), (9, 0.8)):
        step = replace(spoken_step(LENGTHS), number=number)
        expected = run(DiffRO(estimator="soft", temperature=temperature), step)
        assert run(objective, step).loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


def test_how_sure_the_model_is_and_how_often_too_sure():
    step = spoken_step(LENGTHS, rich=True)
    model = step.parts[Part.REWARD]
    assert isinstance(model, RewardModel)
    metrics = run(DiffRO(tasks=("asr", "mood")), step).metrics
    bins = [metrics[f"reward_bin{number}"].value.item() for number in range(5)]
    assert sum(bins) == pytest.approx(1)
    assert metrics["saturated"].value.item() == 0
    with torch.no_grad():
        model.pooled[0].head.bias[1] = 50.0  # "sad", always
    metrics = run(DiffRO(tasks=("asr", "mood"), targets={"mood": "sad"}), step).metrics
    assert metrics["saturated"].value.item() == pytest.approx(0.5)
    assert metrics["reward_bin4"].value.item() == pytest.approx(0.5)


def test_dropout_in_the_reward_model_is_refused():
    step = spoken_step(LENGTHS)
    step.parts[Part.REWARD].train()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        run(DiffRO(), step)


class Held:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("estimator", ["straight_through", "soft"])
def test_two_large_tensors_are_held_beside_the_logits(estimator: Any):
    """Storage that autograd keeps for the backward pass, of the size of the logits or of the speech tokens alone."""
    step = spoken_step((40, 50), reward=make_reward(width=4))
    policy, reference = step.policy.logits, step.reference.logits  # type: ignore[union-attr]
    known = {tensor.untyped_storage().data_ptr() for tensor in (policy, reference)}
    packed: list[weakref.ref[Held]] = []

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor)
        packed.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = run(DiffRO(estimator=estimator), step).loss
    alive = [held.tensor for one in packed if (held := one()) is not None]
    large = {one.untyped_storage().data_ptr(): one.numel() for one in alive if one.numel() >= len(policy) * CODES}
    assert sorted(large.keys() - known) == sorted(large)
    assert sorted(large.values()) == [len(policy) * CODES, policy.numel()]  # the soft sample; the divergence's gradient
    loss.backward()


def test_without_gradients_it_only_looks():
    with torch.no_grad():
        metrics = run(DiffRO(), spoken_step(LENGTHS)).metrics
    assert "gradient_norm" not in metrics
    assert metrics["reward"].value.item() < 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"beta": -1.0}, "beta must not be negative, got -1.0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"tasks": ("mood",)}, "tasks must name asr or ctc, got mood: without the text the speech decays"),
        ({"tasks": ()}, "tasks must name asr or ctc, got none"),
        ({"targets": {"mood": "sad"}}, "targets of mood have no effect: add them to `tasks`"),
        ({"final_temperature": 0.5}, "final_temperature and anneal_steps need each other"),
        ({"anneal_steps": 3}, "final_temperature and anneal_steps need each other"),
        ({"rollout": "free", "sft_weight": 1.0}, "sft_weight needs stored rows: leave it out with `rollout: free`"),
        ({"final_temperature": 0.5, "anneal_steps": 0}, "anneal_steps must be at least 1, got 0"),
    ],
)
def test_wrong_knobs(knobs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DiffRO(**knobs)


def test_tasks_that_the_model_does_not_have():
    with pytest.raises(ValueError, match="expected reward tasks among asr, ctc, mood, mos, got age"):
        run(DiffRO(tasks=("asr", "age")), spoken_step(LENGTHS, rich=True))
    assert [one.name for one in ATTRIBUTES] == ["mood", "mos", "age"]


def test_totals_are_of_the_whole_step():
    step = spoken_step(LENGTHS)
    half = Totals(2 * len(LENGTHS), 2 * step.batch.totals.tokens, 2, 2)
    twice = replace(step, batch=replace(step.batch, totals=half))
    assert run(DiffRO(), twice).loss.item() == pytest.approx(run(DiffRO(), step).loss.item() / 2, rel=1e-5)


def test_the_reward_model_must_fit_before_anything_is_trained():
    policy = SimpleNamespace(layout=LAYOUT)
    wider = RewardModel(sizes=RewardSizes(CODES + 1, "あ", **REWARD_SIZES))
    for objective, reward, message in (
        (DiffRO(), wider, f"the {CODES} speech tokens of model.policy, got {CODES + 1} of them"),
        (DiffRO(tasks=("asr", "emotion")), make_reward(), "model.reward's asr, ctc, mood, mos, age, got emotion"),
    ):
        with pytest.raises(ValueError, match=message):
            objective.bind(cast("Any", policy), Parts({Part.REWARD: reward}))


def test_the_histogram_leaves_out_what_has_no_label():
    found = run(DiffRO(tasks=("asr", "mood")), spoken_step((4, 2, 6), rich=True)).metrics
    assert found["saturated"].count.item() == 5  # three texts, two moods
    assert sum(found[f"reward_bin{number}"].total.item() for number in range(5)) == 5
