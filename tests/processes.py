# SPDX-License-Identifier: Apache-2.0
"""Processes as launchers start them: each with its environment and a working directory of its own."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from places import ROOT


def free_port() -> str:
    """A port of this machine that nobody uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


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
