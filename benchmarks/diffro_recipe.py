# SPDX-License-Identifier: Apache-2.0
"""How the constants of ``recipes/diffro.yaml`` were chosen, and what they give on five seeds.

    python benchmarks/diffro_recipe.py        # two hours of one core

A seed draws its own candidates, trains a reward model of its own, shuffles, and tests with its own draws; the base
model is one and the same. Everything tried is a row, also what did not help. Of the settings that were looked at on the
dev sentences of both dev seeds, the most accurate among those that add at most .2 points to the base's nearest CER is
chosen; .3 are tolerated, the rest is for the draws of a seed. The test sentences are used once, for five seeds, with
the guard of the recipe.

What is finished is kept in ``--work`` and not run again. Writes ``results/diffro_recipe.json``.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from demo_corpora import SPEAKERS, Corpus, Fit
from demo_table1 import load, mean, row
from diffro_variants import Ensemble, Positive, Restricted, Variant
from jsonargparse import auto_cli

from tts_align.evaluation.judges.ctc import CTCJudge
from tts_align.evaluation.report import METRICS as REPORTED
from tts_align.evaluation.report import JudgedUtterance
from tts_align.evaluation.statistics.intervals import paired_difference
from tts_align.models.reward.model import RewardModel
from tts_align.objectives import DiffRO
from tts_align.training.callbacks.guards import HackingGuard
from tts_align.training.callbacks.keep_best import KeepBest, use_chosen
from tts_align.utils.files import write_json, write_json_lines

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/diffro_recipe.json"
DEV = "demo:audio/sentences/dev.jsonl"
SEEDS, DEV_SEEDS = (0, 1, 2, 3, 4), (0, 1)
WORSE_BY = 0.002
"""Nearest CER that a chosen setting may add to the base's on dev."""
METRICS = ("accuracy", "cer", "nearest_cer")
Heard = list[JudgedUtterance]


@dataclass(frozen=True)
class Setting:
    """What is tried.

    Args:
        tasks: of the reward.
        rate: learning rate at the first step; it falls linearly to a twentieth.
        anchor: weight of the SFT loss.
        epochs: passes over the rows.
        beta: weight of the divergence from the reference.
        temperature: of the Gumbel-softmax.
        ensemble: reward models, each trained on the rows of another seed, the first on those that the policy reads.
        pessimistic: their lowest score counts instead of their mean.
        regularised: reward models trained with RRPO's regularisers.
        positive: rows whose reward counts; all by default.
        restricted: tokens at which the divergence counts; all by default.
        free: the policy speaks each row anew in every step, instead of hearing the stored one.
        resample: draw a token anew at each position, as the paper does.
        keep_best: of six hearings of dev sentences by the labelling recogniser, the weights that were heard best.
    """

    tasks: tuple[str, ...] = ("asr",)
    rate: float = 1e-3
    anchor: float = 3.0
    epochs: int = 3
    beta: float = 0.1
    temperature: float = 1.0
    ensemble: int = 1
    pessimistic: bool = False
    regularised: bool = False
    positive: Positive | None = None
    restricted: Restricted | None = None
    free: bool = False
    resample: bool = False
    keep_best: bool = False

    def name(self) -> str:
        """Part of a file's name: tasks, rate, anchor and epochs, then what differs from the usual."""
        usual = asdict(Setting(self.tasks, self.rate, self.anchor, self.epochs))
        other = [
            f"{key}{value:g}" if isinstance(value, (int, float)) else f"{key}_{value}"
            for key, value in asdict(self).items()
            if value != usual[key]
        ]
        return "-".join(["+".join(self.tasks), f"{self.rate:g}", f"{self.anchor:g}", f"{self.epochs}", *other])

    def words(self) -> str:
        """What it is, for a table."""
        models = {"asr": "attention decoder", "ctc": "CTC", "asr+ctc": "attention decoder and CTC"}
        score = "their lowest" if self.pessimistic else "mean"
        rows = "labelled desirable" if self.positive == "labelled" else "above the mean of their batch"
        tokens = "tokens that the reward leaves alone" if self.restricted == "quiet" else "desirable rows"
        kept = {
            f"β {self.beta:g}": self.beta != CENTRE.beta,
            f"temperature {self.temperature:g}": self.temperature != CENTRE.temperature,
            f"{self.ensemble} reward models of as many seeds, {score} score": self.ensemble > 1,
            "RRPO's regularisers": self.regularised,
            f"reward of rows {rows} only": self.positive is not None,
            f"divergence at {tokens} only": self.restricted is not None,
            "free roll-outs": self.free,
            "fresh draws": self.resample,
            "best of the weights heard": self.keep_best,
        }
        epochs = f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        first = [models["+".join(self.tasks)], f"lr {self.rate:g}", f"anchor {self.anchor:g}", epochs]
        return ", ".join([*first, *(words for words, differs in kept.items() if differs)])

    def objective(self) -> DiffRO:
        """The package's own, if it can."""
        knobs: dict[str, Any] = {
            "beta": self.beta,
            "tasks": self.tasks,
            "sft_weight": self.anchor,
            "temperature": self.temperature,
            "rollout": "free" if self.free else "teacher_forced",
            "resample": self.resample,
        }
        if self.positive or self.restricted:
            return Variant(self.positive, self.restricted, **knobs)
        return DiffRO(**knobs)


CENTRE = Setting(("asr", "ctc"), anchor=5.0, epochs=2)
ASR = Setting()
TRIED: dict[Setting, tuple[int, ...]] = {
    CENTRE: DEV_SEEDS,
    replace(CENTRE, anchor=3): (0,),
    replace(CENTRE, anchor=10): (0,),
    replace(CENTRE, anchor=3, epochs=3): DEV_SEEDS,
    ASR: DEV_SEEDS,
    **{
        replace(CENTRE, **other): (0,)
        for other in (
            {"positive": "labelled"},
            {"positive": "above_mean"},
            {"restricted": "desirable"},
            {"restricted": "quiet"},
            {"regularised": True},
            {"ensemble": 2},
            {"ensemble": 2, "pessimistic": True},
            {"keep_best": True},
            {"resample": True},
            {"rate": 5e-4},
            {"rate": 2e-3},
        )
    },
}
"""What was tried, on which seeds."""


class TimedGuard(HackingGuard):
    """The guard of the recipe, that knows what it costs."""

    seconds = 0.0

    def _hear(self, *given: Any) -> None:
        begun = time.process_time()
        super()._hear(*given)
        self.seconds += time.process_time() - begun


def guard() -> TimedGuard:
    """A new one, as in the recipe."""
    return TimedGuard(DEV, 120, 48, SPEAKERS, judge=CTCJudge("demo:audio/labeller"), patience=2)


def keeper() -> KeepBest:
    """Hears the dev sentences, like ``recipes/keep_best.yaml``, and keeps the weights that were heard best."""
    return KeepBest(
        DEV,
        every_steps=80,
        sentences=48,
        speakers=SPEAKERS,
        judge=CTCJudge("demo:audio/labeller"),
        cer_tolerance=WORSE_BY,
    )


@dataclass
class Experiment:
    """All runs.

    Args:
        corpus: where they run; what is finished lies in its working directory.
    """

    corpus: Corpus

    @cached_property
    def work(self) -> Path:
        """Finished runs."""
        return self.corpus.work

    def base(self, split: str, seed: int) -> Heard:
        """What the base model says, once per split and seed."""
        out = self.work / f"{split}-{seed}-base.jsonl"
        if not out.exists():
            write_json_lines(out, [{}, *(one.to_row() for one in self.corpus.base_test(split, seed))])
        return load(out)[0]

    def rewards(self, setting: Setting, seed: int) -> list[Path]:
        """Directories of the reward models."""
        ctc = "ctc" in setting.tasks
        return [
            self.corpus.reward((seed + number) % len(SEEDS), ctc=ctc, regularised=setting.regularised)
            for number in range(setting.ensemble)
        ]

    def run(self, setting: Setting, seed: int, split: str) -> Path:
        """Train and test once, or take what is there; the test is guarded as the recipe is."""
        out = self.work / f"{split}-{seed}-diffro-{setting.name()}.jsonl"
        if out.exists():
            return out
        directories = self.rewards(setting, seed)
        watch = guard() if split == "test" else keeper() if setting.keep_best else None
        fit = Fit(setting.objective(), setting.rate, epochs=setting.epochs, reward=directories[0], guard=watch)
        if setting.ensemble > 1:
            members = [RewardModel(str(one)) for one in directories]
            fit = replace(fit, reward=Ensemble(members, setting.pessimistic))
        module, cost = self.corpus.fit(fit, seed)
        cost["reward_cpu_seconds"] = sum(self.seconds(one) for one in directories)
        if isinstance(watch, KeepBest):
            cost["kept_step"] = watch.best.step
            use_chosen(module.trainer, module)
        if isinstance(watch, TimedGuard):
            cost["guard_cpu_seconds"] = round(watch.seconds, 1)
            cost["cpu_seconds"] = round(cost["cpu_seconds"] - watch.seconds, 1)
            cost["guard_stops"] = watch.stopped
        heard = self.corpus.test(module.policy, "aligned", split, seed)
        write_json_lines(out, [cost, *(one.to_row() for one in heard)])
        return out

    def seconds(self, directory: Path) -> float:
        """CPU seconds of a reward model's training."""
        return float(json.loads(directory.with_name(f"{directory.name}.json").read_text("utf-8"))["cpu_seconds"])

    def trial(self, setting: Setting, seed: int) -> dict[str, Any]:
        """One look at dev sentences."""
        heard, cost = load(self.run(setting, seed, "dev"))
        found = {name: mean(heard, name) for name in METRICS}
        found["nearest_cer_added"] = found["nearest_cer"] - mean(self.base("dev", seed), "nearest_cer")
        trial = {"seed": seed, "words": setting.words(), **asdict(setting), **found, **cost}
        print(setting.name(), seed, {name: round(100 * value, 2) for name, value in found.items()}, cost, flush=True)
        return trial

    def choose(self) -> tuple[Setting, list[dict[str, Any]]]:
        """The setting to test, and all trials."""
        looked = {setting: [self.trial(setting, seed) for seed in seeds] for setting, seeds in TRIED.items()}
        seen = {setting: looks for setting, looks in looked.items() if TRIED[setting] == DEV_SEEDS}
        return ranked(seen)[0], [one for looks in looked.values() for one in looks]


def ranked(looked: Mapping[Setting, Sequence[Mapping[str, Any]]]) -> list[Setting]:
    """Settings that stay intelligible by falling accuracy, then the others by rising nearest CER."""

    def place(setting: Setting) -> tuple[bool, float]:
        added, accuracy = (
            float(np.mean([one[name] for one in looked[setting]])) for name in ("nearest_cer_added", "accuracy")
        )
        return (added > WORSE_BY, added if added > WORSE_BY else -accuracy)

    return sorted(looked, key=place)


def pooled(first: Sequence[Heard], second: Sequence[Heard]) -> dict[str, Any]:
    """Paired differences over all seeds, second minus first, resampling sentences, and their mean over the seeds."""
    pairs = [
        (one, {each.id: each for each in after}[one.id])
        for before, after in zip(first, second, strict=True)
        for one in before
    ]
    found = {}
    for name in METRICS:
        number = REPORTED[name]
        values = [number(one) for one, _ in pairs], [number(other) for _, other in pairs]
        found[name] = asdict(paired_difference(*values, [one.sentence for one, _ in pairs]))
    return found


def tested(experiment: Experiment, setting: Setting, seeds: Sequence[int]) -> dict[str, Any]:
    """Rows of the chosen setting and of the base on test sentences, and the pooled differences."""
    bases, ours, rows = [], [], []
    for seed in seeds:
        bases.append(experiment.base("test", seed))
        heard, cost = load(experiment.run(setting, seed, "test"))
        ours.append(heard)
        rows.append(row("audio", seed, "base", bases[-1], bases[-1]))
        rows.append(row("audio", seed, "diffro", heard, bases[-1], **asdict(setting), **cost))
        print({name: rows[-1][name] for name in ("seed", *METRICS)}, cost, flush=True)
    return {"rows": rows, "pooled": {"first": "base", "second": "diffro", "seeds": len(seeds)} | pooled(bases, ours)}


def recipe(work: Path) -> dict[str, Any]:
    """The shipped recipe itself, as a user runs it: what it costs and what it says."""
    command = ["tts-align", "fit", "--config", "recipes/diffro.yaml"]
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--run.directory", str(work / "recipe")], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    summary = json.loads((work / "recipe/test/summary.json").read_text("utf-8"))
    cost = {"seconds": round(time.perf_counter() - begun, 1), "cpu_seconds": round(spent, 1)}
    return {"command": " ".join(command), "cores": os.cpu_count(), **cost, "summary": summary}


def main(
    part: Literal["dev", "test", "recipe", "all"] = "all",
    work: Path = Path("runs/diffro_recipe"),
    results: Path = RESULTS,
    seeds: list[int] | None = None,
    threads: int = 1,
) -> None:
    """Run what is missing and write the results.

    Args:
        part: choose a setting on dev sentences, test it, run the shipped recipe, or all of it.
        work: finished runs.
        results: JSON file; parts that are not asked for stay as they are.
        seeds: of the test; five by default.
        threads: of PyTorch.
    """
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(Corpus("audio", work))
    found = json.loads(results.read_text("utf-8")) if results.exists() else {}
    if part in ("dev", "all"):
        chosen, trials = experiment.choose()
        found |= {"chosen": asdict(chosen), "dev": trials}
        write_json(results, found)
    if part in ("test", "all"):
        setting = Setting(**found["chosen"] | {"tasks": tuple(found["chosen"]["tasks"])})
        print("chosen", setting.words(), flush=True)
        found |= tested(experiment, setting, seeds or SEEDS)
        write_json(results, found)
    if part in ("recipe", "all"):
        write_json(results, found | {"recipe": recipe(work)})


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
