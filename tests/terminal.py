"""Programs on a terminal of their own."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from places import ROOT


def on_a_terminal(code: str, folder: Path) -> list[str]:
    """Lines that a program leaves on a terminal's screen; what a carriage return takes back is gone."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, cwd=folder, env=environment) as run:
        os.close(slave)
        shown = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # the program has ended
                break
            if not part:
                break
            shown += part
        assert run.wait(120) == 0, shown.decode()
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown.decode())  # without colours
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in plain.split("\n")]
