# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and lines of JSON that say where they are wrong."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tts_align.utils.lines import row_of
from tts_align.utils.processes import HOST, is_alive
from tts_align.utils.readers import byte_lines, read_json_object

_HERE, _EXCHANGE = -100, 2
"""``AT_FDCWD`` and ``RENAME_EXCHANGE`` of Linux's ``renameat2``."""


_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_UNSAFE = re.compile(r"[%/\\\0-\x1f\x7f\ud800-\udfff]")
_LONGEST_NAME = 160
"""Bytes of a name that become part of a file's name; file systems take 255 for the whole."""
_SCRATCH = re.compile(r"\..*\.(\d+)-([0-9a-f]{8})-[0-9a-f]{8}\.scratch(\.[^.]*)?")
"""Names of what is being written: process, machine, and a number drawn for it."""
_OLD = re.compile(r"\.(.+)\.(\d+)-([0-9a-f]{8})-[0-9a-f]{8}\.old")
"""Names of what was to be replaced, for the moment in which nothing is in its place."""


def file_name(name: str) -> str:
    """A name as part of a file's name: what a file's name cannot hold is quoted, so that it stays in its folder.

    A very long one is cut, and gets a digest of the whole, so that different names stay different.

    >>> file_name("../a b")
    '..%2Fa b'
    """
    quoted = _UNSAFE.sub(lambda found: quote(found[0], safe="", errors="surrogatepass"), name)
    encoded = quoted.encode()
    if len(encoded) <= _LONGEST_NAME:
        return quoted
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return f"{encoded[:_LONGEST_NAME].decode(errors='ignore')}~{digest}"


def scratch_beside(path: Path, suffix: str = "") -> Path:
    """A name for what is being written, beside its final place, by which a later command knows who left it."""
    stem = path.stem.encode()[:80].decode(errors="ignore")
    return path.with_name(f".{stem}.{os.getpid()}-{HOST}-{secrets.token_hex(4)}.scratch{suffix[:20]}")


@contextmanager
def written_atomically(path: Path, durable: bool = True) -> Iterator[Path]:
    """A scratch file beside ``path`` that takes its place when the block ends well, and is removed when it does not.

    The scratch file keeps the suffix of ``path``, for writers that go by it. What appears has the mode of the file that
    it replaces, and that of any new file where there was none.

    Args:
        path: what appears.
        durable: wait until the content is on the disk, so that a power cut leaves the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_beside(path, path.suffix)
    os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = _mode(path if path.is_file() else scratch)
        scratch.chmod(0o600)
        yield scratch
        scratch.chmod(mode & 0o777)
        if durable:
            synced(scratch)
        os.replace(scratch, path)
        if durable:
            synced(path.parent)
    except Exception as error:
        _raise_of_system(error, path)
        if isinstance(error, OSError) and error.filename in (None, str(scratch)):
            error.filename, error.filename2 = str(path), None  # what a person has asked for
        raise
    finally:
        scratch.unlink(missing_ok=True)


def _mode(path: Path) -> int:
    """Who may do what with a file or directory."""
    return stat.S_IMODE(path.stat().st_mode)


def _raise_of_system(error: Exception, path: Path) -> None:
    """Raise what the system has said of a file where a library in Rust has put it into words only."""
    found = _OS_ERROR.search(str(error))
    if found and not isinstance(error, OSError):
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the operating system says within the block without a name is said of a file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def synced(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk; where a directory cannot be asked, nothing."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def remove_leftovers(*folders: Path, deep: bool = False) -> list[Path]:
    """Remove what killed processes of this machine were writing when they ended; returns what was removed.

    What a process that is still there is writing stays, and so does what another machine was writing.

    Args:
        folders: where to look; they need not exist.
        deep: look into the folders inside them, too; links are not followed.
    """
    removed = []
    for folder in folders:
        for place, directories, names in os.walk(folder, onerror=lambda _: None):
            for name in (*directories, *names):
                scratch, old = _SCRATCH.fullmatch(name), _OLD.fullmatch(name)
                process, machine = scratch.groups()[:2] if scratch else old.groups()[1:] if old else ("0", "")
                if machine != HOST or is_alive(int(process)):
                    continue
                if old and not Path(place, old[1]).exists():
                    Path(place, name).rename(Path(place, old[1]))
                    continue
                _remove(Path(place, name))
                removed.append(Path(place, name))
            directories[:] = [name for name in directories if deep and not _SCRATCH.fullmatch(name)]
    return removed


def file_digest(path: Path) -> str:
    """Digest of a file's content."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_inside(path: Path, folder: Path) -> None:
    """Refuse to write to a path that links lead out of a folder.

    Args:
        path: what is to be written, in the folder by its name.
        folder: may itself be a link.

    Raises:
        ValueError: a link on the way leads elsewhere.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} leads out of {folder}, to {path.resolve()}: remove the link; nothing was written")


def check_links(path: Path, folder: Path) -> None:
    """Refuse to write to a path in which any link, however deep, leads out of a folder.

    Args:
        path: file or directory, in the folder by its name; it need not exist.
        folder: may itself be a link.

    Raises:
        ValueError: a link leads elsewhere.
    """
    check_inside(path, folder)
    for place, folders, names in os.walk(path):
        for one in map(Path(place).joinpath, (*folders, *names)):
            if one.is_symlink():
                check_inside(one, folder)


def check_not_source(out: str | Path, *sources: str | Path, option: str = "out", inside: bool = False) -> None:
    """Refuse to write over what is read.

    Args:
        out: what is to be written.
        sources: what is read; they need not exist.
        option: name of the option that gives ``out``.
        inside: ``out`` may lie in a directory that is read.

    Raises:
        ValueError: both are one file or directory, whatever it is called.
    """
    target = Path(out)
    for source in map(Path, sources):
        same = target.resolve() == source.resolve()
        if same or (target.exists() and source.exists() and target.samefile(source)):
            raise ValueError(f"--{option} {out} is what is read: choose another name for what is written")
        if not inside and source.is_dir() and target.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"--{option} {out} lies in the directory that is read, {source}: choose another place")


def occupied(directory: Path) -> bool:
    """Whether writing a directory would take the place of something: of a file, or of a directory that holds any."""
    return directory.is_file() or (directory.is_dir() and any(directory.iterdir()))


@contextmanager
def directory_written_atomically(directory: Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch directory that takes the place of another when the block ends well, and is removed when it does not.

    What appears has the mode of the directory that it replaces, and that of any new one where there was none.

    Args:
        directory: what appears; it need not exist.
        overwrite: replace what is there.

    Raises:
        ValueError: something is there already.
    """
    directory = Path(directory).resolve()
    if not overwrite and occupied(directory):
        raise ValueError(f"{directory} is there already: choose another directory, or overwrite it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.is_mount():
        raise ValueError(f"something is mounted at {directory}, which cannot be replaced: name a folder inside it")
    scratch = scratch_beside(directory)
    scratch.mkdir()
    try:
        mode = _mode(directory if directory.is_dir() else scratch)
        scratch.chmod(0o700)
        yield scratch
        scratch.chmod(mode)
        for place, _, names in os.walk(scratch):
            for name in names:
                synced(Path(place, name))
        _exchange(scratch, directory)
        synced(directory.parent)
    except Exception as error:
        _raise_of_system(error, directory)
        raise
    finally:
        _remove(scratch)


def _exchange(scratch: Path, directory: Path) -> None:
    """Put one directory where another may be; the caller removes what is then in the scratch directory's place."""
    if not directory.exists():
        scratch.rename(directory)
    elif not _swapped(scratch, directory):
        # For a moment there is none in its place; if the process is killed then, `remove_leftovers` puts the old back.
        old = directory.with_name(f".{directory.name}.{os.getpid()}-{HOST}-{secrets.token_hex(4)}.old")
        directory.rename(old)
        try:
            scratch.rename(directory)
        except OSError:
            old.rename(directory)
            raise
        _remove(old)


def _swapped(one: Path, other: Path) -> bool:
    """Exchange two names in one step, which Linux can and Python does not offer; ``False`` where that is impossible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, indented, atomically."""
    with written_atomically(path) as scratch:
        scratch.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")


RENAMED = {"codes": "codebook_size"}
"""Keys of model configurations by their names before version 0.2."""


def read_config(path: Path) -> dict[str, Any]:
    """A model's ``config.json``; keys of earlier versions get the names they have today."""
    values = read_json_object(path)
    return {RENAMED.get(key, key): value for key, value in values.items()}


def json_line(row: Any) -> str:
    """One row as a line of JSON, with its line end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_json_lines(path: Path, rows: Iterable[Any]) -> int:
    """Write one JSON document per line, atomically; return how many."""
    count = 0
    with written_atomically(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json_line(row))
            count += 1
    return count


def read_json_lines(path: Path, cut_tail: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and object of each line that is not blank.

    Args:
        path: the file.
        cut_tail: silently leave out a last line without a line end: its writer was killed.

    Raises:
        ValueError: a line is not a JSON object; the message names file and line.
    """
    for number, line in byte_lines(path):
        if not line.strip() or (cut_tail and not line.endswith(b"\n")):
            continue
        yield number, row_of(line, f"{path}:{number}")
