# SPDX-License-Identifier: Apache-2.0
"""How DiffRO's recipe was chosen: the variants do what they say, and the choice follows its rule."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from places import BENCHMARKS
from spoken import make_reward, spoken_step
from torch import Tensor

from tts_align.evaluation.report import JudgedUtterance
from tts_align.objectives import DiffRO, Parts
from tts_align.objectives.base import Objective, Step

pytestmark = pytest.mark.whole_runs

LENGTHS = (4, 3, 6)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def variants(load: Any) -> ModuleType:
    return load("diffro_variants")


def gradient(objective: Objective, step: Step) -> Tensor:
    """Of the logits, a row of numbers for each target."""
    assert step.policy.logits is not None
    return torch.autograd.grad(objective(step).loss, step.policy.logits)[0]


def by_row(step: Step, flat: Tensor) -> tuple[Tensor, ...]:
    """Of each row its targets."""
    return flat.split([int(count) for count in step.policy.mask.sum(-1)])


@pytest.mark.parametrize("knobs", [{}, {"resample": False, "sft_weight": 3.0}, {"tasks": ("asr", "ctc")}])
def test_a_variant_without_a_restriction_is_diffro(knobs: dict[str, Any], variants: ModuleType):
    mine, theirs = (gradient(kind(**knobs), spoken_step(LENGTHS)) for kind in (variants.Variant, DiffRO))
    # Speech tokens are looked up there and multiplied here: the same sums in another order.
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


def test_only_rows_that_count_feel_the_reward(variants: ModuleType):
    """With β 0 the others have no gradient at all, and those that count have the one they have anyway."""
    step = spoken_step(LENGTHS)
    whole = by_row(step, gradient(DiffRO(beta=0.0), spoken_step(LENGTHS)))
    assert step.batch.desirable.unique().tolist() == [False, True]
    found = by_row(step, gradient(variants.Variant("labelled", beta=0.0), step))
    for one, other, counts in zip(found, whole, step.batch.desirable.tolist(), strict=True):
        torch.testing.assert_close(one, other if counts else torch.zeros_like(other))
    step = spoken_step(LENGTHS)
    model = step.parts.reward
    found = by_row(step, gradient(variants.Variant("above_mean", resample=False, beta=0.0), step))
    labels = model.encode_labels(step.utterances.target_texts, step.utterances.attributes)
    rewards = model.score(step.utterances.speech, step.utterances.mask, labels, ("asr",)).reward()
    assert [bool(row.abs().sum() > 0) for row in found] == (rewards > rewards.mean()).tolist()


def test_the_divergence_counts_at_some_tokens_only(variants: ModuleType):
    """The mean over those that are left, from the divergence of each token and the reward's gradient at each."""
    step = spoken_step(LENGTHS, dtype=torch.float64)
    model, said = step.parts.reward, step.utterances
    labels = model.encode_labels(said.target_texts, said.attributes)
    asked = model.embed(said.speech).detach().requires_grad_()
    (pull,) = torch.autograd.grad(model.score_embedded(asked, said.mask, labels, ("asr",)).reward().sum(), asked)
    sizes = [row[mask].norm(dim=-1) for row, mask in zip(pull, said.mask, strict=True)]
    kl = by_row(step, step.exact_kl().detach())
    # End-of-speech, the last target of a row, is no speech token: the reward asks nothing of it.
    quiet = [torch.cat([one <= one.median(), torch.tensor([True])]) for one in sizes]
    desirable = [torch.full((len(one),), bool(good)) for one, good in zip(kl, step.batch.desirable, strict=True)]
    for name, counts in (("quiet", quiet), ("desirable", desirable)):
        expected = torch.cat([one[count] for one, count in zip(kl, counts, strict=True)]).mean()
        with_it, without = (
            variants.Variant(restricted=name, beta=beta, resample=False)(spoken_step(LENGTHS, dtype=torch.float64)).loss
            for beta in (1.0, 0.0)
        )
        assert (with_it - without).item() == pytest.approx(expected.item(), rel=1e-6), name


@pytest.mark.parametrize("pessimistic", [False, True])
def test_an_ensemble_scores_as_its_members_together(pessimistic: bool, variants: ModuleType):
    step, members = spoken_step(LENGTHS, rich=True), [make_reward(seed) for seed in (0, 1, 2)]
    tasks, said = ("asr", "ctc"), step.utterances
    labels = members[0].encode_labels(said.target_texts, said.attributes)
    scored = [member.score(said.speech, said.mask, labels, tasks) for member in members]
    found = variants.Ensemble(members, pessimistic).score(said.speech, said.mask, labels, tasks)
    for task in tasks:
        totals = torch.stack([one[task].total for one in scored])
        torch.testing.assert_close(found[task].total, totals.amin(0) if pessimistic else totals.mean(0))
    alone = replace(spoken_step(LENGTHS, rich=True, reward=members[0]))
    twice = replace(alone, parts=Parts({"reward": variants.Ensemble([members[0], members[0]], pessimistic)}))
    assert DiffRO()(twice).loss.item() == pytest.approx(DiffRO()(alone).loss.item(), rel=1e-6)


def test_the_most_accurate_setting_that_stays_clear_comes_first(load: Any):
    recipe = load("diffro_recipe")
    looked = {
        recipe.Setting(anchor=anchor): [{"accuracy": accuracy, "nearest_cer_added": added} for added in both]
        for anchor, accuracy, both in (
            (1.0, 0.99, (0.001, 0.005)),  # clear on one seed, not in the mean
            (2.0, 0.95, (0.001, 0.002)),
            (3.0, 0.96, (0.0005, 0.0025)),
            (4.0, 0.99, (0.009, 0.009)),
        )
    }
    assert [one.anchor for one in recipe.ranked(looked)] == [3.0, 2.0, 1.0, 4.0]


def test_settings_have_names_and_words_of_their_own(load: Any):
    recipe = load("diffro_recipe")
    assert len({one.name() for one in recipe.TRIED}) == len({one.words() for one in recipe.TRIED}) == len(recipe.TRIED)
    assert recipe.ASR.words() == "attention decoder, lr 0.001, anchor 3, 3 epochs"


def heard(recipe: ModuleType, errors: list[float]) -> list[JudgedUtterance]:
    return [
        JudgedUtterance.from_row(
            {
                **{"id": f"s{number}-a-0", "sentence": f"s{number}", "text": "あ", "speaker": "a", "system": "base"},
                **{"seed": 0, "speech": [1], "finished": True, "transcript": "あ", "reading": "right", "cer": error},
                **{"nearest_cer": error, "margin": 1.0, "audio": "", "error": ""},
            }
        )
        for number, error in enumerate(errors)
    ]


def test_differences_are_pooled_over_seeds(load: Any):
    recipe = load("diffro_recipe")
    first, second = (
        [heard(recipe, [0.0, 0.2]), heard(recipe, [0.4, 0.0])],
        [heard(recipe, [0.1, 0.2]), heard(recipe, [0.4, 0.4])],
    )
    found = recipe.pooled(first, second)
    assert found["cer"]["value"] == pytest.approx((0.1 + 0.0 + 0.0 + 0.4) / 4)
    assert found["cer"]["n"] == 4
    assert found["cer"]["low"] == pytest.approx(0.05)  # only the first sentence, which both seeds have
    assert found["cer"]["high"] == pytest.approx(0.2)
    assert found["accuracy"]["value"] == 0
