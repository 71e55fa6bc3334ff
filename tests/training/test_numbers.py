# SPDX-License-Identifier: Apache-2.0
"""Numbers per token that stay in their files: the same as a dictionary of them, without its memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tts_align.batch import Rows
from tts_align.data.keyed import Keyed
from tts_align.models.base.layout import Layout, TokenRow
from tts_align.training import cache, numbers
from tts_align.training.cache import TokenCache
from tts_align.training.contrast import Spread
from tts_align.training.numbers import Columns, Difference, StoredNumbers, write_numbers
from tts_align.utils.lazy import Lazy

KEYS = st.binary(min_size=14, max_size=14).flatmap(lambda start: st.sampled_from([start + b"ab", start + b"\0\0"]))
SOME = st.dictionaries(KEYS.map(bytes.hex), st.lists(st.integers(-9, 9), max_size=4), max_size=6)


def arrays(values: dict[str, list[float]]) -> dict[str, np.ndarray]:
    return {key: np.asarray(one, np.float32) for key, one in values.items()}


def as_lists(found: StoredNumbers) -> dict[str, list[float]]:
    return {key: one.tolist() for key, one in found.items()}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=SOME, second=SOME, fresh=SOME)
def test_parts_are_one_dictionary(tmp_path: Path, first: dict, second: dict, fresh: dict):
    """Keys that end in zeros, too, which NumPy leaves out."""
    parts = []
    for number, some in enumerate((first, second)):
        write_numbers(tmp_path / f"{number}.safetensors", arrays(some), {})
        parts.append(Columns.open(tmp_path / f"{number}.safetensors")[0])
    found = StoredNumbers(parts)
    found.update(arrays(fresh))
    expected = {key: np.asarray(one, np.float32).tolist() for key, one in {**second, **first, **fresh}.items()}
    assert {key: found[key].tolist() for key in expected} == expected  # before they are put together
    assert as_lists(found) == expected
    assert [one.tolist() for one in found.of(list(expected))] == list(expected.values())
    assert list(found) == sorted(expected)
    write_numbers(tmp_path / "all.safetensors", found, {})
    assert as_lists(StoredNumbers([Columns.open(tmp_path / "all.safetensors")[0]])) == expected
    gaps = StoredNumbers([Difference(found, StoredNumbers([Columns.of(arrays({**second, **first, **fresh}))]))])
    assert as_lists(gaps) == {key: [0.0] * len(one) for key, one in expected.items()}


def columns(count: int, length: int) -> dict[str, np.ndarray]:
    """What runs before this version wrote with the library."""
    keys = np.random.default_rng(0).integers(0, 256, (count, 16)).astype(np.uint8)
    keys = keys[np.lexsort(keys.T[::-1])]
    values = np.random.default_rng(1).normal(size=count * length).astype(np.float32)
    return {"keys": keys, "offsets": np.arange(count + 1, dtype=np.int64) * length, "values": values}


def test_files_are_byte_for_byte_those_of_earlier_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(numbers, "CHUNK_TOKENS", 7)
    made = columns(9, 3)
    save_file(made, tmp_path / "old.safetensors", metadata={"identity": '{"weights": "ä"}'})
    stored, identity = Columns.open(tmp_path / "old.safetensors")
    write_numbers(tmp_path / "new.safetensors", StoredNumbers([stored]), identity)
    again, words = Columns.open(tmp_path / "new.safetensors")
    assert words == {"weights": "ä"}
    np.testing.assert_array_equal(again.values, made["values"])
    save_file(made, tmp_path / "old.safetensors", metadata={"identity": '{"weights": "a"}'})
    write_numbers(tmp_path / "new.safetensors", StoredNumbers([stored]), {"weights": "a"})
    assert (tmp_path / "new.safetensors").read_bytes() == (tmp_path / "old.safetensors").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": np.array([0, 2, 1, 3])},
        {"offsets": np.array([0, 1, 2, 4])},
        {"offsets": np.array([0, 3])},
        {"values": np.zeros(3)},
        {"keys": np.zeros((3, 17), np.uint8)},
    ],
    ids=["falling", "too far", "too few", "64 bits", "long keys"],
)
def test_what_is_no_such_file_is_said(tmp_path: Path, change: dict[str, np.ndarray]):
    path = tmp_path / "contrast.safetensors"
    save_file(columns(3, 1) | change, path)
    with pytest.raises(cache.StaleCacheError, match=rf"{path} is broken .expected"):
        TokenCache.read(path, needed=())


@contextmanager
def peak(megabytes: float) -> Iterator[None]:
    """Within the block Python and NumPy may take so much memory."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()


def test_reading_and_merging_take_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Eight megabytes of numbers; a dictionary of them took all of it, twice while it was written."""
    monkeypatch.setattr(numbers, "CHUNK_TOKENS", 2**14)
    path, other = tmp_path / "contrast.safetensors", tmp_path / "other.safetensors"
    made = columns(800, 2500)
    save_file(made, path)
    keys = [bytes(key).hex() for key in made["keys"][::20]]
    with peak(1.5):
        found = TokenCache.read(path, keys)
        assert len(found.gather(keys, 2500)) == 40
        write_numbers(other, found.numbers, {})
        write_numbers(other, StoredNumbers([Difference(found.numbers, found.numbers)]), {})
    assert not Columns.open(other)[0].values.any()
    with pytest.raises(KeyError, match="00" * 16):
        found.gather([*keys, "00" * 16], 2500)


def test_a_fill_holds_neither_rows_nor_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layout = Layout("cosyvoice2", codebook_size=1300)
    keys = columns(300, 0)["keys"]

    def row(number: int) -> TokenRow:
        return TokenRow((number,), tuple((number + place) % 1000 + 300 for place in range(600)))

    def score(rows: Rows) -> torch.Tensor:
        return rows.scatter(rows.target.float())

    for name, bound in (("KEPT_EVERY_BYTES", 2**18), ("BATCH_TOKENS", 6000)):
        monkeypatch.setattr(cache, name, bound)
    monkeypatch.setattr(numbers, "CHUNK_TOKENS", 2**14)
    made = TokenCache(tmp_path, "reference", {})
    with peak(3.0):  # rows are 6.5 MB at least
        made.ensure(Keyed([(keys, Lazy(len(keys), partial(row)))]), score, layout, "reference")
    assert made.numbers[bytes(keys[7]).hex()][:3].tolist() == [307.0, 308.0, 309.0]
    assert [path.name for path in tmp_path.iterdir()] == [made.path.name]


def test_spread_of_pieces_is_that_of_all():
    values = np.random.default_rng(0).normal(3, 2, 1000).astype(np.float32)
    found = Spread.of(np.split(values, [1, 1, 400]), 0.0, 4.0)
    assert str(found) == f"{values.mean():+.2f} (sd {values.std():.2f})"
    assert found.outside == int(((values <= 0) | (values >= 4)).sum())
