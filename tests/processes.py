# SPDX-License-Identifier: Apache-2.0
"""Processes as launchers start them: each with its environment and a working directory of its own.

:func:`launched` starts Python anew, as a launcher does. :func:`forked` runs the same command lines in copies of one
process that has imported everything already: a start of Python with PyTorch and Lightning costs five seconds of a
core, and most tests are about what processes do together, not about how they start.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from places import ROOT


def free_port() -> str:
    """A port of this machine that nobody uses now, below those that the system gives to others in the meantime."""
    draw = random.SystemRandom()  # two workers must not draw the same
    while True:
        port = draw.randrange(12_000, 32_000)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return str(port)


def launched(
    commands: Sequence[Sequence[str]], folders: Sequence[Path], changes: Sequence[Mapping[str, str]], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """Start processes side by side and wait for all of them; one that hangs fails the test, and ends."""
    started = []
    for command, folder, change in zip(commands, folders, changes, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **change}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    done = []
    try:
        for process in started:
            out, err = process.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return done


FORKS = multiprocessing.get_context("forkserver")
_OURS = ("cli.entry", "cli.help", "cli.lightning", "cli.sample", "evaluation.judges.ctc", "training.interfaces")
_OURS += ("models.codec.vocoder", "models.flow.token_flow", "models.policy.qwen2", "models.reward.model")
_THEIRS = ("pandas", "peft", "pytest", "torch.utils.tensorboard")  # pyarrow looks for pandas when it makes an array
FORKS.set_forkserver_preload([*(f"tts_align.{name}" for name in _OURS), *_THEIRS])


def ranks(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of so many processes of one machine."""
    together = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    return [{**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def forked(
    commands: Sequence[Sequence[str]],
    folders: Sequence[Path],
    changes: Sequence[Mapping[str, str]],
    timeout: float = 300,
) -> list[subprocess.CompletedProcess[str]]:
    """Command lines of Python side by side, in processes that have imported the package before they begin.

    Args:
        commands: ``[sys.executable, "-m", module, ...]`` or ``[sys.executable, script, ...]``.
        folders: working directory of each.
        changes: of the environment, for each.
        timeout: seconds after which all are ended and the test fails.

    Returns:
        Exit status and what was written, for each.
    """
    path = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests", ROOT / "tests/training"))
    started = []
    said = Path(tempfile.mkdtemp(prefix="said-"))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path  # of the server, which starts with the first process
    try:
        for number, (command, folder, change) in enumerate(zip(commands, folders, changes, strict=True)):
            folder.mkdir(parents=True, exist_ok=True)
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **change}
            files = (str(said / f"{number}.out"), str(said / f"{number}.err"))
            one = FORKS.Process(target=_run, args=(list(command[1:]), str(folder), environment, *files))
            one.start()
            started.append(one)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    end = time.monotonic() + timeout
    try:
        while any(one.is_alive() for one in started):
            assert time.monotonic() < end, f"{list(commands[0])} did not end in {timeout} seconds"
            wait([one.sentinel for one in started if one.is_alive()], timeout=1)
    finally:
        for one in started:
            one.kill()
            one.join()
    done = []
    for number, one in enumerate(started):
        out, err = (
            path.read_text() if path.exists() else "" for path in (said / f"{number}.out", said / f"{number}.err")
        )
        done.append(subprocess.CompletedProcess(commands[number], one.exitcode or 0, out, err))
    shutil.rmtree(said)
    return done


def side_by_side(function: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """``function(rank, *arguments)`` of a test's own module in so many processes; one that fails fails the test."""
    started = [FORKS.Process(target=function, args=(rank, *arguments)) for rank in range(count)]
    for one in started:
        one.start()
    for one in started:
        one.join(120)
    codes = [one.exitcode for one in started]
    for one in started:
        one.kill()
    assert codes == [0] * count


def in_two_processes(folder: Path, *words: str) -> str:
    """``tts-align WORDS`` in two processes of one group on the CPU; what both wrote to their standard output."""
    command = [sys.executable, "-m", "tts_align", *words]
    done = forked([command] * 2, [folder] * 2, ranks(2))
    for one in done:
        assert one.returncode == 0, one.stderr
    return "".join(one.stdout for one in done)


def _run(words: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """In the process: be what ``python WORDS`` would be."""
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    rank_zero_only.rank = _get_rank() or 0  # read once, at import
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
