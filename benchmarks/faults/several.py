# SPDX-License-Identifier: Apache-2.0
"""Two processes that share the work, and a signal for one of them or for both: all end alike, and the work resumes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from forked import Ended, Started
from kills import STOPPED, _verified, content, in_time, leftovers, made, prepared
from place import Place

SHARED = ("fit", "test", "sample", "judge", "prepare", "score")
"""Commands that share their work."""
_REGISTERED = "All distributed processes registered"


def _port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def started(place: Place, command: str) -> list[Started]:
    """Both processes, as a shell on each of two machines starts them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    args = [*place.args(command), "--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    both = []
    for rank in range(2):
        folder = place.work.parent / f"machine{rank}"
        folder.mkdir(exist_ok=True)
        both.append(Started(args, folder, {**shared, "NODE_RANK": str(rank)}))
    return both


def ended(both: list[Started]) -> list[Ended]:
    """How they end."""
    found = [one.wait() for one in both]
    return [one for one in found if one is not None]


def undisturbed(place: Place, command: str) -> tuple[dict[str, str], float]:
    """What two processes make, by the name of the file, and the seconds that takes."""
    prepared(place, command)
    ends = ended(started(place, command))
    if any(one.code for one in ends):
        raise RuntimeError(f"{command} fails in two processes: {[one.err[-2000:] for one in ends]}")
    return {path.name: content(path) for path in place.outputs(command)}, max(one.seconds for one in ends)


def stopped(place: Place, command: str, number: int, share: float, whom: tuple[int, ...]) -> dict[str, Any]:
    """Ask processes of a command to end, some share into its work, and give the same command again.

    All must end with 128 plus the number of the signal, whichever of them got it. If it came too late, as
    :func:`kills.in_time` says, each may give 0; and so may one that did not get it and had taken leave of the others
    before, if all the work is done: there is nobody left who could tell it.

    Args:
        place: where it works.
        command: which.
        number: of the signal.
        share: of the seconds that it takes undisturbed.
        whom: ranks that get the signal.
    """
    expected, seconds = undisturbed(place, command)
    prepared(place, command)
    both = started(place, command)
    # A process that has not met the others yet has nobody to tell.
    while _REGISTERED not in both[0].logs[1].read_text(errors="replace") and time.monotonic() < both[0].begun + 60:
        time.sleep(0.01)
    asked = max(time.monotonic() + 0.05, both[0].begun + share * seconds)
    early, there = both[0].wait(asked), made(place, command)
    if early is None:
        for rank in whom:
            os.kill(both[rank].process, number)
    ends = [early or both[0].wait(), both[1].wait()]
    codes = [one.code for one in ends if one is not None]
    late = early is not None or not in_time(there, made(place, command))
    whole = {path.name: content(path) for path in place.outputs(command) if path.exists()} == expected
    asked_to = STOPPED[signal.Signals(number)]
    wrong = [
        code for rank, code in enumerate(codes) if code != asked_to and not _may_end(late, rank in whom, whole, code)
    ]
    faults = [f"codes {codes}"] if wrong else []
    faults += [f"a traceback: {one.err[-1500:]}" for one in ends if one is not None and one.traceback]
    faults += [f"said: {one.err[-1500:]}" for one in ends if one is not None and one.code not in (0, 128 + number)]
    faults += [f"{name} is left over" for name in leftovers(place)]
    again = ended(started(place, command))
    faults += [f"cannot resume: {one.code}: {one.err[-800:]}" for one in again if one.code]
    faults += _verified(place, command, expected, "resumed")
    slowest = max(one.seconds for one in ends if one is not None)
    return {
        "command": command,
        "signal": signal.Signals(number).name,
        "to": list(whom),
        "late": late,
        "codes": codes,
        "seconds_after_signal": round(slowest - (asked - both[0].begun), 2),
        "faults": faults,
    }


def _may_end(late: bool, told: bool, whole: bool, code: int) -> bool:
    """Whether a process may have ended well although one of them was asked to end."""
    return code == 0 and (late or (whole and not told))


def all_stopped(place: Place) -> list[dict[str, Any]]:
    """Every command that shares its work; the signal to all, to the first and to the second process."""
    return [stopped(place, command, signal.SIGTERM, 0.45, whom) for command in SHARED for whom in ((0, 1), (0,), (1,))]


if __name__ == "__main__":
    sys.exit(f"run {Path(__file__).with_name('campaign.py')}")
