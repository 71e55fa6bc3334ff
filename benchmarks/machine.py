# SPDX-License-Identifier: Apache-2.0
"""Where and with what a benchmark was run, and where its results go."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).parent


def machine(device: str = "cpu") -> dict[str, Any]:
    """Commit, versions, device and threads."""
    git = ["git", "-C", str(HERE)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = bool(subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        commit, changed = "unknown", False
    return {
        "commit": commit + ("+changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class Clock:
    """Processor and wall-clock seconds since the last :meth:`start`; waits for a GPU to finish first.

    On a GPU the processor's seconds say nothing of the work, so ratios are then taken of the wall clock.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.start()

    def _now(self) -> tuple[float, float]:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return time.process_time(), time.perf_counter()

    def start(self) -> None:
        """Begin to count."""
        self.begun = self._now()

    def read(self) -> dict[str, float]:
        """Seconds so far."""
        cpu, wall = self._now()
        return {"cpu": cpu - self.begun[0], "wall": wall - self.begun[1]}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median and range over turns of one time through the other of the same turn."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": round(median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3)}


def save(name: str, results: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return path
