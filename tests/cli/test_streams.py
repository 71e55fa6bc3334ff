# SPDX-License-Identifier: Apache-2.0
"""Commands in odd surroundings: closed streams, a narrow encoding, a folder that is gone, ranks of nobody."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from tiny import make_rows, save_recipe, save_rows

from tts_align.cli.entry import main

pytestmark = pytest.mark.whole_runs


def shell(folder: Path, line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of a shell, in which ``tts-align`` is this one."""
    line = line.replace("tts-align", f"{sys.executable} -m tts_align")
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=surroundings, capture_output=True, text=True, check=False
    )


@pytest.fixture
def fit(tmp_path: Path, tiny_policy: Path) -> str:
    """A training of one step whose folder has a name that not every terminal can show."""
    manifest = save_rows(tmp_path, make_rows(sentences=2))
    path = save_recipe(tmp_path, "sft", tiny_policy, manifest, run__directory=str(tmp_path / "走"))
    return f"tts-align fit --config {shlex.quote(path)} --data.rows_per_step 1 --trainer.max_steps 1"


def test_a_name_that_a_terminal_cannot_show_is_shown_by_numbers(fit: str, tmp_path: Path):
    done = shell(tmp_path, fit, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"\u8d70/config.yaml" in done.stdout


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_lose_nothing_but_words(closed: str, fit: str, tmp_path: Path):
    done = shell(tmp_path, f"{fit} {closed}")
    assert (done.returncode, (tmp_path / "走/checkpoints/last.ckpt").is_file()) == (0, True), done.stderr


def test_a_folder_that_is_gone_is_said(tmp_path: Path):
    (tmp_path / "gone").mkdir()
    done = shell(tmp_path / "gone", f"rmdir {shlex.quote(str(tmp_path / 'gone'))}; tts-align recipes")
    assert done.returncode == 2
    assert "tts-align: error: the current folder was removed: change into one that exists" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({"RANK": "1"}, "RANK is 1 in the environment, but WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "2"}, "`unset LOCAL_RANK`, or start it by torchrun"),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "x"}, "`export SLURM_JOB_NAME=bash` lets one process start alone"),
    ],
)
def test_what_a_launcher_has_left_behind_is_said(
    left: dict[str, str], words: str, fit: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A process that took itself for the second one trained in silence and saved nothing."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as raised:
        main(shlex.split(fit)[1:])
    assert raised.value.code == 2
    assert words in capsys.readouterr().err
