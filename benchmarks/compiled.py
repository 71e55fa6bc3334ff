# SPDX-License-Identifier: Apache-2.0
"""Time of a training step and of scoring with compiled layers (``model.policy.init_args.compile``), against plain ones.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py    # some minutes of one core; writes results/compiled.json

One model of random weights twice, the same micro-batches of changing lengths, turn by turn in one process, in CPU time;
log-probabilities and gradients are compared. The first step, with the compiler, is counted apart (wall). No GPU.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from jsonargparse import auto_cli
from machine import machine, ratio, save
from sampling import BIG, COSYVOICE, random_model

from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.policy.backbone import compile_blocks

SIZES = {"small": BIG, "larger": COSYVOICE}


def compare(size: str, rows: int, rounds: int) -> dict[str, Any]:
    """Both by turns; the first two rounds compile and warm up."""
    models = {"plain": random_model(SIZES[size]), "compiled": random_model(SIZES[size])}
    compile_blocks(models["compiled"].backbone)
    layout = models["plain"].layout
    times: dict[str, dict[str, list[float]]] = {name: {"step": [], "scoring": []} for name in models}
    first: dict[str, float] = {}
    for turn in range(rounds + 2):
        batch = collate([TokenRow((1,) * 20, (2 + turn,) * (60 + 13 * turn + row)) for row in range(rows)], layout)
        found = {}
        for name, model in models.items():
            model.zero_grad(set_to_none=True)
            wall, begun = time.perf_counter(), time.process_time()
            logp = model(batch).logp
            (-logp.mean()).backward()
            middle = time.process_time()
            with torch.no_grad():
                model(batch)
            times[name]["step"].append(middle - begun)
            times[name]["scoring"].append(time.process_time() - middle)
            first.setdefault(name, time.perf_counter() - wall)
            found[name] = (logp.detach(), next(model.parameters()).grad)
        torch.testing.assert_close(found["compiled"], found["plain"], rtol=1e-3, atol=1e-5)
    counted = {kind: ratio(times["compiled"][kind][2:], times["plain"][kind][2:]) for kind in ("step", "scoring")}
    return {
        "size": size,
        "compiled_to_plain": counted,
        "first_step_seconds": {k: round(v, 1) for k, v in first.items()},
    }


def main(sizes: tuple[str, ...] = ("small", "larger"), rows: int = 8, rounds: int = 6, out: str = "compiled") -> None:
    """Measure, print and save.

    Args:
        sizes: of the model.
        rows: in a micro-batch.
        rounds: turns that count.
        out: name of the results.
    """
    found = []
    for size in sizes:
        found.append(compare(size, rows, rounds))
        print(found[-1], flush=True)
        path = save(out, {"machine": machine("cpu"), "rows": rows, "rounds": rounds, "found": found})
    print(path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
