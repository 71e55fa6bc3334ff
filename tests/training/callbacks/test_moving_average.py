# SPDX-License-Identifier: Apache-2.0
"""The average is that of the formula, written out slowly; it survives a kill, and the training ends with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from tiny import gap, weights
from told import Notes, fit

from tts_align.training.callbacks.moving_average import MovingAverage, kept_share, moved

pytestmark = [
    pytest.mark.whole_runs,
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
]


def slowly(start: dict[str, Any], steps: dict[int, dict[str, Any]], decay: float) -> dict[str, Any]:
    """Every number by itself, in float64."""
    means = {name: value.double() for name, value in start.items()}
    for step in sorted(steps):
        share = min(decay, (1 + step) / (10 + step))
        means = {name: share * mean + (1 - share) * steps[step][name].double() for name, mean in means.items()}
    return means


def start_of(notes: Notes, place: Path, tiny_policy: Path, tiny_rows: str) -> dict[str, Any]:
    module, _ = fit(place, tiny_policy, tiny_rows, notes, max_steps=0)
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_the_training_ends_with_the_average(decay: float, tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    notes = Notes(tmp_path)
    start = start_of(notes, tmp_path / "start", tiny_policy, tiny_rows)
    module, trainer = fit(tmp_path, tiny_policy, tiny_rows, notes, MovingAverage(decay), every=1)
    assert trainer.global_step == 4
    expected = slowly(start, notes.weights, decay)
    assert gap(weights(module), expected) < 1e-6
    if decay == 0.0:
        assert gap(weights(module), notes.weights[4]) == 0
    else:
        assert gap(weights(module), notes.weights[4]) > 1e-4
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert gap(saved, weights(module)) == 0


def test_killed_and_resumed_it_is_the_same(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    whole, _ = fit(tmp_path / "whole", tiny_policy, tiny_rows, MovingAverage(0.5), every=1)
    with pytest.raises(SystemExit):
        fit(tmp_path, tiny_policy, tiny_rows, MovingAverage(0.5), Notes(tmp_path, die_at=3), every=2)
    last = tmp_path / "checkpoints/last.ckpt"
    module, trainer = fit(tmp_path, tiny_policy, tiny_rows, MovingAverage(0.5), every=2, ckpt_path=last)
    assert trainer.global_step == 4
    assert gap(weights(module), weights(whole)) == 0


def test_gradients_that_accumulate_are_one_step(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    notes = Notes(tmp_path, stop_at=-1, die_at=-1)
    start = start_of(notes, tmp_path / "start", tiny_policy, tiny_rows)
    module, _ = fit(tmp_path, tiny_policy, tiny_rows, notes, MovingAverage(0.5), accumulate_grad_batches=2, max_steps=2)
    steps = {step: value for step, value in notes.weights.items() if step}
    assert gap(weights(module), slowly(start, steps, 0.5)) < 1e-6


def test_stopped_early_the_last_weights_stay(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    notes = Notes(tmp_path, stop_at=2)
    module, trainer = fit(tmp_path, tiny_policy, tiny_rows, notes, MovingAverage(0.5))
    assert trainer.global_step == 2
    assert gap(weights(module), notes.weights[2]) == 0


def test_what_cannot_be_averaged_is_refused(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="decay must be at least 0 and less than 1"):
            MovingAverage(decay)
    with pytest.raises(ValueError, match=r"parts must name a model, such as \[policy\]"):
        MovingAverage(parts=[])
    with pytest.raises(ValueError, match="there is no part flow to average; there are policy"):
        fit(tmp_path, tiny_policy, tiny_rows, MovingAverage(parts=["flow"]))


def test_where_nothing_is_trained_it_says_so(
    tmp_path: Path, tiny_policy: Path, tiny_rows: str, caplog: pytest.LogCaptureFixture
):
    """As in a stage that trains the tokenizer by the reward model alone: no fault, but no silence either."""

    class Frozen(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.policy.requires_grad_(False)

    average = MovingAverage()
    with pytest.raises(ValueError, match="the loss of SFT depends on no weight that trains"):
        fit(tmp_path, tiny_policy, tiny_rows, Frozen(), average)
    assert "nothing of policy is trained here, so it averages nothing" in caplog.text
    assert average.average == {}


@given(st.floats(0, 0.999), st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20))
def test_it_lies_between_the_lowest_and_the_highest(decay: float, values: list[float]):
    average = {"a": torch.tensor([values[0]])}
    for step, value in enumerate(values, 1):
        average = moved(average, {"a": torch.tensor([value])}, kept_share(decay, step))
    assert min(values) - 1e-5 <= average["a"].item() <= max(values) + 1e-5
