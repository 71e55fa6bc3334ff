# SPDX-License-Identifier: Apache-2.0
"""The reward model's own objective, task by task, against the model's scores and plain formulas."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from spoken import KNOWN, make_reward, spoken_step
from tiny import REWARD_SIZES, SIZES
from torch import Tensor
from torch.nn import functional

from tts_align.batch import Reads, Totals
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.models.reward.model import RewardModel, RewardSizes
from tts_align.objectives import MTR, Outcome, Part, Parts
from tts_align.objectives.base import Step

LENGTHS = (4, 2, 6, 3)
HEARD = ("あい", None, "", "うえい")


def make_step(model: RewardModel | None = None, only: Any = None) -> Step:
    """Rows with attributes and transcripts, some of them unknown; totals are of all four."""
    step = spoken_step(LENGTHS, rich=True, only=only, reward=model or make_reward(dropout=0.0))
    said = step.utterances
    heard = HEARD if only is None else tuple(HEARD[row] for row in only)
    labels = Counter(name for row in KNOWN for name in row)
    labels["text"] = sum(text is not None for text in HEARD)
    letters = sum(len(text) + 1 for text in HEARD if text is not None)
    totals = Totals(4, 19, 2, 12, labels=dict(labels), letters=letters)
    return replace(step, batch=replace(step.batch, totals=totals, utterances=replace(said, transcripts=heard)))


def run(objective: MTR, step: Step) -> Outcome:
    return objective(step)


def reward_of(step: Step) -> RewardModel:
    model = step.parts[Part.REWARD]
    assert isinstance(model, RewardModel)
    return model


def test_facts():
    assert MTR.needs == MTR.trains == {Part.REWARD}
    assert MTR.reads is Reads.ANY
    assert MTR.wants_utterances
    assert not MTR.scores
    assert not MTR.wants_logits


def expected(step: Step) -> dict[str, float]:
    """Loss of each task: text per row that has one, classes and scores per row, numbers squared."""
    model, said = reward_of(step), step.utterances
    labels = model.encode_labels(said.transcripts, said.attributes)
    with torch.no_grad():
        hidden = model.encode(model.embed(said.speech), said.mask)
        scores = model.score(said.speech, said.mask, labels)
        logits = model.attributes(hidden, said.mask)
    mood = torch.tensor([0, 1, 1])
    mos = torch.tensor([1, 3, 0])
    return {
        "asr": -scores["asr"].total.sum().item() / 3,
        "ctc": -scores["ctc"].total.sum().item() / 3,
        "mood": functional.cross_entropy(logits["mood"][[0, 1, 3]], mood).item(),
        "mos": functional.cross_entropy(logits["mos"][[0, 1, 2]], mos).item(),
        "age": ((logits["age"][1, 0] - (20.0 - 40.0) / 10.0) ** 2).item(),
    }


def test_each_task_by_its_formula():
    step = make_step()
    for name, value in expected(step).items():
        others = dict.fromkeys(set(reward_of(step).tasks) - {name}, 0.0)
        assert run(MTR(others), step).loss.item() == pytest.approx(value, rel=1e-5), name
    weights = {"asr": 2.0, "mood": 0.5}
    found = run(MTR(weights), step)
    whole = sum(weights.get(name, 1.0) * value for name, value in expected(step).items())
    assert found.loss.item() == pytest.approx(whole, rel=1e-5)
    assert found.metrics.keys() == {"asr", "ctc", "mood", "mos", "age"}


def test_it_learns_what_was_heard_not_what_was_wanted():
    step = make_step()
    said = step.utterances
    other = replace(step, batch=replace(step.batch, utterances=replace(said, target_texts=("え",) * 4)))
    assert run(MTR(), other).loss == run(MTR(), step).loss
    other = replace(step, batch=replace(step.batch, utterances=replace(said, transcripts=("え",) * 4)))
    assert run(MTR(), other).loss != run(MTR(), step).loss


def pull(objective: MTR, step: Step) -> list[Tensor]:
    values = [value.requires_grad_() for value in reward_of(step).parameters()]
    return list(torch.autograd.grad(run(objective, step).loss, values, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("knobs", [{}, {"label_smoothing": 0.1, "adversarial": 0.5}])
def test_the_cut_into_micro_batches_changes_nothing(knobs: dict[str, float]):
    model, objective = make_reward(dropout=0.0), MTR(**knobs)
    whole = pull(objective, make_step(model))
    parts = [pull(objective, make_step(model, rows)) for rows in ([0, 3], [1], [2])]
    for one, others in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(sum(others), one, rtol=1e-3, atol=1e-6)


def test_regularisers_work_in_training_only():
    step, objective = make_step(), MTR(label_smoothing=0.2)
    smoothed = run(objective, step).loss
    assert run(objective.eval(), step).loss != smoothed
    assert run(objective, step).loss == run(MTR(), step).loss


def test_a_step_in_which_nothing_is_known():
    step = make_step(only=[1])
    said = replace(step.utterances, attributes=({},))
    found = run(MTR(), replace(step, batch=replace(step.batch, utterances=said)))
    assert found.loss.item() == 0
    assert found.loss.isfinite()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"weights": {"asr": -1.0}}, "asr must not be negative, got -1.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"mixup": -0.1}, "mixup and adversarial must not be negative"),
        ({"radius": 0.1}, "radius has no effect without adversarial"),
    ],
)
def test_wrong_knobs(knobs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MTR(**knobs)


def test_weights_of_unknown_tasks():
    with pytest.raises(ValueError, match="weights of place have no effect: the tasks are asr, ctc, mood, mos, age"):
        run(MTR({"place": 1.0}), make_step())


def test_a_reward_model_of_other_codes_is_refused() -> None:
    reward = RewardModel(sizes=RewardSizes(7, "ab", **REWARD_SIZES))
    policy = Qwen2CodecLM(sizes=dataclasses.replace(SIZES, codebook_size=9))
    with pytest.raises(ValueError, match=r"must read the 9 speech tokens of model\.policy, got 7"):
        MTR().bind(policy, Parts({Part.REWARD: reward}))
