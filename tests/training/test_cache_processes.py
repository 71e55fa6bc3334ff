# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes fill one cache: on a lagging or separate disk, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import forked, ranks
from two_caches import LAYOUT, ROWS

from tts_align.batch import Rows
from tts_align.training import cache
from tts_align.training.cache import CHECKED_ROWS, TokenCache
from tts_align.training.numbers import write_numbers
from tts_align.utils.signals import Interrupted, handled

WORKER = Path(__file__).with_name("two_caches.py")


def fill(tmp_path: Path, folder: str, dies_after: int = 0, stopped: int = -1) -> list[subprocess.CompletedProcess[str]]:
    """Two processes with working directories of their own."""
    commands = [[sys.executable, str(WORKER), folder, str(dies_after), str(stopped)]] * 2
    return forked(commands, [tmp_path / "one", tmp_path / "two"], ranks(2), timeout=60)


def said(done: list[subprocess.CompletedProcess[str]]) -> list[dict]:
    assert all(one.returncode == 0 for one in done), "\n".join(one.stderr for one in done)
    return [json.loads(one.stdout.splitlines()[-1]) for one in done]


def test_one_shared_folder(tmp_path: Path):
    found = said(fill(tmp_path, str(tmp_path / "shared")))
    assert [(one["rank"], one["rows"], one["right"]) for one in found] == [(0, 24, True), (1, 24, True)]
    assert sum(one["asked"] for one in found) == 24
    assert [path.suffix for path in (tmp_path / "shared").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("sees", ["one", "two"], ids=["the first", "the second"])
def test_a_file_that_only_one_process_sees_is_no_hang(tmp_path: Path, sees: str):
    """A relative folder, and the finished file in one of the working directories: as on a disk that lags."""
    finished = TokenCache(tmp_path / sees / "cache", "reference", {"weights": "a"})
    finished.ensure(ROWS, lambda rows: rows.scatter(-rows.target.float()), LAYOUT, "reference")
    found = said(fill(tmp_path, "cache"))
    assert all(one["right"] and one["rows"] == 24 for one in found)
    fresh = sum(one["asked"] for one in found)
    assert fresh == (2 * CHECKED_ROWS if sees == "one" else 24)  # what the first process sees counts


def test_what_was_done_before_a_kill_is_kept(tmp_path: Path):
    shared = tmp_path / "shared"
    killed = fill(tmp_path, str(shared), dies_after=2)
    assert all(one.returncode == 9 for one in killed)
    parts = [path.parent.suffix for path in shared.rglob("*.safetensors")]
    assert parts == [".parts"] * 4
    kept = {key for path in shared.rglob("*.safetensors") for key in cache._read(path)[0]}
    found = said(fill(tmp_path, str(shared)))
    assert all(one["right"] and one["rows"] == 24 for one in found)
    assert sum(one["asked"] for one in found) == 24 - len(kept) + 2 * CHECKED_ROWS
    assert 0 < len(kept) < 24
    assert [path.suffix for path in shared.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_signal_for_one_ends_both_after_a_batch(tmp_path: Path, stopped: int):
    """The second process, which is fast, has done its share and waits when the first gets the signal."""
    shared = tmp_path / "shared"
    ended = fill(tmp_path, str(shared), stopped=stopped)
    assert [one.returncode for one in ended] == [143, 143], "\n".join(one.stderr for one in ended)
    kept = {key for path in shared.rglob("*.safetensors") for key in cache._read(path)[0]}
    assert 0 < len(kept) < 24
    assert {path.parent.suffix for path in shared.rglob("*.safetensors")} == {".parts"}
    found = said(fill(tmp_path, str(shared)))
    assert all(one["right"] and one["rows"] == 24 for one in found)
    assert sum(one["asked"] for one in found) == 24 - len(kept) + 2 * CHECKED_ROWS


# --- alone ---


class Tired:
    """Says of each target its number in the batch, so that another cut is noticed; stops after so many batches.

    Args:
        batches: how many.
        signalled: stops as by SIGTERM while it works on the last of them, otherwise where it is.
    """

    def __init__(self, batches: int = 10**6, signalled: bool = False) -> None:
        self.left, self.asked, self.signalled = batches, 0, signalled

    def __call__(self, rows: Rows):
        if not self.left:
            raise KeyboardInterrupt
        self.left, self.asked = self.left - 1, self.asked + len(rows.keys)
        if self.signalled and not self.left:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows.scatter(rows.target.float() + rows.mask.shape[1])


def test_an_interrupted_fill_resumes_with_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "BATCH_TOKENS", 40)

    def ensure(folder: Path, model: Tired) -> TokenCache:
        made = TokenCache(folder, "reference", {"weights": "a"})
        made.ensure(ROWS, model, LAYOUT, "reference", tolerance=99.0)
        return made

    with pytest.raises(KeyboardInterrupt):
        ensure(tmp_path / "cut", Tired(3))
    rest = Tired()
    resumed, whole = ensure(tmp_path / "cut", rest), ensure(tmp_path / "whole", Tired())
    assert 0 < rest.asked < 24 + CHECKED_ROWS
    assert all((resumed.numbers[key] == whole.numbers[key]).all() for key in ROWS)
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [resumed.path.name]


@pytest.mark.parametrize("batches", [1, 3, 10**6], ids=["the first", "the third", "the last"])
def test_a_signal_waits_for_the_batch(batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "BATCH_TOKENS", 40)
    whole = Tired()
    undisturbed = TokenCache(tmp_path / "whole", "reference", {"weights": "a"})
    undisturbed.ensure(ROWS, whole, LAYOUT, "reference")
    count = 10**6 - whole.left
    model, made = Tired(min(batches, count), signalled=True), TokenCache(tmp_path, "reference", {"weights": "a"})
    with pytest.raises(Interrupted) as ended, handled():
        made.ensure(ROWS, model, LAYOUT, "reference", tolerance=99.0)
    assert ended.value.code == 143
    kept = sum(len(cache._read(path)[0]) for path in made._parts.iterdir())
    assert kept == model.asked
    rest = Tired()
    made = TokenCache(tmp_path, "reference", {"weights": "a"})
    made.ensure(ROWS, rest, LAYOUT, "reference", tolerance=99.0)
    assert rest.asked == 24 - kept + min(CHECKED_ROWS, kept)
    assert made.path.read_bytes() == undisturbed.path.read_bytes()
    assert not made._parts.exists()


def test_parts_that_hold_everything_become_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed after the last batch, before the file was written."""
    made = TokenCache(tmp_path, "reference", {"weights": "a"})
    numbers = TokenCache(tmp_path / "x", "reference", {"weights": "a"})
    numbers.ensure(ROWS, Tired(), LAYOUT, "reference")
    write_numbers(made._parts / "0-1.safetensors", numbers.numbers, made.identity)
    model = Tired()
    made.ensure(ROWS, model, LAYOUT, "reference", tolerance=99.0)
    assert model.asked == CHECKED_ROWS
    assert made.path.exists()
    assert not made._parts.exists()


def test_parts_of_other_weights_are_not_taken(tmp_path: Path):
    made = TokenCache(tmp_path, "reference", {"weights": "a"})
    write_numbers(made._parts / "0-1.safetensors", {"00": np.ones(1, np.float32)}, {"weights": "b"})
    model = Tired()
    made.ensure(ROWS, model, LAYOUT, "reference")
    assert model.asked == 24
    assert "00" not in made.numbers
