# SPDX-License-Identifier: Apache-2.0
import errno
import os

import pytest

from tts_align.utils.files import (
    directory_written_atomically,
    read_json_lines,
    write_json,
    write_json_lines,
    written_atomically,
)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"辛い": 1})
    assert "辛い" in path.read_text("utf-8")

    def fail(scratch):
        scratch.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), written_atomically(path) as scratch:
        fail(scratch)
    assert "辛い" in path.read_text("utf-8")
    assert [one.name for one in path.parent.iterdir()] == ["a.json"]


@pytest.fixture
def umask():
    """Sets the process's umask for the time of a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path, umask, mask, mode):
    umask(mask)
    with written_atomically(tmp_path / "a") as scratch:
        assert scratch.stat().st_mode & 0o777 == 0o600  # nobody reads half
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode
    with directory_written_atomically(tmp_path / "b") as scratch:
        assert scratch.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "b").stat().st_mode & 0o777 == mode | 0o700 | (mode & 0o044) >> 2


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o640])
def test_what_is_replaced_gives_its_mode(tmp_path, umask, mode):
    umask(0o022)
    path, directory = tmp_path / "a.json", tmp_path / "b"
    path.touch()
    directory.mkdir()
    path.chmod(mode)
    directory.chmod(mode | 0o100)
    write_json(path, 1)
    with directory_written_atomically(directory, overwrite=True):
        pass
    assert path.read_text() == "1\n"
    assert path.stat().st_mode & 0o777 == mode
    assert directory.stat().st_mode & 0o777 == mode | 0o100


def test_lines_come_back_with_their_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    assert write_json_lines(path, [{"a": 1}, {"b": "\u2028"}]) == 2
    path.write_text(path.read_text() + "\n" + '{"c": 3}\n')
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (2, {"b": "\u2028"}), (4, {"c": 3})]


@pytest.mark.parametrize(
    ("line", "message"), [("{oops", "a.jsonl:2: not JSON"), ("[1]", "a.jsonl:2: expected an object")]
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + line)
    with pytest.raises(ValueError, match=message):
        list(read_json_lines(path))
    assert list(read_json_lines(path, cut_tail=True)) == [(1, {"a": 1})]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "model"
    with directory_written_atomically(path) as scratch:
        (scratch / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert path.stat().st_mode & 0o777 == 0o755
    with pytest.raises(ValueError, match="is there already"), directory_written_atomically(path):
        pass

    def fail(scratch):
        (scratch / "b").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), directory_written_atomically(path, overwrite=True) as scratch:
        fail(scratch)
    assert [one.name for one in path.iterdir()] == ["a"]
    (tmp_path / "link").symlink_to(path)
    with directory_written_atomically(tmp_path / "link", overwrite=True) as scratch:
        (scratch / "c").write_text("3")
    assert [one.name for one in path.iterdir()] == ["c"]  # what the link shows
    with directory_written_atomically(path / "c", overwrite=True):
        pass
    assert (path / "c").is_dir()  # a file gives way, too
    with directory_written_atomically(path / "c") as scratch:  # and an empty directory is nothing
        (scratch / "d").write_text("4")
    assert [one.name for one in path.parent.iterdir()] == ["model"]


def test_a_full_disk_is_said_of_the_directory(tmp_path):
    """Libraries in Rust say only in words what the system has said."""
    full = pytest.raises(OSError, match="No space left on device")
    with full as raised, directory_written_atomically(tmp_path / "a"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="something else"), directory_written_atomically(tmp_path / "a"):
        raise RuntimeError("something else")
