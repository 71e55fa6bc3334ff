# SPDX-License-Identifier: Apache-2.0
"""What the start of a command consists of: CPU seconds of its imports, one process each, and whose modules they are.

Every part is imported by a fresh interpreter, turn by turn; the parts contain one another, so what a part adds is its
difference from the one before. Shares are those of ``python -X importtime`` over the last part: seconds in the modules
themselves, by package. Python's compiled files are there already.

    python benchmarks/start.py --rounds 5
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from statistics import median
from typing import Any

from jsonargparse import auto_cli
from machine import machine, save

PARTS = {
    "python": "pass",
    "torch": "import torch",
    "lightning": "import lightning.pytorch.cli",
    "command": "import tts_align.cli.lightning",
    "models": "import tts_align.cli.lightning, tts_align.cli.trainer, tts_align.models.policy.qwen2",
}
"""What is imported, each containing the one before."""
LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
OPTIONAL = ("scipy", "pandas", "matplotlib")
"""Packages that others look for and load where they are installed."""


def cpu_seconds(code: str) -> float:
    """CPU seconds of a fresh interpreter that runs some code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def shares(code: str) -> dict[str, float]:
    """Seconds in the modules of each package while some code is run."""
    command = [sys.executable, "-X", "importtime", "-c", code]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=_environment()).stderr
    found: Counter[str] = Counter()
    for microseconds, name in LINE.findall(lines):
        found[name.partition(".")[0]] += int(microseconds) / 1e6
    return dict(found)


def measure(rounds: int = 5) -> dict[str, Any]:
    """Medians of all parts, and packages from the one that takes longest."""
    seconds: dict[str, list[float]] = {name: [] for name in PARTS}
    packages: list[dict[str, float]] = []
    for code in PARTS.values():
        cpu_seconds(code)  # compiled files are written
    for _ in range(rounds):
        for name, code in PARTS.items():
            seconds[name].append(round(cpu_seconds(code), 2))
        packages.append(shares(list(PARTS.values())[-1]))
    names = {name for one in packages for name in one}
    by_package = {name: round(median(one.get(name, 0.0) for one in packages), 2) for name in names}
    largest = dict(sorted(by_package.items(), key=lambda pair: -pair[1])[:12])
    return {
        "cpu_seconds": {name: round(median(some), 2) for name, some in seconds.items()},
        "rounds": seconds,
        "modules_of": largest,
        "installed": {name: find_spec(name) is not None for name in OPTIONAL},
    }


def main(rounds: int = 5, out: str = "start") -> dict[str, Any]:
    """Measure and save.

    Args:
        rounds: how often each part is imported.
        out: name of the file in ``results``.
    """
    found = measure(rounds)
    save(out, {**machine(), **found})
    return found


if __name__ == "__main__":
    print(auto_cli(main, as_positional=False))
