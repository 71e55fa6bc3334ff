# SPDX-License-Identifier: Apache-2.0
"""Messages of several processes: said once, whether or not Lightning has been imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tts_align.utils.messages import LIGHTNING, RANKS, first_process, say


@pytest.fixture
def without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a command that trains nothing, started by no launcher."""
    monkeypatch.delitem(sys.modules, LIGHTNING, raising=False)
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("without_lightning")
@pytest.mark.parametrize("name", RANKS)
def test_a_launcher_says_which_process_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert first_process()
    for rank in ("0", "1"):
        monkeypatch.setenv(name, rank)
        say(f"process {rank}")
    assert capsys.readouterr().out == "process 0\n"


@pytest.mark.usefixtures("without_lightning")
def test_the_first_name_that_is_there_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")  # of the allocation in which torchrun was started
    monkeypatch.setenv("RANK", "1")
    assert not first_process()


def test_lightning_knows_once_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert not first_process()
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    monkeypatch.setenv("RANK", "1")
    assert first_process()


def test_commands_that_train_nothing_do_not_wait_for_lightning() -> None:
    code = "import sys, tts_align.cli.label, tts_align.cli.compare; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
