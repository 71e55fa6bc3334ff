# SPDX-License-Identifier: Apache-2.0
"""What holds of every plan, whatever the lengths, knobs, ranks and micro-batches."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from tts_align.data.plan import Plan

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=120).map(np.asarray)
knobs = st.one_of(
    st.builds(dict, rows_per_step=st.integers(1, 20)), st.builds(dict, tokens_per_step=st.integers(1, 900))
)
fixed = settings(max_examples=40, deadline=None, derandomize=True)


@fixed
@given(lengths, knobs, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 3))
def test_invariants(tokens: Any, knobs: Any, bucket: int, seed: int, epoch: int, world: int, accumulate: int):
    plan = Plan(tokens, bucket_steps=bucket, seed=seed, **knobs)
    steps = plan.steps(epoch)
    assert len(steps) == plan.steps_per_epoch
    assert sorted(np.concatenate(steps)) == list(range(len(tokens)))  # every item exactly once
    again = Plan(tokens, bucket_steps=bucket, seed=seed, **knobs).steps(epoch)
    assert all((one == other).all() for one, other in zip(steps, again, strict=True))
    for items in steps:
        assert len(items) > 0
        if len(items) < world * accumulate:
            continue
        dealt = plan.deal(items, world, accumulate)
        assert len(dealt) == accumulate
        assert all(len(ranks) == world for ranks in dealt)
        assert all(len(mine) for ranks in dealt for mine in ranks)
        # Which items a step holds does not depend on the cut.
        assert sorted(np.concatenate([mine for ranks in dealt for mine in ranks])) == sorted(items)


@fixed
@given(lengths, st.integers(1, 20), st.integers(1, 9))
def test_steps_of_equal_rows_are_as_large_as_asked(tokens: Any, rows: int, bucket: int):
    sizes = [len(items) for items in Plan(tokens, rows_per_step=rows, bucket_steps=bucket).steps(0)]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(rows, len(tokens))
    if len(tokens) % rows == 0:
        assert set(sizes) == {rows}


@fixed
@given(lengths, st.integers(1, 900), st.integers(1, 3), st.integers(1, 3))
def test_check_finds_before_training_what_would_fail_in_it(tokens: Any, budget: int, world: int, accumulate: int):
    plan = Plan(tokens, tokens_per_step=budget)
    try:
        plan.check(world, accumulate)
    except ValueError:
        return
    for epoch in range(5):
        for items in plan.steps(epoch):
            plan.deal(items, world, accumulate)


@given(
    tokens=st.lists(st.integers(1, 5), min_size=1, max_size=200),
    bucket=st.integers(1, 9),
    shuffle=st.booleans(),
    count=st.integers(1, 60),
)
def test_the_fullest_steps_are_those_of_all_in_order(tokens: Any, bucket: int, shuffle: bool, count: int):
    plan = Plan(np.array(tokens), 1, rows_per_step=3, bucket_steps=bucket, shuffle=shuffle)
    expected = sorted(plan.steps(0), key=lambda items: -sum(tokens[item] for item in items))[:count]
    assert [one.tolist() for one in plan.fullest(count)] == [one.tolist() for one in expected]
    assert plan.largest(1, 1) == max(sum(tokens[item] for item in items) for items in expected)


def test_steps_of_tokens_are_about_as_large_as_asked():
    tokens = np.random.default_rng(0).integers(10, 100, 1000)
    sums = [tokens[items].sum() for items in Plan(tokens, tokens_per_step=1000).steps(0)]
    assert max(sums) - min(sums) <= 200
    assert abs(np.mean(sums) - 1000) < 50


def padding(plan: Plan, world: int, accumulate: int) -> float:
    padded = useful = 0
    for items in plan.steps(0):
        for ranks in plan.deal(items, world, accumulate):
            for mine in ranks:
                padded += plan.tokens[mine].max() * len(mine)
                useful += plan.tokens[mine].sum()
    return padded / useful


def test_buckets_save_padding_and_ranks_are_balanced():
    tokens = np.random.default_rng(0).integers(30, 300, 4000)
    assert padding(Plan(tokens, rows_per_step=64, bucket_steps=1), 1, 1) > 1.6
    assert padding(Plan(tokens, rows_per_step=64, bucket_steps=8), 1, 1) < 1.25
    assert padding(Plan(tokens, rows_per_step=64, bucket_steps=8), 2, 4) < 1.1
    plan = Plan(tokens, rows_per_step=64)
    loads = [[tokens[mine].sum() for mine in ranks] for ranks in plan.deal(plan.steps(0)[0], 4, 1)]
    assert max(loads[0]) / np.mean(loads[0]) < 1.06


def test_every_epoch_mixes_anew():
    plan = Plan(np.random.default_rng(0).integers(30, 300, 640), rows_per_step=32)
    together = [{frozenset(items.tolist()) for items in plan.steps(epoch)} for epoch in (0, 1)]
    assert not together[0] & together[1]
    assert [items.tolist() for items in Plan(plan.tokens, rows_per_step=32, shuffle=False).steps(1)] == [
        items.tolist() for items in Plan(plan.tokens, rows_per_step=32, shuffle=False).steps(0)
    ]


def test_even_a_short_epoch_is_shuffled():
    plan = Plan(np.arange(1, 33), rows_per_step=8, bucket_steps=100)
    assert len({frozenset(items.tolist()) for epoch in range(8) for items in plan.steps(epoch)}) == 32


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "exactly one of rows_per_step and tokens_per_step"),
        ({"rows_per_step": 2, "tokens_per_step": 9}, "exactly one"),
        ({"rows_per_step": 0}, "rows_per_step must be at least 1"),
        ({"rows_per_step": 3, "rows_per_item": 2}, "must be even, a pair is two rows; got 3"),
        ({"rows_per_step": 2, "bucket_steps": 0}, "bucket_steps must be at least 1"),
    ],
)
def test_knobs_that_cannot_work_are_refused(knobs: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Plan(np.ones(9, np.int64), **knobs)


def test_too_many_micro_batches_are_refused():
    plan = Plan(np.ones(64, np.int64), rows_per_step=8)
    with pytest.raises(
        ValueError, match=r"8 rows cannot be dealt to 3 devices x 3 micro-batches .*rows_per_step, now 8"
    ):
        plan.check(3, 3)
    with pytest.raises(ValueError, match="cannot be dealt"):
        plan.deal(np.arange(8), 3, 3)
