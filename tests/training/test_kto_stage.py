# SPDX-License-Identifier: Apache-2.0
"""z₀ of KTO belongs to the stage it was computed in."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import build, gap, make_rows, make_trainer, save_rows, weights

from tts_align.batch import Batch, Mean
from tts_align.objectives import KTO


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
def test_each_step_of_a_validation_has_its_own(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    """z₀ of a validation is computed again for every step, as that of the training is."""
    module, data = build(
        KTO(beta=1.0), tiny_policy, tiny_rows, tmp_path / "cache", rows_per_step=4, validation=tiny_rows
    )
    compute, seen = module.scoring.mismatched, {True: [], False: []}

    def noted(batch: Batch) -> Mean:
        found = compute(batch)
        seen[module.policy.training].append(float(found.value))
        return found

    module.scoring.mismatched = noted  # type: ignore[method-assign]
    make_trainer(tmp_path).fit(module, datamodule=data)
    for values in (seen[True][1:], seen[False]):  # the policy is still its reference in the first step
        assert len(set(values)) == len(values) > 1


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
def test_validation_inside_an_accumulation_window_changes_no_training_step(
    tmp_path: Path, tiny_policy: Path, tiny_rows: str
):
    """Validated after every micro-batch of two, the training learns the same as without a validation."""
    held_out = save_rows(tmp_path, make_rows(sentences=3, seed=5), "held_out.jsonl")

    def learnt(**options) -> dict:
        module, data = build(
            KTO(beta=1.0), tiny_policy, tiny_rows, tmp_path / "cache", rows_per_step=4, validation=held_out
        )
        make_trainer(tmp_path, accumulate_grad_batches=2, **options).fit(module, datamodule=data)
        return weights(module)

    assert gap(learnt(val_check_interval=1), learnt(limit_val_batches=0)) == 0
