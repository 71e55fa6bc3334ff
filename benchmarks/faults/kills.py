# SPDX-License-Identifier: Apache-2.0
"""Killed at random moments, on one file system or two, each command ends with what it would have made undisturbed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

from forked import Ended, Started, forked
from place import COMMANDS, Place

SUMMARY, TABLE = "summary.json", "table"
STOPPED = {signal.SIGTERM: 143, signal.SIGINT: 130}


def content(path: Path) -> str:
    """What a file says: of a checkpoint its weights and progress, of anything else its bytes."""
    if path.suffix != ".ckpt":
        return hashlib.blake2b(path.read_bytes()).hexdigest()
    import torch

    saved = torch.load(path, weights_only=True, map_location="cpu")
    parts = [
        saved["global_step"],
        saved["epoch"],
        {name: v.tolist() for name, v in sorted(saved["state_dict"].items())},
    ]
    return hashlib.blake2b(repr(parts).encode()).hexdigest()


def table(path: Path) -> str:
    """What a summary says of the test itself: the numbers of general sentences are added to it later."""
    found = json.loads(path.read_text("utf-8"))
    found.pop("forgetting", None)
    return repr(found)


def prepared(place: Place, command: str) -> None:
    """Bring the place into the state that a command starts from."""
    if place.work.is_file():  # a campaign may have put one in its place
        place.work.unlink()
    shutil.rmtree(place.work, ignore_errors=True)
    place.work.mkdir(parents=True)
    if command in ("test", "export", "validate"):
        shutil.copytree(place.inputs / "run", place.run)
        shutil.rmtree(place.run / "test")


def undisturbed(place: Place, command: str) -> tuple[dict[str, str], float]:
    """What a command makes, by the name of the file, and the seconds that takes."""
    prepared(place, command)
    ended = forked(place.args(command), place.work)
    if ended.code:
        raise RuntimeError(f"{command} fails undisturbed: {ended.err[-2000:]}")
    return {path.name: content(path) for path in place.outputs(command)}, ended.seconds


def leftovers(place: Place) -> list[str]:
    """Unfinished files, whoever may have begun them."""
    endings = (".lock", ".old", ".tmp", ".new")
    odd = [path for path in place.work.rglob("*") if ".scratch" in path.name or path.name.endswith(endings)]
    return [str(path.relative_to(place.work)) for path in odd]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of a folder, with its size and time."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def killed(place: Place, command: str, kills: int, seed: int, temporary: Path) -> dict[str, Any]:
    """Kill a command at random moments, again and again, and let it end; both until it was killed so often.

    Args:
        place: where it works.
        command: which.
        kills: how often it is killed.
        seed: of the moments.
        temporary: folder for temporary files, on another file system.
    """
    expected, seconds = undisturbed(place, command)
    if (summary := next((path for path in place.outputs(command) if path.name == SUMMARY), None)) is not None:
        expected[TABLE] = table(summary)
    inputs = snapshot(place.inputs)
    draw, faults = random.Random(f"{seed} {command}"), []
    done = ends = 0
    prepared(place, command)
    while done < kills:
        moment = draw.uniform(0, seconds)
        ended = forked(
            place.args(command), place.work, {"TMPDIR": str(temporary)}, signal_after=(moment, signal.SIGKILL)
        )
        done += ended.code == -signal.SIGKILL
        if ended.code == 0:
            ends += 1
            faults += _verified(place, command, expected, f"after {done} kills")
            prepared(place, command)
        elif ended.code != -signal.SIGKILL:
            faults.append(f"kill {done}: ended with {ended.code}: {ended.err[-500:]}")
            prepared(place, command)
        else:
            faults += _whole(place, command, expected, f"kill {done} at {moment:.2f} s")
    ended = forked(place.args(command), place.work, {"TMPDIR": str(temporary)})
    faults += [f"cannot resume: {ended.code}: {ended.err[-500:]}"] if ended.code else []
    faults += _verified(place, command, expected, "at the end")
    faults += [f"inputs have changed: {name}" for name in _changed(inputs, snapshot(place.inputs))]
    faults += [f"left in the folder for temporary files: {one.name}" for one in ours_in(temporary)]
    return {
        "command": command,
        "kills": done,
        "ends": ends + 1,
        "seconds_undisturbed": round(seconds, 2),
        "faults": faults,
    }


def _verified(place: Place, command: str, expected: dict[str, str], when: str) -> list[str]:
    """What is not as it would be undisturbed, of a command that has ended well."""
    faults = [f"{when}: {name} is left over" for name in leftovers(place)]
    for path in place.outputs(command):
        if not path.exists():
            faults.append(f"{when}: {path.name} is missing")
        elif content(path) != expected[path.name]:
            faults.append(f"{when}: {path.name} differs")
    return faults


def _whole(place: Place, command: str, expected: dict[str, str], when: str) -> list[str]:
    """What is broken after a kill: outputs are whole or not there, and a checkpoint that was there still is."""
    faults = []
    if command == "fit":
        from tts_align.training.run import Run

        try:
            if place.outputs("fit")[0].exists():
                Run(place.run).newest()
        except ValueError as error:
            faults.append(f"{when}: {error}")
        return faults
    for path in place.outputs(command):
        if not path.exists() or content(path) == expected[path.name]:
            continue
        if path.name != SUMMARY or table(path) != expected[TABLE]:
            faults.append(f"{when}: {path.name} is there, and differs")
    return faults


def ours_in(temporary: Path) -> list[Path]:
    """Files in a folder for temporary files, but for the note of a session that onnxruntime keeps there."""
    return [one for one in temporary.iterdir() if one.name != ".ses"]


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def made(place: Place, command: str) -> dict[str, tuple[int, int]]:
    """Which outputs a command has made so far, each with its size and time."""
    states = {path.name: path.stat() for path in place.outputs(command) if path.exists()}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def in_time(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> bool:
    """Whether a signal came before a command had ended its work.

    Once its outputs are there, the last look at signals is behind it: it may end with 0, as ``utils/signals.py`` keeps
    a signal for the next look, and there is none. Whoever leaves no outputs has to end as it was asked at any time.

    Args:
        before: what was made when the signal was sent.
        after: what was there when the command had ended.
    """
    return not before or before != after


def stopped(place: Place, command: str, number: int, share: float) -> dict[str, Any]:
    """Ask a command to end, some share into its work, and give the same command again.

    It must end with 128 plus the number of the signal, unless that came too late, as :func:`in_time` says.

    Args:
        place: where it works.
        command: which.
        number: of the signal.
        share: of the seconds that it takes undisturbed.
    """
    expected, seconds = undisturbed(place, command)
    prepared(place, command)
    started = Started(place.args(command), place.work)
    ended = started.wait(started.begun + share * seconds)
    late, there = ended is not None, made(place, command)
    if ended is None:
        started.send(number)
        ended = started.wait()
    assert ended is not None
    late = late or not in_time(there, made(place, command))
    faults = []
    if ended.code != STOPPED[signal.Signals(number)] and (ended.code or not late):
        faults.append(f"ended with {ended.code}: {ended.err[-500:]}")
    if ended.traceback:
        faults.append(f"a traceback: {ended.err[-500:]}")
    faults += [f"{name} is left over" for name in leftovers(place)]
    again: Ended | None = forked(place.args(command), place.work)
    if again is not None and again.code:
        faults.append(f"cannot resume: {again.code}: {again.err[-500:]}")
    faults += _verified(place, command, expected, "resumed")
    name = signal.Signals(number).name
    return {
        "command": command,
        "signal": name,
        "share": round(share, 2),
        "late": late,
        "code": ended.code,
        "faults": faults,
    }


def all_killed(place: Place, kills: int, seed: int, temporary: Path) -> list[dict[str, Any]]:
    """Every command."""
    return [killed(place, command, kills, seed, temporary) for command in COMMANDS]
