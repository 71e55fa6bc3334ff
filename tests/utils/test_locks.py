# SPDX-License-Identifier: Apache-2.0
"""One writer at a time, known by name; what killed ones left behind is cleaned, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tts_align.utils import files, locks
from tts_align.utils.files import (
    check_inside,
    check_not_source,
    directory_written_atomically,
    file_name,
    remove_leftovers,
    written_atomically,
)
from tts_align.utils.locks import LockedError, locked
from tts_align.utils.processes import HOST, is_alive, started


def ended_process() -> int:
    """Number of a process that has just ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_second_writer_is_told_who_has_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with locked(lock, tmp_path, "fit", "run.directory"):
        held = json.loads(lock.read_text())
        assert held["process"] == os.getpid()
        with (
            pytest.raises(LockedError, match=rf"by `tts-align fit` of {held['owner']} on {held['host']} \(process \d+"),
            locked(lock, tmp_path, "test", "run.directory"),
        ):
            pass
        assert lock.exists()
    assert list(tmp_path.iterdir()) == []
    with locked(lock, tmp_path, "fit", "run.directory"):
        pass


@pytest.mark.parametrize("damage", ["ended", "reused", "cut"])
def test_a_stale_lock_is_taken_over_and_said(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / ".lock"
    with locked(lock, tmp_path, "fit", "run.directory"):
        held = json.loads(lock.read_text())
    if damage == "ended":
        held["process"] = ended_process()
    elif damage == "reused":  # another process has the number now
        held |= {"process": os.getpid(), "started": "1"}
    lock.write_text("" if damage == "cut" else json.dumps(held))
    with locked(lock, tmp_path, "test", "run.directory"):
        assert json.loads(lock.read_text())["command"] == "test"
    assert "taking over from" in capsys.readouterr().out
    assert not lock.exists()


def test_a_lock_of_another_machine_is_never_taken_over(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    other = {"owner": "ann", "host": "far", "process": 7, "machine": "0" * 8, "command": "fit", "since": "yesterday"}
    lock.write_text(json.dumps(other))
    with (
        pytest.raises(LockedError, match=r"fit` of ann on far \(process 7, since yesterday\).*remove .*\.lock"),
        locked(lock, tmp_path, "fit", "run.directory"),
    ):
        pass
    assert json.loads(lock.read_text()) == other


def test_processes() -> None:
    assert is_alive(os.getpid())
    assert started(os.getpid())
    assert not is_alive(ended_process())


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = ended_process()
    left = [f".x.{dead}-{HOST}-0123abcd.scratch.wav", f"deep/.better.{dead}-{HOST}-0123abcd.scratch"]
    stays = [
        f".x.{os.getpid()}-{HOST}-0123abcd.scratch.wav",  # somebody is writing it
        f".x.{dead}-00000000-0123abcd.scratch.wav",  # of another machine
        ".better.abc", ".tmp", "x.scratch", f"x.{dead}-{HOST}-0123abcd.scratch",  # the user's
    ]  # fmt: skip
    for name in (*left, *stays):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert remove_leftovers(tmp_path) == [tmp_path / left[0]]
    assert remove_leftovers(tmp_path, tmp_path / "nowhere", deep=True) == [tmp_path / left[1]]
    assert sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file()) == sorted(stays)


def test_what_a_writer_leaves_when_it_is_killed_is_known_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os, pathlib; from tts_align.utils.files import *\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "with written_atomically(folder / 'x.wav'), directory_written_atomically(folder / 'better') as made:\n"
        "    (made / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], env=dict(os.environ)).returncode == -9
    names = sorted(one.name for one in tmp_path.iterdir())
    assert [name.split(".")[1] for name in names] == ["better", "x"]
    assert len(remove_leftovers(tmp_path)) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["rename", "second"])
def test_without_an_exchange_a_killed_writer_loses_nothing(tmp_path: Path, place: str) -> None:
    """On systems without ``renameat2`` a moment is left in which nothing is in the place."""
    target = tmp_path / "model"
    with directory_written_atomically(target) as made:
        (made / "a").write_text("old")
    program = (
        "import os, pathlib; from tts_align.utils import files\n"
        "files._swapped = lambda *_: False\n"
        "rename, calls = pathlib.Path.rename, []\n"
        "def dying(self, to):\n"
        "    calls.append(to)\n"
        f"    if len(calls) > {['rename', 'second'].index(place)}: os.kill(os.getpid(), 9)\n"
        "    return rename(self, to)\n"
        "pathlib.Path.rename = dying\n"
        f"with files.directory_written_atomically(pathlib.Path({str(target)!r}), overwrite=True) as made:\n"
        "    (made / 'a').write_text('new')\n"
    )
    assert subprocess.run([sys.executable, "-c", program], env=dict(os.environ)).returncode == -9
    assert target.exists() is (place == "rename")
    remove_leftovers(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["model"]
    assert (target / "a").read_text() == "old"


def test_without_an_exchange_a_directory_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: object())  # a C library without renameat2
    target = tmp_path / "model"
    for text in ("old", "new"):
        with directory_written_atomically(target, overwrite=True) as made:
            (made / "a").write_text(text)
    assert (target / "a").read_text() == "new"
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_failed_exchange_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_swapped", lambda *_: False)
    target = tmp_path / "model"
    with directory_written_atomically(target) as made:
        (made / "a").write_text("old")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if to == target and ".scratch" in self.name:
            raise OSError(5, "no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), directory_written_atomically(target, overwrite=True) as made:
        (made / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_what_is_read_is_never_written(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("{}")
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "hard")
    for name in ("a.jsonl", "link", "hard", "../" + tmp_path.name + "/a.jsonl"):
        with pytest.raises(ValueError, match="is what is read"):
            check_not_source(tmp_path / name, source)
    with pytest.raises(ValueError, match="lies in the directory that is read"):
        check_not_source(tmp_path / "new.parquet", tmp_path)
    check_not_source(tmp_path / "b.jsonl", source)
    check_not_source(tmp_path / "b.jsonl", tmp_path / "nowhere.jsonl")


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "test").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run/test/a.wav leads out of .*run"):
        check_inside(tmp_path / "run" / "test" / "a.wav", tmp_path / "run")
    check_inside(tmp_path / "alias" / "audio", tmp_path / "alias")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/b", "\0", "x" * 300, "あ" * 100, "..", ".", "\ud800", "a\nb", "%2F", "C:\\x", ""]
)
def test_any_name_becomes_the_name_of_a_file_in_its_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{file_name(name)}-base.wav"
    with written_atomically(path, durable=False) as scratch:
        scratch.write_text("")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_different_names_stay_different() -> None:
    names = ["x" * 300, "x" * 301, "a/b", "a%2Fb", "a\\b", "あ" * 100, "あ" * 101]
    assert len({file_name(name) for name in names}) == len(names)


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(ValueError, match="something is mounted at"), directory_written_atomically(tmp_path, True):
        pytest.fail("the work began")


def test_the_lock_of_a_file_lies_beside_it() -> None:
    assert locks.lock_of(Path("a/out.jsonl")) == Path("a/.out.jsonl.lock")
