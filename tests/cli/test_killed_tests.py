# SPDX-License-Identifier: Apache-2.0
"""``test`` and ``score`` under two processes, and killed at many moments: the same files as undisturbed.

Everything is run by ``killed_tests.py``, a process of its own, as it forks, which this one must not.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from killed_tests import KILLS, SCORE_KILLS, SHORT_KILLS
from places import BENCHMARKS, ROOT
from processes import forked

LONG = pytest.mark.skipif("RUN_KILLED" not in os.environ, reason="takes a minute of a core: set RUN_KILLED=1")
PATHS = {
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/cli", BENCHMARKS / "faults"))),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """How the commands ended, and what they left behind."""
    folder = tmp_path_factory.mktemp("killed")
    words = [sys.executable, str(ROOT / "tests/cli/killed_tests.py"), str(folder)]
    done = subprocess.run(words, env={**os.environ, **PATHS}, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.whole_runs
def test_a_score_that_was_killed_twice_leaves_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    """The short form, which always runs: in the middle of a row, and behind the summary."""
    words = [sys.executable, str(ROOT / "tests/cli/killed_tests.py"), str(tmp_path), "short"]
    (done,) = forked([words], [tmp_path], [PATHS], timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "result.json").read_text())
    codes = [one["code"] for one in found["ends"]["killed score"]]
    assert codes == [-signal.SIGKILL] * len(SHORT_KILLS) + [0], found["ends"]["killed score"]
    expected, others = found["files"]["whole"]["theirs"], found["files"]["killed"]["theirs"]
    assert {"utterances.jsonl", "summary.json", "stages/transcribe-theirs.jsonl"} <= expected.keys()
    assert others == expected


@LONG
def test_every_command_ended_as_it_should(found: Any) -> None:
    for name, ends in found["ends"].items():
        killed = {"killed": len(KILLS), "killed score": len(SCORE_KILLS)}.get(name, 0)
        expected = [-signal.SIGKILL] * killed + [0] * (len(ends) - killed)
        assert [one["code"] for one in ends] == expected, (name, [one for one in ends if one["code"] not in (0, -9)])


@LONG
def test_an_undisturbed_test_and_score_leave_everything(found: Any) -> None:
    files = found["files"]["whole"]
    assert {"utterances.jsonl", "summary.json", "forgetting.jsonl"} <= files["test"].keys()
    assert sum(name.startswith("audio/") for name in files["test"]) == 6
    stages = {name.removeprefix("stages/") for name in files["test"] if name.startswith("stages/")}
    parts = ("synthesise", "sound", "transcribe")
    for system in ("base", "aligned"):
        assert {f"{part}-{system}.jsonl" for part in (*parts, "readings")} <= stages
        assert {f"{part}-forgetting-{system}.jsonl" for part in parts} <= stages
    assert {"utterances.jsonl", "summary.json"} <= files["theirs"].keys()


@LONG
@pytest.mark.parametrize("how", ["two", "killed"])
@pytest.mark.parametrize("part", ["test", "theirs"])
def test_the_files_are_those_of_an_undisturbed_process(how: str, part: str, found: Any) -> None:
    expected, others = found["files"]["whole"][part], found["files"][how][part]
    assert [name for name in expected.keys() | others.keys() if expected.get(name) != others.get(name)] == []
