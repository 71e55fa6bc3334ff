# SPDX-License-Identifier: Apache-2.0
"""A training that changes nothing says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, gap, make_reward, make_trainer, weights

from tts_align.models.base.layout import collate
from tts_align.objectives import KTO, MTR, SFT
from tts_align.training.callbacks.movement import Movement

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")]


def fit(tmp_path: Path, policy: Path, rows: str, *callbacks: Any, objective: Any = None, lr: float = 1e-6, **more: Any):
    module, data = build(
        objective or KTO(),
        policy,
        rows,
        tmp_path / "cache",
        lr=lr,
        optimizer=torch.optim.AdamW,
        rows_per_step=4,
        **more,
    )
    trainer = make_trainer(tmp_path, *callbacks)
    trainer.fit(module, datamodule=data)
    return module, trainer


def test_steps_that_change_nothing_are_noticed(
    tmp_path: Path, tiny_policy: Path, tiny_rows: str, caplog: Any, capsys: Any
):
    """Measured apart: the same rows scored by hand before and after."""
    before, data = build(KTO(), tiny_policy, tiny_rows, tmp_path / "cache")
    data.prepare(before.policy, before.rows_wanted)
    watch = Movement(rows=10**6)
    module, trainer = fit(tmp_path, tiny_policy, tiny_rows, watch)
    assert "4 optimiser steps of AdamW at learning rate 1e-06: they move a weight by about 4e-06 at most" in (
        capsys.readouterr().out
    )
    assert "the policy has hardly changed" in caplog.text
    assert "train longer (trainer.max_epochs), or raise the learning rate" in caplog.text
    layout, changes = before.policy.layout, []
    with torch.no_grad():
        for row in trainer.datamodule.rows("train").values():
            batch = collate([row], layout)
            old, new = (one.policy.eval()(batch).logp[batch.mask] for one in (before, module))
            changes += (new - old).abs().tolist()
    assert watch.moved == pytest.approx(sum(changes) / len(changes), rel=0.05)
    assert 0 < watch.moved < 1e-3


def test_steps_that_change_something_are_not(tmp_path: Path, tiny_policy: Path, tiny_rows: str, caplog: Any):
    watch = Movement()
    _, trainer = fit(tmp_path, tiny_policy, tiny_rows, watch, lr=1e-2)
    assert watch.moved > 0.05
    assert trainer.callback_metrics["train/moved_nats"] == pytest.approx(watch.moved)
    assert "hardly changed" not in caplog.text


def test_watching_does_not_disturb_the_training(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    watched, _ = fit(tmp_path, tiny_policy, tiny_rows, Movement(), lr=1e-2)
    alone, _ = fit(tmp_path, tiny_policy, tiny_rows, lr=1e-2)
    assert gap(weights(watched), weights(alone)) == 0
    assert watched.policy.training


def test_a_resumed_run_compares_with_the_same_start(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    first = Movement()
    _, trainer = fit(tmp_path, tiny_policy, tiny_rows, first, lr=1e-2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    kept = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["Movement"]
    again = Movement()
    again.load_state_dict(kept)
    assert again.before == first.before
    assert again.before


def test_other_optimisers_promise_nothing(tmp_path: Path, tiny_policy: Path, tiny_rows: str, capsys: Any):
    module, data = build(SFT(), tiny_policy, tiny_rows, tmp_path / "cache", lr=0.5, rows_per_step=4)
    make_trainer(tmp_path, Movement()).fit(module, datamodule=data)
    assert "2 optimiser steps of SGD at learning rate 0.5\n" in capsys.readouterr().out


def test_nothing_is_said_of_a_policy_that_does_not_train(
    tmp_path: Path, tiny_policy: Path, tiny_rows: str, capsys: Any
):
    watch = Movement()
    fit(tmp_path, tiny_policy, tiny_rows, watch, objective=MTR(), parts={"reward": make_reward()})
    assert "optimiser steps of" not in capsys.readouterr().out
    assert watch.moved is None


def test_wrong_knobs():
    with pytest.raises(ValueError, match=r"rows must be at least 1 and noise_nats not negative, got 0 and 0.01"):
        Movement(rows=0)
