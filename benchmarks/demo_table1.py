# SPDX-License-Identifier: Apache-2.0
"""Every method on both embedded corpora: the table of arXiv 2510.05799 in small, with intervals.

    python benchmarks/demo_table1.py                    # both corpora, three seeds: about an hour of one core
    python benchmarks/demo_table1.py --corpus symbolic

A seed draws its own candidates, shuffles, and tests with its own draws; the base model is one and the same. Learning
rate and SFT anchor of each method are chosen on the dev sentences of seed 0 over one grid; everything in the table
comes from the test sentences. What is finished is kept in ``--work`` and not run again. Writes
``results/demo_table1.json``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_corpora import Corpus, Fit, Name
from jsonargparse import auto_cli

from tts_align.evaluation.report import METRICS, JudgedUtterance, summarise
from tts_align.evaluation.statistics.intervals import paired_difference
from tts_align.objectives import DPO, KTO, SFT, TKTO, Objective
from tts_align.training.cache import TokenCache
from tts_align.training.contrast import separation
from tts_align.utils.files import read_json_lines, write_json, write_json_lines

RESULTS = Path(__file__).with_name("results") / "demo_table1.json"
RATES = (1e-3, 2e-3)
GRID = [(rate, anchor) for rate in RATES for anchor in (1.0, 3.0, 10.0, 30.0)]
PAIR_RATE, PAIR_ANCHOR = 2e-3, 1.0
MU, CLAMP = 1.0, 3.0
BUDGET = "one epoch; the pair of token-level KTO comes on top"
WORSE_BY = 0.005
"""A setting is fit to be chosen if it adds less than this to the base's nearest CER on dev."""


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Args:
        objective: made with an SFT anchor; ``None`` in the grid for methods without one.
        paired_only: uses only rows that stand in pairs.
        weighted: needs token weights.
        anchored: has an SFT anchor to choose.
    """

    objective: Callable[[float], Objective]
    paired_only: bool = False
    weighted: bool = False
    anchored: bool = True


def tkto(anchor: float, mu: float = MU, lower: float = -CLAMP, upper: float = CLAMP) -> TKTO:
    """TKTO scaled for the small model."""
    return TKTO(mu=mu, lower=lower, upper=upper, sft_weight=anchor)


METHODS = {
    "sft": Method(lambda _: SFT(), anchored=False),
    "dpo": Method(lambda anchor: DPO(sft_weight=anchor)),
    "kto_paired": Method(lambda anchor: KTO(sft_weight=anchor), paired_only=True),
    "kto_unpaired": Method(lambda anchor: KTO(sft_weight=anchor)),
    "tkto_paired": Method(tkto, paired_only=True, weighted=True),
    "tkto_unpaired": Method(tkto, weighted=True),
    "tkto_unpaired_w1": Method(lambda anchor: TKTO(mu=0, sft_weight=anchor)),
}


@dataclass
class Experiment:
    """All runs on one corpus.

    Args:
        corpus: where they run.
        work: what is finished lies here.
    """

    corpus: Corpus
    work: Path

    def run(self, name: str, method: Method, seed: int, rate: float, anchor: float, split: str, **changes: Any) -> Path:
        """Train and test once, or take what is there; returns the file of utterances, its cost in the first line."""
        out = self.work / f"{split}-{seed}-{name}-{rate:g}-{anchor:g}.jsonl"
        if not out.exists():
            weights = (
                self.corpus.contrast(seed, PAIR_RATE, PAIR_ANCHOR, method.paired_only) if method.weighted else None
            )
            fit = Fit(method.objective(anchor), rate, method.paired_only, contrast=weights)
            module, cost = self.corpus.fit(dataclasses.replace(fit, **changes), seed)
            heard = self.corpus.test(module.policy, "aligned", split, seed)
            write_json_lines(out, [cost, *(one.to_row() for one in heard)])
        return out

    def choose(self, name: str, method: Method) -> tuple[float, float]:
        """Learning rate and anchor with the highest accuracy on dev among those that stay intelligible.

        If none does, the most intelligible.
        """
        base = self.corpus.base_test("dev", 0)
        fit, unfit = [], []
        for rate, anchor in GRID if method.anchored else [(rate, 0.0) for rate in RATES]:
            heard, _ = load(self.run(name, method, 0, rate, anchor, "dev"))
            accuracy, nearest = mean(heard, "accuracy"), mean(heard, "nearest_cer")
            added = nearest - mean(base, "nearest_cer")
            (fit if added < WORSE_BY else unfit).append((accuracy, nearest, rate, anchor))
            print(
                f"  dev {name} lr {rate:g} anchor {anchor:g}: accuracy {accuracy:.3f}, "
                f"nearest CER {nearest:.4f} ({added:+.4f})",
                flush=True,
            )
        _, _, rate, anchor = max(fit) if fit else min(unfit, key=lambda one: one[1])
        return rate, anchor


def load(path: Path) -> tuple[list[JudgedUtterance], dict[str, Any]]:
    """Utterances and cost of a run."""
    (_, cost), *rows = read_json_lines(path)
    return [JudgedUtterance.from_row(row) for _, row in rows], cost


def mean(heard: Sequence[JudgedUtterance], metric: str) -> float:
    """Mean of a metric."""
    return float(np.mean([METRICS[metric](one) for one in heard]))


def row(
    corpus: str, seed: int, method: str, heard: list[JudgedUtterance], base: list[JudgedUtterance], **more: Any
) -> dict[str, Any]:
    """One row of the results, with intervals and the paired difference from the base."""
    summary = summarise([*base, *heard] if heard is not base else base)
    mine = summary["base" if heard is base else "aligned"]
    line: dict[str, Any] = {"corpus": corpus, "seed": seed, "method": method}
    line |= {name: one["value"] for name, one in mine.items()} | {"n": mine["accuracy"]["n"]}
    line |= {"neither": summary["further"]["base" if heard is base else "aligned"]["neither"]["value"]}
    line["intervals"] = {name: [one["low"], one["high"]] for name, one in mine.items()}
    if heard is not base:
        line["difference_from_base"] = summary["difference"]
    return line | more


def compare(one: list[JudgedUtterance], other: list[JudgedUtterance]) -> dict[str, Any]:
    """Paired differences, first minus second, on the same sentences, voices and seeds."""
    a, b = ({u.id: u for u in side} for side in (one, other))
    names = sorted(a.keys() & b.keys())
    clusters = [a[name].sentence for name in names]
    return {
        metric: dataclasses.asdict(
            paired_difference([number(b[name]) for name in names], [number(a[name]) for name in names], clusters)
        )
        for metric, number in METRICS.items()
        if metric in ("accuracy", "cer", "nearest_cer")
    }


def token_rewards(corpus: Corpus, seed: int) -> dict[str, Any]:
    """How far the pair separates deciding tokens from the rest."""
    cache = TokenCache.read(corpus.contrast(seed, PAIR_RATE, PAIR_ANCHOR), [])
    data = corpus.data(Fit(KTO(), PAIR_RATE), seed)
    data.prepare(corpus.base)
    sides = separation(cache, data.sources())
    rest = float(sides["undesirable"].elsewhere.std())
    return {
        "seed": seed,
        **{f"{side}_target_mean": float(one.target.mean()) for side, one in sides.items()},
        **{f"{side}_elsewhere_mean": float(one.elsewhere.mean()) for side, one in sides.items()},
        "undesirable_elsewhere_sd": rest,
        "separation_in_sd": abs(float(sides["undesirable"].target.mean())) / rest,
    }


def table(name: Name, work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """All runs of one corpus."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(name, folder)
    experiment = Experiment(corpus, folder)
    chosen = {method: experiment.choose(method, facts) for method, facts in METHODS.items()}
    rows, comparisons, sweep, matched = [], [], [], []
    for seed in seeds:
        base = corpus.base_test("test", seed)
        rows.append(row(name, seed, "base", base, base, budget="none"))
        heard = {}
        for method, facts in METHODS.items():
            rate, anchor = chosen[method]
            heard[method], cost = load(experiment.run(method, facts, seed, rate, anchor, "test"))
            rows.append(
                row(name, seed, method, heard[method], base, learning_rate=rate, anchor=anchor, budget=BUDGET, **cost)
            )
            print(
                {key: rows[-1][key] for key in ("corpus", "seed", "method", "accuracy", "nearest_cer", "steps")},
                flush=True,
            )
        for other in ("kto_unpaired", "tkto_unpaired_w1", "sft", "dpo", "tkto_paired"):
            comparisons.append(
                {"corpus": name, "seed": seed, "first": "tkto_unpaired", "second": other}
                | compare(heard["tkto_unpaired"], heard[other])
            )
        rate, anchor = chosen["tkto_unpaired"]
        same = load(experiment.run("kto_same_anchor", METHODS["kto_unpaired"], seed, rate, anchor, "test"))[0]
        comparisons.append(
            {"corpus": name, "seed": seed, "first": "tkto_unpaired", "second": "kto_same_anchor"}
            | {"second_accuracy": mean(same, "accuracy"), "second_nearest_cer": mean(same, "nearest_cer")}
            | compare(heard["tkto_unpaired"], same)
        )
        steps = next(r["steps"] for r in rows if r["seed"] == seed and r["method"] == "tkto_paired")
        for method in ("kto_unpaired", "tkto_unpaired"):
            rate, anchor = chosen[method]
            path = experiment.run(f"{method}_steps{steps}", METHODS[method], seed, rate, anchor, "test", steps=steps)
            found, cost = load(path)
            matched.append(row(name, seed, f"{method}_as_many_steps_as_paired", found, base, **cost))
    rate, anchor = chosen["tkto_unpaired"]
    for mu, clamp in ((1.0, 1.0), (1.0, 2.0), (1.0, 3.0), (0.25, 4.0), (0.25, 8.0)):
        method = Method(lambda a, mu=mu, clamp=clamp: tkto(a, mu, -clamp, clamp), weighted=True)
        found, cost = load(experiment.run(f"mu{mu:g}clamp{clamp:g}", method, seeds[0], rate, anchor, "test"))
        line = row(name, seeds[0], "tkto_unpaired", found, corpus.base_test("test", seeds[0]), **cost)
        sweep.append({"mu": mu, "lower": -clamp, "upper": clamp} | line)
    return {
        "rows": rows,
        "comparisons": comparisons,
        "step_matched": matched,
        "clamp_sweep": sweep,
        "token_rewards": [{"corpus": name} | token_rewards(corpus, seed) for seed in seeds],
        "chosen": {name: {method: {"learning_rate": r, "anchor": a} for method, (r, a) in chosen.items()}},
    }


def main(
    corpus: list[Name] | None = None,
    seeds: list[int] | None = None,
    work: Path = Path("runs/demo_table1"),
    results: Path = RESULTS,
    threads: int = 1,
) -> None:
    """Run what is missing and write the results.

    Args:
        corpus: which; both by default.
        seeds: 0, 1 and 2 by default.
        work: finished runs.
        results: JSON file; what it holds of other corpora is kept.
        threads: of PyTorch.
    """
    torch.set_num_threads(threads)
    for name in corpus or ["symbolic", "audio"]:
        found = table(name, work, seeds or [0, 1, 2])
        merged = json.loads(results.read_text("utf-8")) if results.exists() else {}
        for key, value in found.items():
            if isinstance(value, dict):
                merged[key] = merged.get(key, {}) | value
            else:
                merged[key] = [one for one in merged.get(key, []) if one["corpus"] != name] + value
        write_json(results, merged)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
