# SPDX-License-Identifier: Apache-2.0
"""Numbers of frozen models: named by what changes them, checked when loaded (rule 7)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import build, make_trainer, save_policy

from tts_align.batch import Rows
from tts_align.models.base.layout import Layout, TokenRow
from tts_align.objectives import KTO
from tts_align.training.cache import CHECKED_ROWS, StaleCacheError, TokenCache, scored

LAYOUT = Layout("cosyvoice2", codebook_size=10)
ROWS = {LAYOUT.key(row): row for row in (TokenRow((1, 2), (*range(1 + i % 5), i % 7)) for i in range(12))}


class Model:
    """Says of each target its id; counts the rows it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, rows: Rows) -> torch.Tensor:
        self.asked += rows.keys
        return rows.scatter(-rows.target.float())


def ensure(folder: Path, model: Model, rows: dict[str, TokenRow] = ROWS, **identity: str) -> TokenCache:
    cache = TokenCache(folder, "reference", {"weights": "a", "precision": "32-true"} | identity)
    cache.ensure(rows, model, LAYOUT, "reference")
    return cache


def test_every_row_once_then_none(tmp_path: Path):
    first, second = Model(), Model()
    made = ensure(tmp_path, first)
    assert sorted(first.asked) == sorted(ROWS)
    kept = ensure(tmp_path, second)
    assert len(second.asked) == CHECKED_ROWS  # checked, not made
    assert kept.numbers.keys() == made.numbers.keys() == ROWS.keys()
    for key, row in ROWS.items():
        expected = [-float(target) for target in LAYOUT.arrange(row).target]
        assert made.numbers[key].tolist() == kept.numbers[key].tolist() == expected


def test_new_rows_are_added(tmp_path: Path):
    some = dict(list(ROWS.items())[:5])
    ensure(tmp_path, Model(), some)
    model = Model()
    ensure(tmp_path, model)
    assert sorted(set(model.asked) - set(some)) == sorted(ROWS.keys() - some.keys())
    assert len(model.asked) == len(ROWS) - 5 + CHECKED_ROWS
    model = Model()
    ensure(tmp_path, model, some)  # fewer rows are no reason to forget the others
    assert set(model.asked) <= set(some)
    assert ensure(tmp_path, Model()).numbers.keys() == ROWS.keys()


def test_checked_rows_are_spread_over_the_data(tmp_path: Path):
    ensure(tmp_path, Model())
    model = Model()
    ensure(tmp_path, model)
    assert [list(ROWS).index(key) for key in model.asked] == [0, 3, 6, 9]


def test_a_file_per_identity(tmp_path: Path):
    paths = [
        ensure(tmp_path, Model(), **identity).path
        for identity in ({}, {"weights": "b"}, {"precision": "bf16-mixed"}, {"more": "x"})
    ]
    assert len(set(paths)) == len({path.name for path in tmp_path.iterdir()}) == 4
    other = TokenCache(tmp_path, "desirable", {"weights": "a", "precision": "32-true"})
    assert other.path not in paths
    again = TokenCache(tmp_path, "reference", {"precision": "32-true", "weights": "a"})
    assert again.path == paths[0]  # whatever the order


def test_another_rule_for_targets_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = TokenCache(tmp_path, "reference", {}).path
    monkeypatch.setattr("tts_align.training.cache.TARGET_RULE", "speech tokens only")
    assert TokenCache(tmp_path, "reference", {}).path != before


def tamper(path: Path, change: float) -> None:
    arrays = load_file(path)
    arrays["values"] = arrays["values"] + np.float32(change)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file(arrays, path, metadata=metadata)


def test_wrong_numbers_are_found_and_the_remedy_is_said(tmp_path: Path):
    path = ensure(tmp_path, Model()).path
    tamper(path, 0.01)
    with pytest.raises(StaleCacheError, match=rf"{path} does not hold what the model says .*0\.01.*: delete it"):
        ensure(tmp_path, Model())
    path.unlink()
    assert len(ensure(tmp_path, Model()).numbers) == len(ROWS)


@pytest.mark.parametrize("change", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_found(tmp_path: Path, change: float):
    tamper(ensure(tmp_path, Model()).path, change)
    with pytest.raises(StaleCacheError, match="does not hold what the model says"):
        ensure(tmp_path, Model())


def test_rounding_is_tolerated(tmp_path: Path):
    tamper(ensure(tmp_path, Model()).path, 1e-4)
    ensure(tmp_path, Model())


@pytest.mark.parametrize("broken", [b"", b"nothing of use", None])
def test_a_broken_file_is_named(tmp_path: Path, broken: bytes | None):
    path = ensure(tmp_path, Model()).path
    path.write_bytes(path.read_bytes()[:-40] if broken is None else broken)
    with pytest.raises(StaleCacheError, match=rf"{path} is broken .*: delete it"):
        ensure(tmp_path, Model())


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    other = ensure(tmp_path, Model(), weights="b").path
    mine = TokenCache(tmp_path, "reference", {"weights": "a", "precision": "32-true"})
    other.rename(mine.path)
    with pytest.raises(StaleCacheError, match="holds numbers of something else: delete it"):
        mine.load()


def test_an_interrupted_write_leaves_the_old_file_and_what_was_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = ensure(tmp_path, Model(), dict(list(ROWS.items())[:2])).path
    before = path.read_bytes()

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tts_align.training.cache.write_numbers", dies)
    with pytest.raises(KeyboardInterrupt):
        ensure(tmp_path, Model())
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.parts"]
    assert path.read_bytes() == before
    monkeypatch.undo()
    model = Model()
    assert ensure(tmp_path, model).numbers.keys() == ROWS.keys()
    assert len(model.asked) == CHECKED_ROWS


def test_read_by_path(tmp_path: Path):
    made = ensure(tmp_path, Model())
    found = TokenCache.read(made.path, ROWS)
    assert found.identity == made.identity
    assert found.numbers.keys() == ROWS.keys()
    with pytest.raises(StaleCacheError, match=r"lacks 1 of the rows: .*leave model\.contrast\.weights out"):
        TokenCache.read(made.path, [*ROWS, "00"])
    with pytest.raises(StaleCacheError, match=r"no numbers at .*nowhere.*check model\.contrast\.weights"):
        TokenCache.read(tmp_path / "nowhere", ROWS)


def test_gather_pads_with_0(tmp_path: Path):
    cache = ensure(tmp_path, Model())
    keys = sorted(ROWS, key=lambda key: len(cache.numbers[key]))[::-1][:2]
    found = cache.gather(keys, 9)
    assert found.shape == (2, 9)
    for row, key in zip(found.tolist(), keys, strict=True):
        assert row == [*cache.numbers[key].tolist(), *[0.0] * (9 - len(cache.numbers[key]))]


def test_batches_are_not_larger_than_asked(tmp_path: Path):
    sizes = []

    def score(rows: Rows) -> torch.Tensor:
        sizes.append(rows.token.numel())
        return rows.scatter(torch.zeros(len(rows.target)))

    found = {key for keys, _ in scored(ROWS, score, LAYOUT, "cpu", tokens=20) for key in keys}
    assert found == ROWS.keys()
    assert len(sizes) > 1
    assert max(sizes) <= 20 + max(map(LAYOUT.input_count, ROWS.values()))


# --- what a run keeps: nothing but the numbers' own causes change the name ---


def files(folder: Path, directory: Path, manifest: str, trainer: dict | None = None, **options: object) -> set[str]:
    module, data = build(KTO(), directory, manifest, folder / "cache", **options)  # type: ignore[arg-type]
    make_trainer(folder, max_steps=1, **(trainer or {})).fit(module, datamodule=data)
    return {path.name for path in (folder / "cache").iterdir()}


pytestmark = pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")


def test_learning_rate_shuffle_and_batch_do_not_change_the_file(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    once = files(tmp_path, tiny_policy, tiny_rows)
    assert len(once) == 1
    written = next((tmp_path / "cache").iterdir()).stat().st_mtime_ns
    assert files(tmp_path, tiny_policy, tiny_rows, lr=0.5, rows_per_step=4, bucket_steps=1) == once
    assert files(tmp_path, tiny_policy, tiny_rows, {"accumulate_grad_batches": 2}) == once
    assert next((tmp_path / "cache").iterdir()).stat().st_mtime_ns == written


def test_another_seed_only_adds_its_mismatched_rows(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    assert files(tmp_path, tiny_policy, tiny_rows) == files(tmp_path, tiny_policy, tiny_rows, seed=5)


def test_weights_and_precision_change_the_file(tmp_path: Path, tiny_policy: Path, tiny_rows: str):
    other = save_policy(tmp_path / "other", seed=1)
    assert len(files(tmp_path, tiny_policy, tiny_rows)) == 1
    assert len(files(tmp_path, other, tiny_rows)) == 2
    assert len(files(tmp_path, tiny_policy, tiny_rows, {"precision": "64-true"})) == 3


def test_layout_and_tokens_are_in_the_keys_of_the_rows():
    row = TokenRow((1, 2, 3, 4, 5), tuple(range(10)) * 2)
    keys = {LAYOUT.key(one) for one in (row, replace(row, bistream=True), replace(row, prefix=1))}
    assert len(keys) == 3
    assert Layout("cosyvoice3", codebook_size=10).key(row) not in keys
