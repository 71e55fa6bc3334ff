# SPDX-License-Identifier: Apache-2.0
"""Memory and time of an optimiser step, layers kept and computed again, beside the estimate that ``fit`` prints.

    OMP_NUM_THREADS=1 python benchmarks/memory.py    # some minutes of one core; writes results/memory.json

Each measurement is a process of its own: AdamW, SFT's loss, random weights, one micro-batch; what the process takes at
most beyond what it holds before the first step, which on a CPU contains what the C library keeps for later. The same
step is counted tensor by tensor too (PyTorch's ``MemTracker``), which is what a GPU would have to hold. ``wide`` has
CosyVoice's width and vocabulary, a quarter of its layers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from machine import machine, save
from sampling import BIG, COSYVOICE, random_model
from torch.distributed._tools.mem_tracker import MemTracker

from tts_align.models.base.layout import TokenRow, collate
from tts_align.training.memory import estimate

WIDE = replace(
    BIG, hidden_size=896, layers=6, heads=14, key_value_heads=2, intermediate_size=4864, text_vocabulary=2000
)
CPU = torch.device("cpu")
SIZES = {"small": BIG, "larger": COSYVOICE, "wide": WIDE}


Step = Callable[[], None]


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

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (-model(batch).logp.mean()).backward()
        optimizer.step()

    before, seconds = _resident("VmRSS"), []
    for _ in range(steps):
        begun = time.process_time()
        step()
        seconds.append(time.process_time() - begun)
    measured = _resident("VmHWM") - before
    return {
        "measured_bytes": measured,
        "counted_bytes": counted(step, model, optimizer),
        "estimated_bytes": found.total,
        "cpu_seconds": round(min(seconds), 3),
    }


def counted(step: Step, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that a step holds at once, at most, beyond the weights."""
    optimizer.zero_grad(set_to_none=True)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        step()
    peak = {str(getattr(kind, "value", kind)): size for kind, size in tracker.get_tracker_snapshot("peak")[CPU].items()}
    return peak["Total"] - peak["Parameter"]


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
                "counted_ratio": round(other["counted_bytes"] / kept["counted_bytes"], 3),
                **{
                    f"estimate_to_{what}": {
                        name: round(case["estimated_bytes"] / case[f"{what}_bytes"], 3) for name, case in pair.items()
                    }
                    for what in ("measured", "counted")
                },
            }
        )
        print(found[-1], flush=True)
        path = save(out, {"machine": machine("cpu"), "rows": rows, "tokens": tokens, "found": found})
    print(path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
