# SPDX-License-Identifier: Apache-2.0
"""What every command stands on: open streams that take any character, a folder that is there, a rank that is meant."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from tts_align.cli.errors import fail

_NUMBERED = ("RANK", "LOCAL_RANK")


def make_ready() -> None:
    """Open streams that the caller has closed, let them take any character, and look whether the folder is there.

    A closed stream leaves its number to the next file that is opened, into which every warning would be written. And a
    name that a terminal's encoding lacks must not end a training that has just finished.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    sys.stdout, sys.stderr = _writable(sys.stdout), _writable(sys.stderr)
    try:
        os.getcwd()
    except FileNotFoundError:
        fail("the current folder was removed: change into one that exists, then give the same command again")
    # A process that takes itself for the second of none leaves everything that is said and saved to the first.
    alone = "WORLD_SIZE" not in os.environ
    if stale := [name for name in _NUMBERED if alone and os.environ.get(name, "0").strip() not in ("", "0")]:
        fail(
            f"{stale[0]} is {os.environ[stale[0]]} in the environment, but WORLD_SIZE is not set, so this process "
            f"would leave it to others to save: `unset {' '.join(stale)}`, or start it by torchrun, which sets both"
        )


def _writable(stream: Any) -> Any:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper):
        whole = stream.encoding.lower().replace("-", "") == "utf8" and stream.errors != "strict"
        if not whole:
            stream.reconfigure(errors="backslashreplace")
    return stream
