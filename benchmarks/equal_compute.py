# SPDX-License-Identifier: Apache-2.0
"""TKTO against other methods at equal compute on the embedded corpora, and how the recipes' constants were chosen.

    python benchmarks/equal_compute.py --methods '[tkto,kto]' --budgets '[updates,seconds]'    # two hours of one core

A seed draws its own candidates, shuffles, and tests with its own draws; the base model is one and the same.

Settings are chosen on dev sentences, at the budget ``updates`` (or ``epochs``: ``--chosen_at``), by the same number of
trials for every method: a grid of 16 over learning rate and SFT anchor (SFT has no anchor: 16 learning rates and final
learning rates), one knob at a time around its best (six); then, from the most accurate down, those that add at most .4
points to the base's nearest CER are looked at on two more seeds, five at most, until one adds no more than that in the
mean of the three. If none does, the one that adds least is chosen.
The test sentences are used once, for five seeds and three budgets:

- ``epochs``: three passes over the rows that a method reads; TKTO's pair comes on top.
- ``updates``: as many optimiser steps as TKTO takes, those of its pair counted.
- ``seconds``: as many CPU seconds as TKTO takes, with its pair and all caches counted.

What is finished is kept in ``--work`` and not run again. Writes ``results/equal_compute.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from demo_corpora import Corpus, Fit, Name
from demo_table1 import compare, load, mean, row
from jsonargparse import auto_cli

from tts_align.objectives import DPO, KTO, SFT, TKTO, Objective
from tts_align.utils.files import write_json, write_json_lines

RESULTS = Path(__file__).with_name("results") / "equal_compute.json"
SEEDS = (0, 1, 2, 3, 4)
DEV_SEEDS = (0, 1, 2)
EPOCHS = 3
WORSE_BY = 0.004
"""Nearest CER that a chosen setting may add to the base's on dev."""
Budget = Literal["epochs", "updates", "seconds"]
LOOKED_AT = 5
"""Settings that are looked at on more than one seed, at most."""
BUDGETS: tuple[Budget, ...] = ("updates", "seconds", "epochs")
METHODS = ("tkto", "kto", "dpo", "sft")


@dataclass(frozen=True)
class Setting:
    """Every knob of a method; those it lacks stay as they are.

    Args:
        rate: learning rate at the first step.
        anchor: weight of the SFT loss.
        final: share of the learning rate that is left at the last step; it falls linearly.
        beta: of DPO, KTO and TKTO.
        undesirable: weight of undesirable rows.
        mu: TKTO's strength of the token weights.
        clamp: TKTO's bounds, plus and minus.
        pair_rate: learning rate of TKTO's contrastive pair.
        pair_anchor: SFT anchor of the pair.
    """

    rate: float
    anchor: float = 0.0
    final: float = 0.05
    beta: float = 0.1
    undesirable: float = 1.0
    mu: float = 1.0
    clamp: float = 3.0
    pair_rate: float = 2e-3
    pair_anchor: float = 1.0

    def name(self) -> str:
        """Part of a file's name: rate and anchor, then what differs from the usual."""
        usual = Setting(self.rate, self.anchor)
        other = [f"{key}{value:g}" for key, value in asdict(self).items() if value != getattr(usual, key)]
        return "-".join([f"{self.rate:g}", f"{self.anchor:g}", *other])


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Args:
        objective: made of a setting.
        grid: settings tried first.
        knobs: factors of single knobs tried around the best of the grid.
    """

    objective: Callable[[Setting], Objective]
    grid: tuple[Setting, ...]
    knobs: tuple[tuple[str, float], ...]


RATES, ANCHORS = (1e-3, 2e-3, 4e-3, 8e-3), (30.0, 60.0, 120.0, 240.0)
GRID = tuple(Setting(rate, anchor) for rate in RATES for anchor in ANCHORS)
DPO_GRID = tuple(
    Setting(rate, anchor) for rate in (2.5e-5, 1e-4, 2.5e-4, 1e-3) for anchor in (3.0, 30.0, 300.0, 3000.0)
)
# Pairs are few: three passes over them are 93 steps, not 795.
DPO_EPOCHS_GRID = tuple(
    Setting(rate, anchor) for rate in (2.5e-4, 5e-4, 1e-3, 2e-3) for anchor in (1.0, 3.0, 10.0, 30.0)
)
SFT_GRID = tuple(
    Setting(rate, final=final) for rate in (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2) for final in (0.05, 0.3)
)
TABLE: Mapping[str, Method] = {
    "tkto": Method(
        lambda s: TKTO(
            beta=s.beta, undesirable_weight=s.undesirable, mu=s.mu, lower=-s.clamp, upper=s.clamp, sft_weight=s.anchor
        ),
        GRID,
        (("mu", 0.5), ("mu", 2), ("clamp", 2 / 3), ("clamp", 2), ("pair_rate", 0.5), ("pair_rate", 2)),
    ),
    "kto": Method(
        lambda s: KTO(beta=s.beta, undesirable_weight=s.undesirable, sft_weight=s.anchor),
        GRID,
        (("beta", 0.5), ("beta", 2), ("undesirable", 0.5), ("undesirable", 2), ("final", 6), ("final", 20)),
    ),
    "dpo": Method(
        lambda s: DPO(beta=s.beta, sft_weight=s.anchor),
        DPO_GRID,
        (("beta", 0.25), ("beta", 0.5), ("beta", 2), ("beta", 4), ("final", 6), ("final", 20)),
    ),
    "sft": Method(
        lambda s: SFT(),
        SFT_GRID,
        (("rate", 0.7), ("rate", 0.85), ("rate", 1.2), ("rate", 1.4), ("final", 6), ("final", 20)),
    ),
}


@dataclass
class Experiment:
    """All runs on one corpus.

    Args:
        corpus: where they run.
        work: what is finished lies here.
        chosen_at: budget at which settings are chosen.
    """

    corpus: Corpus
    work: Path
    chosen_at: Budget = "updates"

    def weights(self, setting: Setting, seed: int) -> tuple[Path, float]:
        """TKTO's token weights, and the CPU seconds that pair and cache took."""
        note = self.work / f"pair-{seed}-{setting.pair_rate:g}-{setting.pair_anchor:g}.json"
        begun = time.process_time()
        path = self.corpus.contrast(seed, setting.pair_rate, setting.pair_anchor)
        if not note.exists():
            write_json(note, {"cpu_seconds": round(time.process_time() - begun, 1)})
        return path, json.loads(note.read_text("utf-8"))["cpu_seconds"]

    def steps(self, method: str, budget: Budget, seed: int) -> int:
        """Optimiser steps of the policy that a budget leaves a method."""
        data = self.corpus.data(Fit(TABLE[method].objective(Setting(1e-3)), 1e-3), seed)
        data.prepare(self.corpus.base)
        if budget == "epochs" or method == "tkto":
            return EPOCHS * data.steps_per_epoch
        rows = self.corpus.data(Fit(KTO(), 1e-3), seed)
        rows.prepare(self.corpus.base)
        if budget == "updates":
            return (EPOCHS + 2) * rows.steps_per_epoch
        _, whole = load(self.test("tkto", seed, "updates"))
        _, mine = load(self.test(method, seed, "updates"))
        return max(1, round(mine["steps"] * whole["cpu_seconds"] / mine["cpu_seconds"]))

    def run(self, method: str, setting: Setting, seed: int, split: str, budget: Budget) -> Path:
        """Train and test once, or take what is there; returns the file of utterances, its cost in the first line."""
        # Three epochs and all updates are one thing to TKTO, and so are its own seconds.
        budget = "updates" if method == "tkto" else budget
        out = self.work / f"{split}-{seed}-{method}-{budget}-{setting.name()}.jsonl"
        if not out.exists():
            contrast, more = self.weights(setting, seed) if method == "tkto" else (None, 0.0)
            steps = self.steps(method, budget, seed)
            objective, final = TABLE[method].objective(setting), setting.final
            fit = Fit(objective, setting.rate, steps=steps, contrast=contrast, final_factor=final)
            module, cost = self.corpus.fit(fit, seed)
            cost["policy_cpu_seconds"], cost["cpu_seconds"] = cost["cpu_seconds"], round(cost["cpu_seconds"] + more, 1)
            heard = self.corpus.test(module.policy, "aligned", split, seed)
            write_json_lines(out, [cost, *(one.to_row() for one in heard)])
        return out

    def trial(self, method: str, setting: Setting, seed: int) -> dict[str, Any]:
        """One look at dev sentences."""
        heard, cost = load(self.run(method, setting, seed, "dev", self.chosen_at))
        base = self.corpus.base_test("dev", seed)
        found = {name: mean(heard, name) for name in ("accuracy", "cer", "nearest_cer")}
        found["nearest_cer_added"] = found["nearest_cer"] - mean(base, "nearest_cer")
        trial = {"corpus": self.corpus.name, "method": method, "seed": seed, **asdict(setting), **found, **cost}
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in trial.items()}, flush=True)
        return trial

    def trials(self, method: str) -> dict[Setting, list[dict[str, Any]]]:
        """Settings and their looks at dev; down the list until one stays intelligible in the mean of all seeds."""
        facts = TABLE[method]
        grid = DPO_EPOCHS_GRID if (method, self.chosen_at) == ("dpo", "epochs") else facts.grid
        looked = {setting: [self.trial(method, setting, DEV_SEEDS[0])] for setting in grid}
        best = ranked(looked)[0]
        for knob, factor in facts.knobs:
            setting = replace(best, **{knob: getattr(best, knob) * factor})
            looked[setting] = [self.trial(method, setting, DEV_SEEDS[0])]
        for setting in ranked(looked)[:LOOKED_AT]:
            for seed in DEV_SEEDS[1:]:
                # Not even a seed that adds nothing could bring the mean back.
                if sum(one["nearest_cer_added"] for one in looked[setting]) <= len(DEV_SEEDS) * WORSE_BY:
                    looked[setting].append(self.trial(method, setting, seed))
            if qualified(looked[setting]):
                break
        return looked

    def choose(self, method: str) -> tuple[Setting, list[dict[str, Any]]]:
        """The setting to test, and all trials."""
        trials = self.trials(method)
        all_seeds = {setting: looks for setting, looks in trials.items() if len(looks) == len(DEV_SEEDS)}
        best = next((setting for setting in ranked(trials) if qualified(trials[setting])), None)
        return best or ranked(all_seeds)[0], [one for looks in trials.values() for one in looks]

    def chosen(self, method: str) -> Setting:
        """What was chosen before."""
        return Setting(**json.loads(self.choice(method).read_text("utf-8"))["setting"])

    def choice(self, method: str) -> Path:
        """File of what was chosen, and its trials."""
        # Three epochs and all updates are one thing to TKTO.
        at = "updates" if method == "tkto" else self.chosen_at
        return self.work / (f"chosen-{method}.json" if at == "updates" else f"chosen-{method}-{at}.json")

    def test(self, method: str, seed: int, budget: Budget) -> Path:
        """The test sentences, once."""
        return self.run(method, self.chosen(method), seed, "test", budget)


def qualified(looks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a setting stays intelligible in the mean of all seeds."""
    return len(looks) == len(DEV_SEEDS) and np.mean([one["nearest_cer_added"] for one in looks]) <= WORSE_BY


def ranked(looked: Mapping[Setting, list[dict[str, Any]]]) -> list[Setting]:
    """Settings that stay intelligible by falling accuracy, then the others by rising nearest CER."""

    def place(setting: Setting) -> tuple[bool, float]:
        added = float(np.mean([one["nearest_cer_added"] for one in looked[setting]]))
        accuracy = float(np.mean([one["accuracy"] for one in looked[setting]]))
        return (added > WORSE_BY, added if added > WORSE_BY else -accuracy)

    return sorted(looked, key=place)


def table(
    experiment: Experiment, seeds: Sequence[int], budgets: Sequence[Budget], methods: Sequence[str]
) -> dict[str, Any]:
    """Rows and comparisons of what is tested, test sentences of all seeds."""
    corpus, rows, comparisons = experiment.corpus, [], []
    for seed in seeds:
        base = corpus.base_test("test", seed)
        rows.append(row(corpus.name, seed, "base", base, base, budget="none"))
        for budget in budgets:
            heard = {}
            for method in methods:
                heard[method], cost = load(experiment.test(method, seed, budget))
                facts = asdict(experiment.chosen(method)) | {"chosen_at": experiment.chosen_at} | cost
                # The pair of TKTO is two fits of one epoch each.
                facts["updates"] = cost["steps"] + (2 * cost["steps"] // EPOCHS if method == "tkto" else 0)
                rows.append(row(corpus.name, seed, method, heard[method], base, budget=budget, **facts))
                print(
                    {
                        key: rows[-1][key]
                        for key in (
                            "seed",
                            "budget",
                            "method",
                            "accuracy",
                            "cer",
                            "nearest_cer",
                            "steps",
                            "cpu_seconds",
                        )
                    },
                    flush=True,
                )
            for other in methods[1:]:
                pair = {"corpus": corpus.name, "seed": seed, "budget": budget, "first": methods[0], "second": other}
                comparisons.append(pair | compare(heard[methods[0]], heard[other]))
    return {"rows": rows, "comparisons": comparisons}


def main(
    corpus: Name = "audio",
    methods: list[str] | None = None,
    part: Literal["dev", "test", "all"] = "all",
    seeds: list[int] | None = None,
    budgets: list[Budget] | None = None,
    chosen_at: Budget = "updates",
    work: Path = Path("runs/equal_compute"),
    results: Path = RESULTS,
    threads: int = 1,
) -> None:
    """Run what is missing and write the results.

    Args:
        corpus: which.
        methods: all four by default; the first is compared with the others.
        part: choose settings on dev sentences, test the chosen ones, or both.
        seeds: five by default.
        budgets: all three by default.
        chosen_at: budget at which settings are chosen.
        work: finished runs.
        results: JSON file; what it holds of the other corpus is kept.
        threads: of PyTorch.
    """
    torch.set_num_threads(threads)
    folder = work / corpus
    folder.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(Corpus(corpus, folder), folder, chosen_at)
    for method in methods or METHODS:
        if part != "test":
            setting, trials = experiment.choose(method)
            write_json(experiment.choice(method), {"setting": asdict(setting), "trials": trials})
    if part == "dev":
        return
    found = table(experiment, seeds or SEEDS, budgets or BUDGETS, methods or METHODS)
    kept = [json.loads(experiment.choice(method).read_text("utf-8")) for method in methods or METHODS]
    found["dev"] = [one for each in kept for one in each["trials"]]
    found["chosen"] = [
        {"corpus": corpus, "method": method, **each["setting"]}
        for method, each in zip(methods or METHODS, kept, strict=True)
    ]
    merged = json.loads(results.read_text("utf-8")) if results.exists() else {}
    write_json(
        results,
        {key: [one for one in merged.get(key, []) if one["corpus"] != corpus] + new for key, new in found.items()},
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
