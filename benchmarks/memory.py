# SPDX-License-Identifier: Apache-2.0
"""Memory and time of an optimiser step, layers kept and computed again, beside the estimate that ``fit`` prints.

    OMP_NUM_THREADS=1 python benchmarks/memory.py    # some minutes of one core; writes results/memory.json

Each measurement is a process of its own: AdamW, SFT's loss, random weights, one micro-batch; what the process takes at
most beyond what it holds before the first step. ``wide`` has CosyVoice's width and vocabulary, a quarter of its layers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from machine import machine, save
from sampling import BIG, COSYVOICE, random_model

from tts_align.models.base.layout import TokenRow, collate
from tts_align.training.memory import estimate

WIDE = replace(
    BIG, hidden_size=896, layers=6, heads=14, key_value_heads=2, intermediate_size=4864, text_vocabulary=2000
)
SIZES = {"small": BIG, "larger": COSYVOICE, "wide": WIDE}


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(one for one in lines if one.startswith(name)).split()[1]) * 1024


def one(size: str, rows: int, tokens: int, recompute: bool, steps: int) -> dict[str, Any]:
    """Measure in this process."""
    model = random_model(SIZES[size])
    model.backbone.recompute = recompute
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    batch = collate([TokenRow((1,) * 20, (2,) * (tokens - 22))] * rows, model.layout)
    found = estimate(model, model.parameters(), [optimizer], len(batch.token))
    assert found is not None
    before, seconds = _resident("VmRSS"), []
    for _ in range(steps):
        begun = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        (-model(batch).logp.mean()).backward()
        optimizer.step()
        seconds.append(time.process_time() - begun)
    return {"measured_bytes": _resident("VmHWM") - before, "estimated_bytes": found.total, "cpu_seconds": min(seconds)}


def main(
    sizes: tuple[str, ...] = ("small", "larger", "wide"),
    rows: int = 8,
    tokens: int = 160,
    steps: int = 3,
    out: str = "memory",
    here: str = "",
) -> None:
    """Measure, print and save.

    Args:
        sizes: of the model.
        rows: in the micro-batch.
        tokens: text and speech tokens of each.
        steps: of each measurement; the fastest counts.
        out: name of the results.
        here: measure this one case in this process: size and true or false, with a comma.
    """
    if here:
        size, again = here.split(",")
        print(json.dumps(one(size, rows, tokens, again == "true", steps)))
        return
    found = []
    for size in sizes:
        pair = {}
        for again in ("false", "true"):
            words = [f"--rows={rows}", f"--tokens={tokens}", f"--steps={steps}", f"--here={size},{again}"]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
            pair["recomputed" if again == "true" else "kept"] = json.loads(done.stdout.splitlines()[-1])
        kept, other = pair["kept"], pair["recomputed"]
        found.append(
            {
                "size": size,
                **pair,
                "memory_ratio": round(other["measured_bytes"] / kept["measured_bytes"], 3),
                "time_ratio": round(other["cpu_seconds"] / kept["cpu_seconds"], 3),
                "estimate_to_measured": {
                    name: round(one_["estimated_bytes"] / one_["measured_bytes"], 3) for name, one_ in pair.items()
                },
            }
        )
        print(found[-1], flush=True)
        path = save(out, {"machine": machine("cpu"), "rows": rows, "tokens": tokens, "found": found})
    print(path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
