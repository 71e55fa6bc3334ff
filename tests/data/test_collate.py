# SPDX-License-Identifier: Apache-2.0
"""Micro-batches against a slow count by hand, for pairs and labelled rows, any ranks and cuts."""

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from letters import Letters, make_rows

from tts_align.batch import Reads
from tts_align.data.collate import Examples, MicroBatches, PlanSampler, row_seed
from tts_align.data.plan import Plan
from tts_align.data.select import select
from tts_align.models.base.layout import Layout, TokenRow


def build(reads: Reads, count: int = 40, seed: int = 0, **options: Any) -> tuple[Examples, Letters]:
    policy = Letters()
    items = select(make_rows(count, 8, seed), reads, seed=seed)
    return Examples.of(items, policy, mismatched=True, seed=seed, **options), policy


def sampler(examples: Examples, policy: Letters, **options: Any) -> PlanSampler:
    plan = Plan(examples.tokens(policy.layout), examples.items.shape[1], rows_per_step=12)
    assert examples.targets.tolist() == [len(policy.layout.arrange(row).target) for row in examples.rows]
    return PlanSampler(plan, examples, **options)


@pytest.mark.parametrize("reads", [Reads.LABELLED, Reads.PAIR])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(world=st.integers(1, 3), accumulate=st.integers(1, 2), seed=st.integers(0, 5), epoch=st.integers(0, 2))
def test_the_cut_changes_nothing(reads: Reads, world: int, accumulate: int, seed: int, epoch: int):
    examples, policy = build(reads, 60, seed)
    whole = sampler(examples, policy)
    ranks = [sampler(examples, policy, rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
    for one in (whole, *ranks):
        one.set_epoch(epoch)
    cut = list(zip(*ranks, strict=True))  # micro-batches that are scored at the same time
    assert len(cut) == len(ranks[0]) == accumulate * len(whole)
    for step, entire in enumerate(whole):
        micro = cut[step * accumulate : (step + 1) * accumulate]
        rows = [row for together in micro for one in together for row in one.rows]
        assert sorted(rows) == sorted(entire.rows)
        assert {one.totals for together in micro for one in together} == {entire.totals}
        twins = [row for one in micro[0] for group in one.mismatched for row in group]
        assert sorted(twins) == sorted(rows)
        assert [one.first for together in micro for one in together] == [True] * world + [False] * world * (
            accumulate - 1
        )
        assert all(len(one.mismatched) == accumulate for one in micro[0])
        assert all(one.mismatched == () for together in micro[1:] for one in together)


def test_batches_hold_what_the_manifest_says():
    examples, policy = build(Reads.LABELLED)
    data = MicroBatches(examples, policy.layout)
    for micro in sampler(examples, policy):
        batch = data[micro]
        expected = [examples.sources[row] for row in micro.rows]
        assert batch.desirable.tolist() == [source.desirable for source in expected]
        assert batch.rows.keys == tuple(policy.layout.key(examples.rows[row]) for row in micro.rows)
        targets = [[*source.sound.speech, policy.layout.end] for source in expected]
        assert batch.rows.target.tolist() == [code for target in targets for code in target]
        assert batch.totals.rows == len(expected)
        assert batch.totals.tokens == sum(map(len, targets))
        good = [target for target, source in zip(targets, expected, strict=True) if source.desirable]
        assert (batch.totals.desirable_rows, batch.totals.desirable_tokens) == (len(good), sum(map(len, good)))
        assert [twin.count for twin in batch.mismatched] == [len(expected)]


def test_pairs_come_chosen_first():
    examples, policy = build(Reads.PAIR, 60)
    data = MicroBatches(examples, policy.layout)
    for micro in sampler(examples, policy, accumulate=2):
        batch = data[micro]
        half = batch.rows.count // 2
        assert batch.desirable.tolist() == [True] * half + [False] * half
        sources = [examples.sources[row] for row in micro.rows]
        assert [s.row.sentence for s in sources[:half]] == [s.row.sentence for s in sources[half:]]


def test_mismatched_rows_keep_the_text_and_take_speech_of_another_sentence():
    examples, _ = build(Reads.LABELLED)
    texts = {row.speech: row.text[row.prefix :] for row in examples.rows}
    for row, twin in zip(examples.rows, examples.mismatched, strict=True):
        assert (twin.text, twin.prefix) == (row.text, row.prefix)
        assert texts[twin.speech] != row.text[row.prefix :]  # also not the same sentence in the other voice


def test_bistream_is_drawn_once_by_content():
    drawn = [build(Reads.LABELLED, 200, bistream_share=0.5)[0] for _ in range(2)]
    assert drawn[0].rows == drawn[1].rows
    assert drawn[0].mismatched == drawn[1].mismatched
    able = [row for row in drawn[0].rows if Letters().layout.can_bistream(replace(row, bistream=False))]
    assert 0.3 < np.mean([row.bistream for row in able]) < 0.7
    assert not any(row.bistream for row in drawn[0].rows if row not in able)
    # A row keeps its layout when others are taken away.
    fewer, _ = build(Reads.LABELLED, 100, bistream_share=0.5)
    assert set(fewer.rows) <= set(drawn[0].rows)
    assert all(row.bistream for row in build(Reads.LABELLED, 200, bistream_share=1.0)[0].rows if row in able)


def test_bistream_without_effect_is_refused():
    rows = [replace(row, speech=row.speech[:3]) for row in make_rows(20, 8)]
    with pytest.raises(ValueError, match="bistream_share has no effect"):
        Examples.of(select(rows, Reads.LABELLED), Letters(), bistream_share=0.5)


class At:
    """A training that stands at a given micro-batch."""

    def __init__(self, done: int) -> None:
        self.done = done

    def resume(self) -> None:
        pass


def test_resumed_inside_an_epoch():
    examples, policy = build(Reads.LABELLED)
    whole = [micro for epoch in (0, 1) for micro in _epoch(examples, policy, epoch)]
    for done in range(len(whole)):
        one = sampler(examples, policy, accumulate=2, progress=At(done))
        rest = list(one)
        assert rest == whole[done : done + len(rest)]
        assert len(rest) == len(one) - done % len(one)


def _epoch(examples: Examples, policy: Letters, epoch: int) -> list[Any]:
    one = sampler(examples, policy, accumulate=2)
    one.set_epoch(epoch)
    return list(one)


def test_keys_and_seeds_are_those_of_earlier_versions():
    """Caches, token weights and the draws of a row hang on them; written down before fields were renamed."""
    assert Layout("cosyvoice2", 6).key(TokenRow((1,), (2,))) == "a24ff672a5062dde4dc8a55bbc645081"
    assert row_seed("ab", 1) == 13673978051307
