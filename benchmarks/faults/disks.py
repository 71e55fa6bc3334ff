# SPDX-License-Identifier: Apache-2.0
"""Disks that are full or cannot be written, files that are not what they should be, and two commands at once."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import Started, forked
from kills import _verified, leftovers, prepared, undisturbed
from place import COMMANDS, Place

LIMITS = (20_000, 200_000, 1_000_000)
"""Largest file that a process may write, in bytes: each stops the commands somewhere else."""


def full(place: Place, command: str, limit: int) -> dict[str, Any]:
    """A command on a disk that is full after so many bytes of a file, and then once more with room.

    Args:
        place: where it works.
        command: which.
        limit: bytes.
    """
    expected, _ = undisturbed(place, command)
    prepared(place, command)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # What the command says goes to files, too: the limit holds for them, so they are opened as pipes' ends.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    ended = forked(place.args(command), place.work, before=limited)
    faults = _said(ended.err, ended.code, limit >= 2_000)
    faults += [f"{name} is left over" for name in leftovers(place)]
    again = forked(place.args(command), place.work)
    if again.code:
        faults.append(f"cannot go on with room: {again.code}: {again.err[-500:]}")
    faults += _verified(place, command, expected, "with room")
    return {"command": command, "limit_bytes": limit, "code": ended.code, "said": _line(ended.err), "faults": faults}


def small_disk(place: Place, command: str, folder: Path, megabytes: int) -> dict[str, Any] | None:
    """The same on a file system of so many megabytes, where one can be mounted; ``None`` where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.system(f"mount -t tmpfs -o size={megabytes}m none {folder} 2>/dev/null"):
        return None
    try:
        disk = Place(place.inputs, folder / "work", place.steps)
        prepared(disk, command)
        filler = folder / "filler"
        free = shutil.disk_usage(folder).free
        filler.write_bytes(b"\0" * max(0, free - 50_000))
        ended = forked(disk.args(command), disk.work)
        faults = _said(ended.err, ended.code, True)
        faults += [f"{name} is left over" for name in leftovers(disk)]
        filler.unlink()
        again = forked(disk.args(command), disk.work)
        if again.code:
            faults.append(f"cannot go on with room: {again.code}: {again.err[-500:]}")
        return {
            "command": command,
            "megabytes": megabytes,
            "code": ended.code,
            "said": _line(ended.err),
            "faults": faults,
        }
    finally:
        os.system(f"umount {folder}")


def _said(err: str, code: int, writes: bool) -> list[str]:
    """What is wrong with how a command that could not write has ended."""
    faults = []
    if "Traceback (most recent call last)" in err:
        faults.append(f"a traceback: {err[-800:]}")
    if code not in (0, 2) and writes:
        faults.append(f"ended with {code}: {err[-500:]}")
    if "ought not to happen" in err:
        faults.append(f"not said in plain words: {err[-500:]}")
    return faults


def _line(err: str) -> str:
    return err.partition("tts-align: error: ")[2].partition("\n")[0][:200]


def read_only(place: Place, command: str) -> dict[str, Any]:
    """A command whose place cannot be written: a file stands where its folder should be, or it has no permission."""
    faults = []
    for name, spoil in _SPOILED.items():
        prepared(place, command)
        target = place.run if command in ("fit", "test", "export") else place.work
        made = spoil(target, place.outputs(command)[0])
        ended = forked(place.args(command), place.work.parent)
        faults += [f"{name}: {one}" for one in _said(ended.err, ended.code, True)]
        if ended.code == 0 and not made:
            faults.append(f"{name}: ended as if all were well")
    return {"command": command, "ways": list(_SPOILED), "faults": faults}


def _file_for_folder(target: Path, output: Path) -> bool:
    folder = output.parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file")
    return False


def _folder_for_file(target: Path, output: Path) -> bool:
    output.unlink(missing_ok=True)
    (output / "something").mkdir(parents=True)
    return True  # a test and an export may replace it, as it lies inside what they replace


def _link_to_nowhere(target: Path, output: Path) -> bool:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    output.symlink_to("/proc/nowhere/file")
    return True  # the link itself is replaced


_SPOILED: dict[str, Callable[[Path, Path], bool]] = {
    "a file where the folder should be": _file_for_folder,
    "a folder where the file should be": _folder_for_file,
    "a link to nowhere": _link_to_nowhere,
}


def two_at_once(place: Place, command: str) -> dict[str, Any]:
    """The same command twice at the same time: one works, the other is told or finds all done."""
    expected, seconds = undisturbed(place, command)
    prepared(place, command)
    first = Started(place.args(command), place.work)
    time.sleep(seconds / 3)
    other = place.work.parent / "other"
    other.mkdir(exist_ok=True)
    second = Started(place.args(command), other)
    ends = [one.wait() for one in (first, second)]
    faults = []
    codes = [end.code for end in ends if end is not None]
    if 0 not in codes or not set(codes) <= {0, 2}:
        faults.append(f"ended with {codes}: {[end.err[-300:] for end in ends if end is not None]}")
    told = [end for end in ends if end is not None and end.code == 2]
    faults += [f"not told why: {end.err[-300:]}" for end in told if "is being written by `tts-align" not in end.err]
    faults += _verified(place, command, expected, "of two")
    return {"command": command, "codes": codes, "faults": faults}


def all_disks(place: Place, mounted: Path, limits: tuple[int, ...] = LIMITS) -> dict[str, Any]:
    """Every way for every command."""
    small = [small_disk(place, command, mounted, 64) for command in COMMANDS]
    return {
        "full": [full(place, command, limit) for command in COMMANDS for limit in limits],
        "small_disk": [one for one in small if one is not None],
        "read_only": [read_only(place, command) for command in COMMANDS],
        "two_at_once": [two_at_once(place, command) for command in COMMANDS],
    }
