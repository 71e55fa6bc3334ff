# SPDX-License-Identifier: Apache-2.0
"""What a newcomer gets of ``recipes/e2e.yaml`` from a clean folder: how long it takes, what it ends with, what is kept.

    python benchmarks/e2e_recipe.py     # the command of the recipe itself, once

Writes ``results/e2e_recipe.json``: wall and processor seconds, the test's summary for the policy of stage 2 (``base``
there) and for the recipe's end, and what ``KeepBase`` heard and decided.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from machine import HERE, machine, save

from tts_align.training.callbacks.keep_base import KeepBase

HEARD = ("accuracy", "cer", "nearest_cer")


def decided(run: Path) -> dict[str, Any]:
    """What the callback noted in the run's last checkpoint."""
    callbacks = torch.load(run / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)["callbacks"]
    (state,) = (value for name, value in callbacks.items() if KeepBase.__name__ in name)
    return {"held_out": state["found"], "kept_base_because": state["kept"]}


def tested(run: Path) -> dict[str, Any]:
    """The summary of the test, in short: who, and each rate with its interval."""
    summary = json.loads((run / "test/summary.json").read_text("utf-8"))
    return {who: {name: summary[who][name] for name in HEARD} for who in ("base", "aligned") if who in summary}


def main(run: Path = Path("runs/e2e_recipe"), threads: int = 1, options: str = "", out: str = "e2e_recipe") -> None:
    """Fit and test the recipe in a folder that must not exist, and write the results.

    Args:
        run: the run's directory.
        threads: CPU threads.
        options: further options of the command, for a short trial.
        out: name of the results.
    """
    if run.exists():
        raise FileExistsError(f"{run} is there: the recipe starts from a clean folder, name another or remove it")
    words = [
        "fit",
        "--config",
        "recipes/e2e.yaml",
        "--run.directory",
        str(run.absolute()),
        "--run.threads",
        str(threads),
    ]
    words += shlex.split(options)
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "tts_align", *words], check=True, cwd=HERE.parent)
    seconds = time.monotonic() - begin
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    results = {
        "machine": machine() | {"load": round(os.getloadavg()[0], 1)},
        "command": f"tts-align {shlex.join(words)}".replace(str(run.absolute()), str(run)),
        "wall_seconds": round(seconds),
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
        "test": tested(run),
        **decided(run),
    }
    print(save(out, results))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
