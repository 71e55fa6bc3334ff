# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and lines of JSON that say where they are wrong."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

_HERE, _EXCHANGE = -100, 2
"""``AT_FDCWD`` and ``RENAME_EXCHANGE`` of Linux's ``renameat2``."""


_UNSAFE = re.compile(r"[%/\\\0]")


def file_name(name: str) -> str:
    """A name as part of a file's name: what a file's name cannot hold is quoted, so that it stays in its folder.

    >>> file_name("../a b")
    '..%2Fa b'
    """
    return _UNSAFE.sub(lambda found: quote(found[0], safe=""), name)


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A scratch file beside ``path`` that takes its place when the block ends well, and is removed when it does not.

    The scratch file keeps the suffix of ``path``, for writers that go by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def occupied(directory: Path) -> bool:
    """Whether writing a directory would take the place of something: of a file, or of a directory that holds any."""
    return directory.is_file() or (directory.is_dir() and any(directory.iterdir()))


@contextmanager
def directory_written_atomically(directory: Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch directory that takes the place of another when the block ends well, and is removed when it does not.

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
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        yield scratch
        scratch.chmod(0o755)
        _exchange(scratch, directory)
    finally:
        _remove(scratch)


def _exchange(scratch: Path, directory: Path) -> None:
    """Put one directory where another may be; the caller removes what is then in the scratch directory's place."""
    if not directory.exists():
        scratch.rename(directory)
    elif not _swapped(scratch, directory):
        # For a moment there is none in its place. Whoever is killed then finds both beside it.
        old = scratch.with_name(f"{scratch.name}.old")
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
    values = json.loads(Path(path).read_text("utf-8"))
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
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip() or (cut_tail and not line.endswith("\n")):
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected an object with columns, got {type(row).__name__}")
            yield number, row
