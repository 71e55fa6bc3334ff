# SPDX-License-Identifier: Apache-2.0
"""The campaigns of ``benchmarks/faults`` in short: a kill, signals, a full disk, two at once, and hostile inputs."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from places import BENCHMARKS, ROOT
from processes import forked
from tiny import save_policy

pytestmark = pytest.mark.whole_runs


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of a short campaign, made in a process of its own: it forks, which this one must not."""
    folder = tmp_path_factory.mktemp("faults")
    program = f"""
import sys
sys.path[:0] = {[str(BENCHMARKS / "faults"), str(BENCHMARKS)]!r}
import json, signal
from pathlib import Path
import campaign, disks, hostile, kills, several
from forked import preload
preload()
folder = Path({str(folder)!r})
place = campaign.made_place(folder, folder / "work/here", steps=6)
temporary = folder / "temporary"
temporary.mkdir()
def in_time(stopped):
    # A signal that comes before the end of the work, however fast the machine is just now.
    for share in (0.45, 0.3, 0.2):
        one = stopped(share)
        if one["faults"] or not one["late"]:
            break
    return one
def one_of_two(command):
    return in_time(lambda share: several.stopped(place, command, signal.SIGTERM, share, (1,)))
result = {{
    "kills": [kills.killed(place, command, 1, 1, temporary) for command in ("fit",)],
    "signals": [in_time(lambda share: kills.stopped(place, "judge", signal.SIGTERM, share))],
    "several": [one_of_two("sample"), one_of_two("score")],
    "full": [disks.full(place, command, 20_000) for command in ("fit",)],
    "two": [disks.two_at_once(place, "sample")],
    "hostile": campaign.in_a_copy(lambda: campaign.hostile_inputs(place, folder, 80, 5)),
}}
(folder / "result.json").write_text(json.dumps(result))
"""
    (folder / "program.py").write_text(program)
    (done,) = forked([[sys.executable, str(folder / "program.py")]], [folder], [{"PYTHONPATH": str(ROOT)}])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("part", ["kills", "signals", "several", "full", "two"])
def test_nothing_is_lost(part: str, found: Any) -> None:
    for one in found[part]:
        assert one["faults"] == [], one
    if part == "kills":
        assert all(one["kills"] == 1 for one in found[part])
    if part == "signals":
        assert [(one["late"], one["code"]) for one in found[part]] == [(False, 143)]
    if part == "several":  # the second got the signal; the first may have taken leave of it with all the work done
        assert [(one["late"], one["codes"][1]) for one in found[part]] == [(False, 143)] * 2
    if part == "full":
        assert found[part][0]["code"] == 2
        assert "larger than a file may be here" in found[part][0]["said"]


def test_a_signal_that_is_not_heeded_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was made before the signal excuses an end with 0."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "faults"))
    in_time = importlib.import_module("kills").in_time
    assert in_time({}, {"a": (1, 1)})
    assert in_time({"a": (1, 1)}, {"a": (1, 2)})
    assert in_time({}, {})  # a command without outputs
    assert not in_time({"a": (1, 1)}, {"a": (1, 1)})


def test_only_who_was_not_told_and_left_all_the_work_done_may_end_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "faults"))
    may_end = importlib.import_module("several")._may_end
    assert may_end(late=False, told=False, whole=True, code=0)
    assert not may_end(late=False, told=False, whole=False, code=0)
    assert not may_end(late=False, told=True, whole=True, code=0)
    assert may_end(late=True, told=True, whole=True, code=0)
    assert not may_end(late=True, told=False, whole=True, code=1)


def test_hostile_inputs_are_taken_or_refused(found: Any) -> None:
    assert found["hostile"]["faults"] == []
    assert found["hostile"]["cases"] == 80
    assert found["hostile"]["ends"]["refused"] > 30


def test_a_reader_that_fails_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "faults"))
    hostile = importlib.import_module("hostile")

    def broken() -> None:
        raise KeyError("x")

    assert hostile._tried(broken).startswith("fault: KeyError")
    assert hostile._tried(lambda: (tmp_path / "no").read_text()) == "refused"
    assert hostile._tried(lambda: None) == "taken"
    assert hostile._tried(lambda: sys.exit(2)).startswith("fault: no reason given")
    assert save_policy
