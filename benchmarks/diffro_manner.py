# SPDX-License-Identifier: Apache-2.0
"""DiffRO towards an attribute that has probability under the prompt: a manner of speaking, and clean recordings.

    tts-align demo build --corpus manner     # once: about an hour of one busy core
    python benchmarks/diffro_manner.py       # about half an hour of one busy core for one seed

The base of this corpus speaks one utterance in five in a lively manner and every second one cleanly, whatever the text
says. A reward model learns manner and quality from recordings whose style is known; the policy trains on what the base
has spoken, of which nobody knows the style, towards the text and one wanted attribute. In later rounds the base
learns from what the policy of the last one speaks, as far as the labelling recogniser hears no error in it and the
reward model hears the wanted attribute. All are measured on the sound of test sentences, by two means that no reward
model has seen: a rule (median pitch; level of the quiet frames) and a listener that was trained apart, on other
sentences' sound. Settings are chosen on dev sentences of seed 0. What is finished is kept in ``--work``. Writes
``results/diffro_manner.json``.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from demo_corpora import DRAWN, SPEAKERS, TESTED, Corpus, Fit
from jsonargparse import auto_cli
from machine import machine
from style_listener import StyleListener, kept_listener

from tts_align.cli.demo.build import copy_synthesise
from tts_align.cli.demo.manner_gates import StyleRule
from tts_align.cli.judge import judge
from tts_align.cli.label import LabelRule, label
from tts_align.cli.sample import sample
from tts_align.data.demo.audio import Clip
from tts_align.data.demo.manner import MANNERS, QUALITIES, MannerBank, Style
from tts_align.data.demo.sentences import READINGS, split_sentences
from tts_align.evaluation.judges.base import Reading, SpeechSample
from tts_align.evaluation.parts import Parts
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.speaking import evenly_spread, utterance_requests
from tts_align.evaluation.statistics.intervals import cluster_bootstrap, paired_difference
from tts_align.models.base.generation import Context
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.codec.mel import MelCodec
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.models.reward.config import Attribute
from tts_align.objectives import SFT, DiffRO, Objective
from tts_align.utils.assets import ASSETS
from tts_align.utils.files import read_json_lines, write_json, write_json_lines
from tts_align.utils.readers import read_json

RESULTS = Path(__file__).with_name("results") / "diffro_manner.json"
ATTRIBUTES = (Attribute("manner", "classes", tuple(MANNERS)), Attribute("quality", "mos"))
WANTED: dict[str, str | float] = {"manner": "lively", "quality": 5}
NUMBERS = ("wanted_by_rule", "wanted_by_listener", "cer", "nearest_cer", "accuracy")
LISTENER_CLIPS, TOLD_CLIPS = 1200, 300


@dataclass(frozen=True)
class Setting:
    """Knobs of one run.

    Args:
        learning_rate: at the first step; it falls linearly.
        anchor: weight of the cross-entropy on desirable rows.
        beta: weight of the KL.
        epochs: passes over the rows.
        free: whether the policy speaks the rows anew.
        resample: whether tokens are drawn anew at each position.
        summed: whether the text counts by the sum over its characters, a dozen times the attribute, and the KL by row.
        round: 1 learns from the base's rows; later ones from what the policy of the round before spoke, without an
            error and as wanted.
        imitate: whether cross-entropy on the rows is all there is: what the choice of rows does alone.
        alone: whether it was so in all rounds, of which the first then has rows that the base spoke: no gradient of a
            reward at all.
    """

    learning_rate: float = 1e-3
    anchor: float = 0.0
    beta: float = 0.1
    epochs: int = 1
    free: bool = False
    resample: bool = False
    summed: bool = False
    round: int = 1
    imitate: bool = False
    alone: bool = False

    @property
    def name(self) -> str:
        """For files."""
        said = f"{self.learning_rate:g}-{self.anchor:g}-{self.beta:g}-{self.epochs}" + "-free" * self.free
        said += "-fresh" * self.resample + "-summed" * self.summed
        return said + ("", "-second", "-third")[self.round - 1] + "-sft" * self.imitate + "-alone" * self.alone

    @property
    def words(self) -> str:
        """For readers."""
        source = (
            f"rows of round {self.round}" if self.round > 1 else "rows of the base" if self.alone else "stored rows"
        )
        rows = "the policy speaks anew" if self.free else f"{source}, anchor {self.anchor:g}"
        if self.imitate:
            return (
                "SFT in every round, " * self.alone
                + f"SFT on {source}, lr {self.learning_rate:g}, {self.epochs} epochs"
            )
        often = f"{self.epochs} epoch{'s' * (self.epochs > 1)}"
        extra = ", fresh draws" * self.resample + ", sums" * self.summed
        return f"{rows}, β {self.beta:g}, lr {self.learning_rate:g}, {often}{extra}"


TEXT = ("asr", "ctc")
"""The text counts as in ``recipes/diffro.yaml``."""
FREE = (Setting(2e-4, free=True), Setting(1e-4, epochs=2, free=True))
GRID: dict[str, tuple[Setting, ...]] = {
    "manner": (
        *(Setting(anchor=anchor) for anchor in (0.0, 0.3, 5.0)),
        Setting(2e-4, anchor=1.0),
        Setting(1e-4),
        Setting(3e-5),
        *(Setting(5e-5, beta=beta, epochs=2) for beta in (0.1, 1.0)),
        Setting(1e-4, beta=3.0, epochs=2),
        Setting(beta=10.0),
        *FREE,
        *(Setting(rate, beta=1.0, epochs=2, free=True) for rate in (2e-4, 5e-4)),
        Setting(2e-4, beta=0.01, epochs=2, free=True, summed=True),
    ),
    "quality": FREE,
}
"""Settings that are tried on dev sentences."""
LATER: dict[str, dict[int, tuple[Setting, ...]]] = {
    "manner": {
        2: (
            *(Setting(5e-4, anchor, epochs=2, round=2) for anchor in (3.0, 10.0, 30.0)),
            *(Setting(5e-4, anchor, epochs=4, round=2) for anchor in (10.0, 30.0)),
            Setting(1e-3, 10.0, epochs=2, round=2),
            *(Setting(rate, epochs=2, round=2, imitate=True) for rate in (2e-4, 5e-4, 1e-3)),
        ),
        3: (
            *(Setting(5e-4, anchor, epochs=2, round=3) for anchor in (10.0, 30.0)),
            Setting(5e-4, epochs=2, round=3, imitate=True),
        ),
    },
    "quality": {
        2: (
            *(Setting(5e-4, anchor, epochs=2, round=2) for anchor in (10.0, 30.0)),
            Setting(5e-4, epochs=2, round=2, imitate=True),
        )
    },
}
"""The same for later rounds; imitation alone is a control, which is chosen apart."""
SPEAKS = {
    "manner": {2: Setting(1e-4, epochs=2, free=True), 3: Setting(5e-4, 30.0, epochs=2, round=2)},
    "quality": {2: Setting(2e-4, free=True)},
}
"""What moves the policy that speaks the rows of a round: the choice of the round before on dev sentences."""
ALONE: dict[str, dict[int, tuple[Setting, ...]]] = {
    "manner": {
        number: tuple(
            Setting(rate, epochs=epochs, round=number, imitate=True, alone=True)
            for rate, epochs in ((2e-4, 6), (5e-4, 3), (1e-3, 3))
        )
        for number in (1, 2)
    }
}
"""The control without a gradient of the reward in any round."""
SPEAKS_ALONE = {1: Setting(epochs=0), 2: Setting(5e-4, epochs=3, imitate=True, alone=True)}
"""Who speaks its rows: the base, then the choice of the first round."""
CANDIDATES = 4
"""Of each sentence in each voice, from which those rows are taken."""
LEAST = {"manner": {"manner.lively": 0.5}, "quality": {"quality": 4.0}}
"""What the reward model must hear in them."""
REACHED = 0.8


@dataclass(frozen=True)
class Heard:
    """What was heard in one utterance.

    Args:
        sentence: which was spoken.
        speaker: whose voice.
        rule: manner and quality as pitch and noise level tell; manner empty without a pitch.
        listener: the same as the held-out listener tells.
        cer: error rate against the right reading.
        nearest_cer: against the reading nearest to what was heard.
        accuracy: 1 if the marked word was read right.
    """

    sentence: str
    speaker: str
    rule: Style
    listener: Style
    cer: float
    nearest_cer: float
    accuracy: float

    def numbers(self, attribute: str) -> dict[str, float]:
        """One number by name of :data:`NUMBERS`."""
        wanted = WANTED[attribute]
        shares = {"wanted_by_rule": self.rule, "wanted_by_listener": self.listener}
        found = {name: float(getattr(style, attribute) == wanted) for name, style in shares.items()}
        return found | {"cer": self.cer, "nearest_cer": self.nearest_cer, "accuracy": self.accuracy}


@dataclass
class MannerCorpus(Corpus):
    """The manner corpus: fixed rows of the base's own, recordings for the reward model, and what listens."""

    assets: Path = field(default_factory=lambda: ASSETS / "manner")
    rows: Path | None = None

    def policy(self) -> CodecLM:
        """A fresh copy of the base model to train."""
        return Qwen2CodecLM(str(self.assets / "base"))

    @cached_property
    def vocoder(self) -> Vocoder | None:
        """The codec of this corpus."""
        return MelVocoder(str(self.assets / "codec"))

    def labelled(self, seed: int, split: str = "preference", sentences: int | None = None) -> Path:
        """Rows that were made with the corpus, the same for every seed, or those of a later round."""
        return self.rows or self.assets / f"{split}.parquet"

    def spoken_rows(self, attribute: str, seed: int, setting: Setting) -> Path:
        """What the policy of the round before speaks of the training sentences, as far as it is clear and as wanted."""
        name = f"{('first', 'second', 'third')[setting.round - 1]}-{seed}-{attribute}{'-alone' * setting.alone}"
        out = self.work / f"{name}.parquet"
        if not out.exists():
            speaks = SPEAKS_ALONE[setting.round] if setting.alone else SPEAKS[attribute][setting.round]
            policy = self.train(attribute, speaks, seed)[0] if speaks.epochs else self.base
            reward = self.reward(seed, "recordings", ATTRIBUTES, ctc=True)
            parts = Parts(policy.eval(), self.listener("labeller"), DRAWN, self.vocoder)
            drawn, heard = (self.work / f"{name}-{kind}.jsonl" for kind in ("drawn", "heard"))
            sentences = self.assets / "sentences/preference.jsonl"
            sample(parts, sentences, drawn, CANDIDATES, SPEAKERS, 256, seed, overwrite=True)
            judge(parts, drawn, heard, 256, overwrite=True)
            rule = LabelRule(desirable=CANDIDATES, undesirable=0, max_cer=0.0, min_measures=LEAST[attribute])
            label(heard, out, rule, reward=reward)
        return out

    def train(self, attribute: str | None, setting: Setting, seed: int) -> tuple[CodecLM, dict[str, Any]]:
        """The policy after one training, and what it cost."""
        reward = self.reward(seed, "recordings", ATTRIBUTES, ctc=True)
        spoken = setting.round > 1 or setting.alone
        self.rows = self.spoken_rows(str(attribute), seed, setting) if spoken else None
        given = None if setting.imitate else reward
        fit = Fit(objective(attribute, setting), setting.learning_rate, epochs=setting.epochs, reward=given)
        module, cost = self.fit(fit, seed)
        self.rows = None
        metrics = module.trainer.callback_metrics
        return module.policy, cost | {"last": {k: float(v) for k, v in metrics.items() if "reward_" in k}}

    @cached_property
    def rule(self) -> StyleRule:
        """Borders of pitch and noise level, from recordings of the build."""
        return StyleRule.read(self.assets / "rule.json")

    def clips(self, split: str, count: int, seed: str) -> tuple[list[Clip], list[Style]]:
        """Sound whose style is known, as it is and through the codec by halves."""
        bank = MannerBank(MelCodec.load(self.assets / "codec").sizes.token_samples)
        generator = random.Random(seed)
        styles = [Style(generator.choice(list(MANNERS)), generator.choice(list(QUALITIES))) for _ in range(count)]
        clips = [
            bank.say(
                generator.choice(split_sentences(0)[split]),  # type: ignore[index]
                generator.choice(READINGS),
                generator.choice(SPEAKERS),
                style,
                generator,
            )
            for style in styles
        ]
        half = count // 2
        return clips[:half] + copy_synthesise(self.assets / "codec", clips[half:]), styles

    @cached_property
    def style_listener(self) -> StyleListener:
        """Trained on sentences that no reward model learns from."""
        path = self.work / "listener.safetensors"
        given = ([], []) if path.exists() else self.clips("base", LISTENER_CLIPS, "listener")
        return kept_listener(path, *given)

    def hear(self, policy: CodecLM, split: str, seed: int, sentences: int | None, batch_size: int = 128) -> list[Heard]:
        """Speak every sentence of a split once in both voices, and listen."""
        policy.eval()
        prompts = evenly_spread(read_prompts(self.assets / f"sentences/{split}.jsonl"), sentences)
        items = utterance_requests(prompts, SPEAKERS, 1, 1000 + seed)
        found = []
        for start in range(0, len(items), batch_size):
            some = items[start : start + batch_size]
            read = [policy.encode_text(one.prompt.text, Context(one.speaker)).prompt(one.seed) for one in some]
            speech = [spoken.speech for spoken in policy.generate(read, TESTED)]
            assert self.vocoder is not None
            sounds = self.vocoder.speak(speech, [one.speaker for one in some])
            rate = self.vocoder.sample_rate
            samples = [
                SpeechSample(t, sound, rate, o.speaker) for t, sound, o in zip(speech, sounds, some, strict=True)
            ]
            verdicts = self.judge.judge(samples, [one.prompt.expected for one in some])
            for one, sound, style, verdict in zip(
                some, sounds, self.style_listener.hear(sounds), verdicts, strict=True
            ):
                ruled = Style(self.rule.manner(sound, one.speaker), self.rule.quality(sound))
                right = float(verdict.reading is Reading.RIGHT)
                cers = verdict.cer, verdict.nearest_cer
                found.append(Heard(one.prompt.id, one.speaker, ruled, style, *cers, right))
        return found

    def run(self, attribute: str | None, setting: Setting, split: str, seed: int, sentences: int | None) -> list[Heard]:
        """Train towards the text and an attribute, and listen, or take what is there; no epochs give the base."""
        name = f"{split}-{seed}-{attribute or 'text'}-{setting.name}" if setting.epochs else f"{split}-{seed}-base"
        out = self.work / f"{name}.jsonl"
        if not out.exists():
            policy, cost = self.train(attribute, setting, seed) if setting.epochs else (self.base, {})
            heard = self.hear(policy, split, seed, sentences)
            write_json_lines(out, [cost, *map(dataclasses.asdict, heard)])
        (_, _), *rows = read_json_lines(out)
        return [Heard(**row | {"rule": Style(**row["rule"]), "listener": Style(**row["listener"])}) for _, row in rows]

    def cost(self, attribute: str | None, setting: Setting, split: str, seed: int) -> dict[str, Any]:
        """Steps and CPU seconds of a finished run."""
        (_, cost), *_ = read_json_lines(self.work / f"{split}-{seed}-{attribute or 'text'}-{setting.name}.jsonl")
        return dict(cost)


BASE = Setting(epochs=0)


def objective(attribute: str | None, setting: Setting) -> Objective:
    """Towards the text, and one attribute if there is one."""
    if setting.imitate:
        return SFT()
    return DiffRO(
        beta=setting.beta,
        tasks=(*TEXT, attribute) if attribute else TEXT,
        targets={attribute: WANTED[attribute]} if attribute else None,
        sft_weight=0.0 if setting.free else setting.anchor,
        rollout="free" if setting.free else "teacher_forced",
        resample=setting.resample,
        reduction="sum" if setting.summed else "mean",
    )


def summary(heard: Sequence[Heard], attribute: str) -> dict[str, Any]:
    """Means, with intervals that resample sentences."""
    clusters = [one.sentence for one in heard]
    numbers = [one.numbers(attribute) for one in heard]
    found = {name: cluster_bootstrap([row[name] for row in numbers], clusters) for name in NUMBERS}
    wanted = [one for one in heard if getattr(one.rule, attribute) == WANTED[attribute]]
    return {name: one.value for name, one in found.items()} | {
        "n": len(heard),
        "intervals": {name: [one.low, one.high] for name, one in found.items()},
        # What such speech costs anyway: of the base's own, too, it is not as clear as the rest.
        "nearest_cer_of_wanted": sum(one.nearest_cer for one in wanted) / max(1, len(wanted)),
    }


def difference(base: Sequence[Heard], other: Sequence[Heard], attribute: str) -> dict[str, Any]:
    """Second minus first on the same sentences, voices and seeds."""
    first, second = ([one.numbers(attribute) for one in side] for side in (base, other))
    clusters = [one.sentence for one in base]
    return {
        name: vars(paired_difference([a[name] for a in first], [b[name] for b in second], clusters)) for name in NUMBERS
    }


def choose(tried: Sequence[tuple[Setting, dict[str, Any]]], base: dict[str, Any]) -> Setting:
    """Of those that reach the share asked for by both measures, or else of all, the best setting.

    That is the one with the largest share where both error rates stay within half a point of the base's; if there is
    none, the clearest of those that reach the share, or the largest share.
    """

    def share(heard: dict[str, Any]) -> float:
        return min(heard["wanted_by_rule"], heard["wanted_by_listener"])

    reached = [one for one in tried if share(one[1]) >= REACHED]
    pool = reached or tried
    clear = [one for one in pool if all(one[1][name] <= base[name] + 0.005 for name in ("cer", "nearest_cer"))]
    if clear or not reached:
        return max(clear or pool, key=lambda one: share(one[1]))[0]
    return min(reached, key=lambda one: one[1]["nearest_cer"])[0]


@dataclass(frozen=True)
class System:
    """What is tested.

    Args:
        name: of its rows in the results.
        attribute: what it is trained towards beside the text, if anything.
        setting: as chosen on dev sentences.
    """

    name: str
    attribute: str | None
    setting: Setting


def tried(
    corpus: MannerCorpus, attribute: str, settings: Sequence[Setting], sentences: int | None, found: dict[str, Any]
) -> list[tuple[Setting, dict[str, Any]]]:
    """Settings with what is heard of them on dev sentences of seed 0, which is also put among the results."""
    rows = []
    for setting in settings:
        heard = summary(corpus.run(attribute, setting, "dev", 0, sentences), attribute)
        rows.append((setting, heard))
        found["dev"].append({"attribute": attribute, "words": setting.words} | dataclasses.asdict(setting) | heard)
        print(attribute, setting.name, {name: round(heard[name], 4) for name in NUMBERS}, flush=True)
    return rows


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    assets: Path = ASSETS / "manner",
    work: Path = Path("runs/diffro_manner"),
    results: Path = RESULTS,
    sentences: int | None = None,
    dev_sentences: int | None = 96,
    threads: int = 1,
    reward_epochs: int = 5,
    controls: tuple[int, ...] | None = None,
) -> None:
    """Run what is missing and write the results.

    Args:
        seeds: of reward models, trainings and test draws.
        assets: the built corpus.
        work: finished runs.
        results: JSON file.
        sentences: test sentences; all of them by default.
        dev_sentences: dev sentences that settings are chosen on.
        threads: of PyTorch.
        reward_epochs: passes of each reward model over the recordings.
        controls: seeds of the control that is trained towards the text alone; all of them by default.
    """
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    corpus = MannerCorpus("audio", work, assets=assets, reward_epochs=reward_epochs)
    said = {"seeds": seeds, "sentences": sentences, "dev_sentences": dev_sentences, "controls": controls}
    knobs = [f"--{name} '{list(one) if isinstance(one, tuple) else one}'" for name, one in said.items() if one]
    found: dict[str, Any] = {"command": " ".join(["python benchmarks/diffro_manner.py", *knobs]), "machine": machine()}
    found |= {"base": read_json(assets / "build.json")["gates"], "wanted": WANTED, "chosen": {}}
    found |= {"dev": [], "rows": [], "pooled": []}
    clips, styles = corpus.clips("test", TOLD_CLIPS, "listener on test")
    told = list(zip(corpus.style_listener.hear([clip.audio for clip in clips]), styles, strict=True))
    found["listener"] = {
        name: sum(getattr(a, name) == getattr(b, name) for a, b in told) / len(told) for name in WANTED
    } | {"n": len(told)}
    for attribute in WANTED:
        base = summary(corpus.run(None, BASE, "dev", 0, dev_sentences), attribute)
        first = tried(corpus, attribute, GRID[attribute], dev_sentences, found)
        systems = [System(f"diffro_{attribute}", attribute, choose(first, base))]
        for number, settings in LATER.get(attribute, {}).items():
            later = tried(corpus, attribute, settings, dev_sentences, found)
            for name in ("diffro", "sft"):
                pool = [one for one in later if one[0].imitate == (name == "sft")]
                systems.append(System(f"{name}_{attribute}_round{number}", attribute, choose(pool, base)))
        for number, settings in ALONE.get(attribute, {}).items():
            alone = tried(corpus, attribute, settings, dev_sentences, found)
            systems.append(System(f"sft_{attribute}_alone_round{number}", attribute, choose(alone, base)))
        text = System("diffro_text", None, systems[0].setting)
        found["chosen"] |= {one.name: dataclasses.asdict(one.setting) for one in systems}
        pairs: dict[str, list[tuple[Heard, Heard]]] = {one.name: [] for one in systems}
        for seed in seeds:
            before = corpus.run(None, BASE, "test", seed, sentences)
            found["rows"].append({"attribute": attribute, "seed": seed, "system": "base"} | summary(before, attribute))
            for system in [text, *systems] if seed in (seeds if controls is None else controls) else systems:
                heard = corpus.run(system.attribute, system.setting, "test", seed, sentences)
                row: dict[str, Any] = {"attribute": attribute, "seed": seed, "system": system.name}
                row |= summary(heard, attribute) | corpus.cost(system.attribute, system.setting, "test", seed)
                row["difference_from_base"] = difference(before, heard, attribute)
                found["rows"].append(row)
                print(system.name, seed, {name: round(row[name], 4) for name in NUMBERS}, flush=True)
                if system.attribute:
                    pairs[system.name] += zip(before, heard, strict=True)
            write_json(results, found)
        for name, both in pairs.items():
            before, after = [one for one, _ in both], [one for _, one in both]
            found["pooled"].append(
                {"attribute": attribute, "system": name, "seeds": list(seeds), "base": summary(before, attribute)}
                | {"aligned": summary(after, attribute), "difference": difference(before, after, attribute)}
            )
        write_json(results, found)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
