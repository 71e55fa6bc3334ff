# SPDX-License-Identifier: Apache-2.0
"""What every objective has in common: registry, facts, shares of a step."""

import pytest
import torch
from steps import make_step, slow_anchor

from tts_align.batch import Totals
from tts_align.objectives import DPO, KTO, SFT, TKTO, Objective, Outcome, Part, Step


def test_the_registry_holds_the_built_in_ones():
    assert Objective.registry.items() >= {"sft": SFT, "dpo": DPO, "kto": KTO, "tkto": TKTO}.items()


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match=r"objective name 'kto' is taken by tts_align\.objectives\.kto\.KTO"):

        class Other(Objective, name="kto"):
            def forward(self, step: Step) -> Outcome:
                raise NotImplementedError

    assert Objective.registry["kto"] is KTO


def test_training_a_part_that_is_not_needed_is_refused():
    with pytest.raises(TypeError, match="trains reward, which it does not list"):

        class Greedy(Objective):
            trains = frozenset({Part.REWARD})


def test_without_a_reference_there_is_no_log_ratio():
    step = make_step((True, False, True, False))
    with pytest.raises(ValueError, match=r"add Part\.REFERENCE"):
        _ = Step(step.batch, step.policy).log_ratio


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [
        ([1.0, 2.0, 3.0, 6.0], None, 12 / 8),  # rows: over all rows of the step
        ([1.0, 3.0], None, 4 / 4),  # pairs: over all pairs of the step
        ([1.0, 3.0], 16, 4 / 16),
        ([5.0], 0, 5.0),  # a step without any: no division by zero
    ],
)
def test_shares(values: list[float], count: int | None, expected: float):
    step = make_step((True, True, False, False), totals=Totals(8, 30, 4, 15))
    assert step.mean(torch.tensor(values), count).item() == pytest.approx(expected)


def test_shares_of_the_micro_batches_add_up_to_the_mean():
    whole = make_step((True, False, True, False))
    totals = whole.batch.totals
    # A share does not depend on what else is in the micro-batch, only on the totals.
    values = torch.tensor([1.0, 5.0, 2.0, 4.0])
    one, other = (make_step((True, False), (3, 1), totals=totals) for _ in range(2))
    assert one.mean(values[:1]) + one.mean(values[1:2]) + other.mean(values[2:]) != 3  # one value alone is a pair
    assert (one.mean(values[:2]) + other.mean(values[2:])).item() == pytest.approx(3.0)


def test_the_anchor_reads_desirable_rows_only():
    step = make_step((True, False, True, False))
    assert step.cross_entropy().item() == pytest.approx(slow_anchor(step), abs=1e-6)
    none = make_step((False,) * 4)
    assert none.cross_entropy().item() == 0


def test_sides_are_means_over_tokens():
    step = make_step((True, False, True, False))
    sides = step.sides("x", torch.arange(24.0).view(4, 6))
    assert (sides["desirable_x"].total.item(), sides["desirable_x"].count.item()) == (
        0 + 1 + 2 + 3 + sum(range(12, 18)),
        10,
    )
    assert (sides["undesirable_x"].total.item(), sides["undesirable_x"].count.item()) == (6 + 7 + 18 + 19 + 20, 5)
