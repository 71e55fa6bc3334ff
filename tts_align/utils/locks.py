# SPDX-License-Identifier: Apache-2.0
"""One directory or file, one process that writes it: a lock that says who, where and since when."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tts_align.utils.messages import say
from tts_align.utils.processes import HOST, host_name, is_alive, owner, started
from tts_align.utils.readers import ReadError, read_json_object

LOCK = ".lock"
"""Name of the lock of a directory, inside it."""


class LockedError(ValueError):
    """Another process is writing there."""


def lock_of(path: Path) -> Path:
    """The lock of a file to be written, beside it."""
    return path.with_name(f".{path.name}{LOCK}")


@contextmanager
def locked(lock: Path, what: str | Path, command: str, option: str) -> Iterator[None]:
    """Within the block no other process that asks may write the same.

    A lock whose process has ended, on this machine, is taken over, which is said.

    Args:
        lock: the lock's file.
        what: is written.
        command: that writes it.
        option: which names it.

    Raises:
        LockedError: another process has the lock; the message says which.
    """
    fresh = not lock.parent.exists()
    lock.parent.mkdir(parents=True, exist_ok=True)
    mine = {
        "owner": owner(),
        "host": host_name(),
        "process": os.getpid(),
        "command": command,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": HOST,
        "started": started(os.getpid()),
        "number": secrets.token_hex(8),
    }
    with _one_at_a_time(lock.parent):
        _take(lock, mine, what, option)
    try:
        yield
    finally:
        with suppress(OSError, ReadError):
            if read_json_object(lock).get("number") == mine["number"]:
                lock.unlink()
            if fresh:
                lock.parent.rmdir()  # if nothing was written, as when the recipe was wrong


def _take(lock: Path, mine: dict[str, Any], what: str | Path, option: str) -> None:
    if lock.is_symlink() or (lock.exists() and not lock.is_file()):
        raise LockedError(f"{lock} is no file of a lock: remove it")
    if lock.exists():
        try:
            held = read_json_object(lock)
        except ReadError:  # a machine that lost its power while it wrote
            held = {}
        if reason := _ended(held):
            earlier = f"{held.get('command', 'a command')} of process {held.get('process', '?')}"
            say(f"{what}: taking over from {earlier}, {reason}")
        else:
            raise LockedError(
                f"{what} is being written by `tts-align {held.get('command')}` of {held.get('owner')} on "
                f"{held.get('host')} (process {held.get('process')}, since {held.get('since')}): wait for it, or "
                f"choose another --{option}. If that process has surely ended, remove {lock}"
            )
    scratch = lock.with_name(f"{lock.name}.{mine['number']}")
    try:
        scratch.write_text(json.dumps(mine) + "\n", "utf-8")
        os.replace(scratch, lock)
    finally:
        scratch.unlink(missing_ok=True)


def _ended(held: dict[str, Any]) -> str:
    """Why the process that a lock names is surely not there any more; empty if it may be."""
    process = held.get("process")
    if not held or not isinstance(process, int):
        return "whose lock is damaged"
    if held.get("machine") != HOST:
        return ""
    if not is_alive(process) or (held.get("started") and held["started"] != started(process)):
        return "which has ended"
    return ""


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes of this machine that want a lock in a folder look at it one after the other."""
    try:
        import fcntl
    except ImportError:  # no Unix
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network disk without such locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
