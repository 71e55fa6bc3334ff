# SPDX-License-Identifier: Apache-2.0
"""Which processes are still there, for whoever finds what another one has left."""

from __future__ import annotations

import getpass
import hashlib
import os
import socket
from pathlib import Path


def host_name() -> str:
    """Name of this machine."""
    return socket.gethostname()


def _host_digest() -> str:
    """A short name for this machine and this start of it: process numbers mean nothing beyond either."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text() if boot.is_file() else ""
    return hashlib.blake2b(f"{host_name()} {started} {_namespace()}".encode(), digest_size=4).hexdigest()


def _namespace() -> str:
    """The numbering that this process's number belongs to: containers have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


HOST = _host_digest()
"""This machine, since its last start."""


def is_alive(number: int) -> bool:
    """Whether a process of this machine is still there; one that has ended and waits to be collected is not."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return True


def started(number: int) -> str:
    """When a process started, in the machine's own count; empty where that is not known."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def owner() -> str:
    """Who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a number without a name, as in some containers
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"
