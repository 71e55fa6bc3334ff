# SPDX-License-Identifier: Apache-2.0
"""Where the time of an optimiser step goes, here and in TRL: what both must do, and what only one of them does.

    pip install trl    # in an environment of its own that also holds this package
    OMP_NUM_THREADS=1 python benchmarks/trl_profile.py    # ten minutes of one core; writes results/trl_profile.json

The steps are those of ``trl_step.py`` with the reference precomputed, under PyTorch's profiler, which takes time at
every operation itself and counts by the wall clock: the core must not be shared. Operations are put together by kind;
what is left of a step is Python, the profiler and the reading of rows. A multiplication and its addition are two
operations of ``matrix_gflop``; attention's are not counted in it.
"""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any, Literal

from jsonargparse import auto_cli
from machine import machine, save
from torch.profiler import ProfilerActivity, profile
from trl_step import Name, Turns, cases, train, version

KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_addmm_activation"),
    "attention": ("_flash_attention", "_scaled_dot_product", "_efficient_attention"),
    "softmax": ("_softmax", "_log_softmax", "logsumexp", "softmax", "log_softmax"),
    "optimiser and norms of gradients": ("Optimizer.step", "_foreach", "_fused", "linalg_vector_norm"),
    "copies": ("copy_", "cat", "clone", "index", "gather", "scatter", "embedding", "select", "slice", "fill_", "zero_"),
}
"""Kinds of operation by the beginnings of their names, without ``aten::``."""
REST = "element by element"
WARMING_UP = 2


def kind(operation: str) -> str:
    """Kind of an operation; what no list holds is arithmetic element by element."""
    name = operation.removeprefix("aten::")
    return next((one for one, names in KINDS.items() if _among(name, names)), REST)


def _among(name: str, names: tuple[str, ...]) -> bool:
    return any(name == one or (len(one) > 5 and name.startswith(one)) or name == f"{one}_backward" for one in names)


class Profiles(Turns):
    """Turns whose operations are counted, each in the thread of its trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[Counter[str]]] = {"ours": [], "trl": []}

    def begin(self, name: str) -> None:
        """Wait for the turn, and start the profiler in it."""
        super().begin(name)
        self.profiler = profile(activities=[ProfilerActivity.CPU], with_flops=True)
        self.profiler.__enter__()
        self.clock.start()

    def end(self, name: str) -> None:
        """Add up the turn's operations by kind."""
        seconds = self.clock.read()["wall"]
        self.profiler.__exit__(None, None, None)
        counts: Counter[str] = Counter()
        for one in self.profiler.key_averages():
            counts[kind(one.key)] += one.self_cpu_time_total / 1e6
            counts["matrix_gflop"] += one.flops / 1e9 if kind(one.key) == "matrix products" else 0.0
        counts["whole"] = seconds
        counts["Python and the profiler"] = seconds - sum(counts[one] for one in (*KINDS, REST))
        self.found[name].append(counts)
        super().end(name)


def main(
    objectives: tuple[Name, ...] = ("kto", "dpo"),
    sizes: tuple[Literal["small", "larger"], ...] = ("small", "larger"),
    rounds: int = 6,
    out: str = "trl_profile",
) -> None:
    """Measure, print and save.

    Args:
        objectives: which.
        sizes: of the model, those of ``step.py``.
        rounds: of turns that count.
        out: name of the results.
    """
    rows: list[dict[str, Any]] = []
    for case in cases(sizes, objectives, rounds):
        turns = Profiles()
        train(case.objective, case.shape, case.folder, True, rounds + WARMING_UP, turns)
        for side, turn in turns.found.items():
            kinds = sorted({key for counts in turn for key in counts})
            counted = turn[WARMING_UP:]
            found = {key: round(median(counts[key] for counts in counted), 3) for key in kinds}
            rows.append({"size": case.size, "objective": case.objective, "side": side, "seconds": found})
            print(rows[-1], flush=True)
    print(save(out, {"machine": machine(), "trl": version("trl"), "rounds": rounds, "rows": rows}))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
