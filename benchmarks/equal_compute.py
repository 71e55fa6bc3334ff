# SPDX-License-Identifier: Apache-2.0
"""TKTO against other methods at equal compute on the embedded corpora, and how the recipes' constants were chosen.

    python benchmarks/equal_compute.py --methods '[tkto,kto]' --budgets '[updates,seconds]'    # two hours of one core

A seed draws its own candidates, shuffles, and tests with its own draws; the base model is one and the same.

Settings are chosen on dev sentences, at the budget ``updates`` (or ``epochs``: ``--chosen_at``), by the same number of
trials for every method: a grid of 16 over learning rate and SFT anchor (SFT has no anchor: 16 learning rates and final
learning rates), one knob at a time around its best (six), and the grid again with a moving average of the weights;
then, from the most accurate down, those that add at most .4 points to the base's nearest CER are looked at on two more
seeds, five at most, until one adds no more than that in the mean of the three. If none does, the one that adds least is
chosen.
The test sentences are used once, for five seeds and three budgets:

- ``epochs``: three passes over the rows that a method reads; TKTO's pair comes on top.
- ``updates``: as many optimiser steps as TKTO takes, those of its pair counted.
- ``seconds``: as many CPU seconds as TKTO takes, with its pair and all caches counted.

What is finished is kept in ``--work`` and not run again. Writes ``results/equal_compute.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from demo_corpora import Corpus, Fit, Name
from demo_table1 import compare, load, mean, row
from jsonargparse import auto_cli
from methods import AVERAGE, GRIDS, TABLE, Setting, setting_of

from tts_align.objectives import KTO
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
SHOWN = ("seed", "budget", "method", "accuracy", "cer", "nearest_cer", "steps", "cpu_seconds")


@dataclass
class Experiment:
    """All runs on one corpus.

    Args:
        corpus: where they run.
        work: what is finished lies here.
        chosen_at: budget at which settings are chosen.
        saved: trials on this corpus that the results hold.
        averaged: whether the grid is tried again with a moving average of the weights.
    """

    corpus: Corpus
    work: Path
    chosen_at: Budget = "updates"
    saved: Sequence[Mapping[str, Any]] = ()
    averaged: bool = True

    def weights(self, setting: Setting, seed: int) -> tuple[Path, float]:
        """TKTO's token weights, and the CPU seconds that pair and cache took."""
        note = self.work / f"pair-{seed}-{setting.pair_rate:g}-{setting.pair_anchor:g}.json"
        self.corpus.labelled(seed)  # rows are there for every method
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
            fit = Fit(
                objective, setting.rate, steps=steps, contrast=contrast, final_factor=final, average=setting.average
            )
            module, cost = self.corpus.fit(fit, seed)
            cost["policy_cpu_seconds"], cost["cpu_seconds"] = cost["cpu_seconds"], round(cost["cpu_seconds"] + more, 1)
            heard = self.corpus.test(module.policy, "aligned", split, seed)
            write_json_lines(out, [cost, *(one.to_row() for one in heard)])
        return out

    def trial(self, method: str, setting: Setting, seed: int) -> dict[str, Any]:
        """One look at dev sentences; none where the results hold it."""
        budget = "updates" if method == "tkto" else self.chosen_at
        for one in self.saved:
            if (one["method"], one["seed"], one["budget"]) == (method, seed, budget) and setting_of(one) == setting:
                return dict(one)
        heard, cost = load(self.run(method, setting, seed, "dev", self.chosen_at))
        base = self.corpus.base_test("dev", seed)
        found = {name: mean(heard, name) for name in ("accuracy", "cer", "nearest_cer")}
        found["nearest_cer_added"] = found["nearest_cer"] - mean(base, "nearest_cer")
        trial = {"corpus": self.corpus.name, "method": method, "seed": seed, "budget": budget, **asdict(setting)}
        trial |= {**found, **cost}
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in trial.items()}, flush=True)
        return trial

    def trials(self, method: str) -> dict[Setting, list[dict[str, Any]]]:
        """Settings and their looks at dev; down the list until one stays intelligible in the mean of all seeds."""
        facts = TABLE[method]
        settings = GRIDS.get((self.corpus.name, method, self.chosen_at), facts.grid)
        looked = {setting: [self.trial(method, setting, DEV_SEEDS[0])] for setting in settings}
        best = ranked(looked)[0]
        around = [replace(best, **{knob: getattr(best, knob) * factor}) for knob, factor in facts.knobs]
        for setting in [*around, *(replace(one, average=AVERAGE) for one in settings if self.averaged)]:
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
                print({key: rows[-1][key] for key in SHOWN}, flush=True)
            for other in methods[1:]:
                pair = {"corpus": corpus.name, "seed": seed, "budget": budget, "first": methods[0], "second": other}
                pair["average"] = experiment.chosen(methods[0]).average
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
    averaged: bool = True,
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
        results: JSON file; rows of other corpora, methods, seeds and budgets that it holds are kept.
        threads: of PyTorch.
        averaged: whether the grid is tried again with a moving average of the weights.
    """
    torch.set_num_threads(threads)
    folder = work / corpus
    folder.mkdir(parents=True, exist_ok=True)
    merged = json.loads(results.read_text("utf-8")) if results.exists() else {}
    saved = [one for one in merged.get("dev", []) if one["corpus"] == corpus]
    experiment = Experiment(Corpus(corpus, folder), folder, chosen_at, saved, averaged)
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
    kept_rows = {key: {identity(one): one for one in [*merged.get(key, []), *new]} for key, new in found.items()}
    write_json(results, {key: list(rows.values()) for key, rows in kept_rows.items()})


def identity(one: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row of the results is a row of: a later one with the same takes its place."""
    if "nearest_cer_added" in one:
        trial = astuple(setting_of(one))
    else:  # a method has one chosen setting, and may be heard with an average and without
        trial = (one.get("average", 0.0),) if "accuracy" in one else ()
    return (*(one.get(key) for key in ("corpus", "seed", "budget", "method", "first", "second")), *trial)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
