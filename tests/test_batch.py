# SPDX-License-Identifier: Apache-2.0
"""The records: they check themselves, move as one, and never take a mean of means."""

import dataclasses

import pytest
import torch

from tts_align.batch import Batch, Mean, Rows, Scored, Totals
from tts_align.models.base.layout import Layout, TokenRow, collate

LAYOUT = Layout("cosyvoice2", codebook_size=10)
TOTALS = Totals(2, 6, 1, 3)


def make_rows() -> Rows:
    return collate([TokenRow((1, 2), (3, 4)), TokenRow((1,), (5,))], LAYOUT)


def make_batch() -> Batch:
    return Batch(make_rows(), torch.tensor([True, False]), TOTALS, (make_rows(), make_rows()))


def tensors(record: object) -> list[torch.Tensor]:
    found = []
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, torch.Tensor):
                found.append(one)
            elif dataclasses.is_dataclass(one) and not isinstance(one, Totals):
                found += tensors(one)
    return found


def test_a_batch_moves_as_one():
    batch = make_batch()
    moved = batch.to("meta")
    assert len(tensors(batch)) == 3 * 10 + 1  # three sets of rows, and the labels
    assert {value.device.type for value in tensors(moved)} == {"meta"}
    assert {value.device.type for value in tensors(batch)} == {"cpu"}
    assert (moved.totals, moved.first, moved.rows.keys) == (batch.totals, batch.first, batch.rows.keys)


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_batch().first = False  # type: ignore[misc]


def test_rows_and_keys_belong_together():
    with pytest.raises(ValueError, match="one key for each of the 2 rows, got 1"):
        dataclasses.replace(make_rows(), keys=("a",))


def test_rows_and_labels_belong_together():
    with pytest.raises(ValueError, match="one label for each of the 2 rows, got 3"):
        Batch(make_rows(), torch.tensor([True, False, True]), TOTALS)


def test_sums_are_over_targets():
    rows = make_rows()
    scored = Scored(rows.scatter(torch.arange(1.0, 6.0)), rows.mask)
    assert scored.sums().tolist() == [1 + 2 + 3, 4 + 5]
    assert rows.count == 2


def test_scatter_lets_the_gradient_through():
    values = torch.zeros(5, requires_grad=True)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]])  # the last one is padding
    (make_rows().scatter(values) * weight).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 2, 3, 4, 5]


def test_a_mean_is_its_parts():
    """Means of 3 and of 1 value: together (1 + 2 + 6 + 7) / 4 = 4, where the mean of means would be 5."""
    one, other = Mean.of(torch.tensor([1.0, 2.0, 6.0])), Mean.of(torch.tensor([7.0]))
    assert Mean(one.total + other.total, one.count + other.count).value.item() == 4
    assert (one.value.item() + other.value.item()) / 2 == 5


def test_a_mean_of_nothing_is_0():
    nothing = Mean.of(torch.tensor([1.0, torch.nan]), torch.tensor([False, False]))
    assert (nothing.total.item(), nothing.count.item(), nothing.value.item()) == (0, 0, 0)
    assert Mean.of(torch.zeros(0)).value.item() == 0


def test_a_mean_carries_no_gradient_and_is_of_full_precision():
    mean = Mean.of(torch.ones(3, dtype=torch.bfloat16, requires_grad=True))
    assert not mean.total.requires_grad
    assert mean.total.dtype == mean.count.dtype == torch.float32
