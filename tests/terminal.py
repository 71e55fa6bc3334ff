# SPDX-License-Identifier: Apache-2.0
"""Programs on a terminal of their own."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from multiprocessing.connection import wait
from pathlib import Path

from processes import FORKS


def on_a_terminal(code: str, folder: Path) -> list[str]:
    """Lines that a program leaves on a terminal's screen; what a carriage return takes back is gone."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    run = FORKS.Process(target=_run, args=(code, str(folder), os.ttyname(slave)))
    run.start()
    shown = b""
    while master in (ready := wait([master, run.sentinel], timeout=120)):  # the sentinel alone: all has been read
        shown += os.read(master, 65536)
    assert ready, f"did not end in 120 seconds after {shown.decode()}"
    run.join()
    for end in (master, slave):
        os.close(end)
    assert run.exitcode == 0, shown.decode()
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown.decode())  # without colours
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in plain.split("\n")]


def _run(code: str, folder: str, terminal: str) -> None:
    """In the process: be what ``python -c CODE`` would be on a terminal."""
    opened = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    for number in (1, 2):
        os.dup2(opened, number)
    os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
    os.chdir(folder)
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
