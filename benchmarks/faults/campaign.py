# SPDX-License-Identifier: Apache-2.0
"""Everything that can go wrong, many times: kills, signals, also to one of two, disks, two at once, hostile inputs.

python benchmarks/faults/campaign.py --out benchmarks/results/faults.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import disks  # noqa: E402
import hostile  # noqa: E402
import hostile_commands  # noqa: E402
import kills  # noqa: E402
import several  # noqa: E402
from forked import forked, preload  # noqa: E402
from machine import machine  # noqa: E402
from place import COMMANDS, SIGNALLED, Place, make_inputs  # noqa: E402

PARTS = ("kills", "signals", "several", "disks", "hostile")


def made_place(folder: Path, work: Path, steps: int = 12) -> Place:
    """Inputs of all commands, made by the commands themselves, in processes of their own."""
    place = Place(folder / "inputs", work, steps)
    in_a_copy(lambda: make_inputs(place.inputs, steps))
    for command, made in (("sample", "drawn.jsonl"), ("judge", "heard.jsonl"), ("fit", "run"), ("test", "run")):
        if command != "test":
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        ended = forked(place.args(command), work)
        if ended.code:
            raise RuntimeError(f"{command}: {ended.err[-2000:]}")
        if command != "fit":
            (shutil.copytree if made == "run" else shutil.copy)(work / made, place.inputs / made)
    return place


def in_a_copy(work: Any) -> Any:
    """Call a function in a copy of this process, so that this one never computes; gives its result through JSON."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            result = work()
            with os.fdopen(write, "w") as pipe:
                json.dump(result, pipe, default=str)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(process, 0)
    if status:
        raise RuntimeError("a copy of this process has failed")
    return json.loads(text)


def hostile_inputs(place: Place, folder: Path, cases: int, seed: int) -> dict[str, Any]:
    """Spoilt inputs and hostile names."""
    from tiny import save_policy

    (folder / "model").mkdir(exist_ok=True)
    result = hostile.campaign(place, save_policy(folder / "model" / "policy"), cases, seed)
    odd = hostile_commands.names(folder, cases // 10, seed)
    return {
        "cases": sum(result.cases.values()),
        "of_kind": dict(result.cases),
        "ends": dict(result.ends),
        "names": cases // 10,
        "faults": result.faults + odd,
    }


def count_faults(node: Any) -> int:
    """Faults in the results of all campaigns."""
    if isinstance(node, dict):
        return sum(len(value) if key == "faults" else count_faults(value) for key, value in node.items())
    return sum(map(count_faults, node)) if isinstance(node, list) else 0


def main() -> None:
    """Run the campaigns and save what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--kills", type=int, default=20, help="kills of each command")
    parser.add_argument("--cases", type=int, default=2500, help="hostile inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the commands work")
    parser.add_argument("--other", type=Path, default=Path("/dev/shm"), help="another file system")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    args = parser.parse_args()
    began = time.monotonic()
    # Folders of its own: what else lies in those that were named is nobody's to remove.
    args.folder, args.other = (Path(tempfile.mkdtemp(prefix="faults-", dir=one)) for one in (args.folder, args.other))
    preload()
    place = made_place(args.folder, args.folder / "work/here")
    # The outputs on one file system, and the folder for temporary files on the other; then the other way round.
    there = Place(place.inputs, args.other / "work/here", place.steps)
    temporary = {place: args.other / "temporary", there: args.folder / "temporary"}
    for one in temporary.values():
        one.mkdir()
    results: dict[str, Any] = {}
    if "kills" in args.parts:
        half = args.kills // 2
        results["kills"] = [
            {
                "files": "disk" if where is place else "memory",
                **kills.killed(where, command, half, args.seed, temporary[where]),
            }
            for where in (place, there)
            for command in COMMANDS
        ]
    if "signals" in args.parts:
        results["signals"] = [
            kills.stopped(place, command, number, share)
            for command in SIGNALLED
            for number, share in ((signal.SIGTERM, 0.4), (signal.SIGINT, 0.7))
        ]
    if "several" in args.parts:
        results["several"] = several.all_stopped(place)
    if "disks" in args.parts:
        results["disks"] = disks.all_disks(place, args.other / "mounted")
    if "hostile" in args.parts:
        results["hostile"] = in_a_copy(lambda: hostile_inputs(there, args.folder, args.cases, args.seed))
    found = count_faults(results)
    if args.out is not None:
        command = f"python benchmarks/faults/campaign.py --kills {args.kills} --cases {args.cases} --seed {args.seed}"
        report = {"command": command, "machine": machine(), "seconds": round(time.monotonic() - began), "faults": found}
        text = json.dumps(report | results, ensure_ascii=False, indent=1)
        for folder, name in ((args.folder, "FOLDER"), (args.other, "OTHER")):  # what was said names files in them
            text = text.replace(str(folder), name)
        args.out.write_text(text + "\n", "utf-8")
    for folder in (args.folder, args.other):
        shutil.rmtree(folder, ignore_errors=True)
    print(
        json.dumps(results, ensure_ascii=False, indent=1) if found else f"no faults in {time.monotonic() - began:.0f} s"
    )
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
