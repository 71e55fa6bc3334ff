# SPDX-License-Identifier: Apache-2.0
"""DiffRO on the embedded audio corpus against SFT, DPO, KTO and TKTO, with its controls.

    python benchmarks/demo_table1.py --corpus audio     # first: the other methods, on the same candidates and draws
    python benchmarks/diffro.py                         # about half an hour of one core

Each seed's reward model learns from that seed's rows what the labelling recogniser heard; the guard listens with that
recogniser, and the judge, trained apart, only tests. Learning rate and SFT anchor are chosen on the dev sentences of
seed 0, by the rule of ``demo_table1.py``; everything in the table comes from the test sentences. What is finished is
kept in ``--work``.
Writes ``results/diffro.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_corpora import SPEAKERS, Corpus, Fit
from demo_table1 import METHODS, Experiment, Method, compare, load, row
from jsonargparse import auto_cli

from tts_align.evaluation.judges.ctc import CTCJudge
from tts_align.evaluation.report import METRICS
from tts_align.objectives import DiffRO, Part
from tts_align.training.callbacks.guards import HackingGuard
from tts_align.utils.files import write_json, write_json_lines

RESULTS = Path(__file__).with_name("results") / "diffro.json"
RATES, ANCHORS = (1e-3, 2e-3), (0.3, 1.0, 3.0)
RECIPE = (1e-3, 1.0)
"""Of recipes/diffro.yaml: the stronger anchor, which does not depend so much on the reward model."""
OTHERS = ("sft", "dpo", "kto_unpaired", "tkto_unpaired")
ONE_FILE = "demo_table1.json"


class TimedGuard(HackingGuard):
    """The guard of the recipe, that knows what it costs."""

    seconds = 0.0

    def _hear(self, *given: Any) -> None:
        begun = time.process_time()
        super()._hear(*given)
        self.seconds += time.process_time() - begun


def guard() -> TimedGuard:
    """A new one."""
    return TimedGuard("demo:audio/sentences/dev.jsonl", 50, 48, SPEAKERS, judge=CTCJudge("demo:audio/labeller"))


CONTROLS: dict[str, Callable[[float], DiffRO]] = {
    "diffro": lambda anchor: DiffRO(resample=False, sft_weight=anchor),
    "diffro_fresh_draws": lambda anchor: DiffRO(sft_weight=anchor),
    "diffro_without_anchor": lambda _: DiffRO(resample=False),
    "diffro_literal": lambda _: DiffRO(),
}
"""The second draws tokens anew, as the paper does; the last two have no anchor but the divergence, as the paper."""


@dataclass
class Rewarded(Experiment):
    """Runs with a reward model and a guard, where the objective asks for one."""

    def run(self, name: str, method: Method, seed: int, rate: float, anchor: float, split: str, **changes: Any) -> Path:
        """Train and test once, or take what is there."""
        objective = method.objective(anchor)
        if Part.REWARD not in objective.needs:
            return super().run(name, method, seed, rate, anchor, split, **changes)
        out = self.work / f"{split}-{seed}-{name}-{rate:g}-{anchor:g}.jsonl"
        if not out.exists():
            watch = guard()
            fit = Fit(objective, rate, reward=self.corpus.reward(seed), guard=watch, **changes)
            module, cost = self.corpus.fit(fit, seed)
            cost["guard_cpu_seconds"] = round(watch.seconds, 1)
            cost["cpu_seconds"] = round(cost["cpu_seconds"] - watch.seconds, 1)
            cost["guard"] = [{"step": one.step, "cer": one.numbers["guard/cer"]} for one in watch.heard]
            cost["guard_stops"] = watch.stopped
            metrics = module.trainer.callback_metrics
            cost["last"] = {name: float(metrics[f"train/{name}"]) for name in ("reward", "kl", "gradient_norm")}
            heard = self.corpus.test(module.policy, "aligned", split, seed)
            write_json_lines(out, [cost, *(one.to_row() for one in heard)])
        return out

    def choose_diffro(self) -> tuple[float, float, list[dict[str, float]]]:
        """Rate and anchor with the highest accuracy on dev among those that stay intelligible; and all of them."""
        base = self.corpus.base_test("dev", 0)
        seen = []
        for rate in RATES:
            for anchor in ANCHORS:
                heard, _ = load(self.run("diffro", Method(CONTROLS["diffro"]), 0, rate, anchor, "dev"))
                numbers = {name: float(np.mean([number(one) for one in heard])) for name, number in METRICS.items()}
                seen.append({"learning_rate": rate, "anchor": anchor, **numbers})
                print("dev", seen[-1], flush=True)
        limit = float(np.mean([METRICS["nearest_cer"](one) for one in base])) + 0.005
        fit = [one for one in seen if one["nearest_cer"] < limit]
        best = max(fit, key=lambda one: one["accuracy"]) if fit else min(seen, key=lambda one: one["nearest_cer"])
        return best["learning_rate"], best["anchor"], seen


def main(
    seeds: list[int] | None = None,
    work: Path = Path("runs/demo_table1"),
    results: Path = RESULTS,
    threads: int = 1,
    controls: list[int] | None = None,
) -> None:
    """Run what is missing and write the results.

    Args:
        seeds: 0, 1 and 2 by default.
        work: finished runs; those of ``demo_table1.py`` are compared with where they are there.
        results: JSON file.
        threads: of PyTorch.
        controls: seeds of the controls; the same by default.
    """
    torch.set_num_threads(threads)
    seeds = seeds or [0, 1, 2]
    folder = work / "audio"
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus("audio", folder)
    experiment = Rewarded(corpus, folder)
    rate, anchor, dev = experiment.choose_diffro()
    table = json.loads(results.with_name(ONE_FILE).read_text("utf-8"))
    chosen = table["chosen"]["audio"]
    found: dict[str, Any] = {"chosen": {"learning_rate": rate, "anchor": anchor}, "dev": dev}
    found |= {"rows": [], "comparisons": [], "reward_models": []}
    for seed in seeds:
        base = corpus.base_test("test", seed)
        found["rows"].append(row("audio", seed, "base", base, base))
        heard, cost = load(experiment.run("diffro", Method(CONTROLS["diffro"]), seed, rate, anchor, "test"))
        found["rows"].append(row("audio", seed, "diffro", heard, base, learning_rate=rate, anchor=anchor, **cost))
        found["reward_models"].append(
            {"seed": seed} | json.loads((corpus.reward(seed).parent / f"{corpus.reward(seed).name}.json").read_text())
        )
        for other in OTHERS:
            facts = chosen[other]
            path = folder / f"test-{seed}-{other}-{facts['learning_rate']:g}-{facts['anchor']:g}.jsonl"
            if path.exists():
                found["comparisons"].append(
                    {"seed": seed, "first": "diffro", "second": other} | compare(heard, load(path)[0])
                )
        write_json(results, found)
        print(found["rows"][-1], flush=True)
        own, more = load(experiment.run("diffro", Method(CONTROLS["diffro"]), seed, *RECIPE, "test"))
        found["rows"].append(row("audio", seed, "diffro_recipe", own, base, anchor=RECIPE[1], **more))
    for seed in seeds if controls is None else controls:
        base = corpus.base_test("test", seed)
        steps = next(one["steps"] for one in found["rows"] if one["method"] == "diffro" and one["seed"] == seed)
        heard, cost = load(experiment.run("diffro", Method(CONTROLS["diffro"]), seed, rate, anchor, "test"))
        fit = next(one["cpu_seconds"] for one in found["reward_models"] if one["seed"] == seed)
        for name in ("diffro_fresh_draws", "diffro_without_anchor", "diffro_literal"):
            own, more = load(experiment.run(name, Method(CONTROLS[name]), seed, rate, anchor, "test"))
            found["rows"].append(row("audio", seed, name, own, base, learning_rate=rate, **more))
            found["comparisons"].append({"seed": seed, "first": "diffro", "second": name} | compare(heard, own))
            write_json(results, found)
        for name in ("sft", "kto_unpaired"):
            facts, cheap = (
                chosen[name],
                next(
                    one
                    for one in table["rows"]
                    if one["corpus"] == "audio" and one["method"] == name and one["seed"] == seed
                ),
            )
            longer = round(cheap["steps"] * (cost["cpu_seconds"] + fit) / cheap["cpu_seconds"])
            for label, count in (("as_many_updates", steps), ("as_much_time", longer)):
                if name == "kto_unpaired" and label == "as_many_updates":
                    continue  # it has as many
                path = experiment.run(
                    f"{name}_steps{count}",
                    METHODS[name],
                    seed,
                    facts["learning_rate"],
                    facts["anchor"],
                    "test",
                    steps=count,
                )
                own, more = load(path)
                found["rows"].append(row("audio", seed, f"{name}_{label}", own, base, **more))
                found["comparisons"].append(
                    {"seed": seed, "first": "diffro", "second": f"{name}_{label}"} | compare(heard, own)
                )
                write_json(results, found)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
