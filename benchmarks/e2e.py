# SPDX-License-Identifier: Apache-2.0
"""What each loss makes of the speech tokens, and stage 2 against stage 3: the ablations of arXiv 2606.09234 in small.

    python benchmarks/e2e.py                  # three seeds: about half an hour of one core
    python benchmarks/e2e.py --seeds '[0]'    # one; a later call adds others

Systems, seed by seed, each from ``recipes/e2e.yaml`` with its overlays and its learning rates:

============== =======================================================================================================
base           as it ships: the policy through the codec's own decoder
rm             tokenizer trained by the reward model alone, then frozen; then the recipe's stage 2
rm_fm          by reward model and flow
rm_fm_lm       by all three losses: where stages 2 and 3 are compared from
cascaded       ``rm`` and the same ``--last`` epochs of stage 2 that ``stage2`` has
stage2         ``rm_fm_lm`` and ``--last`` epochs more of stage 2, at the learning rate of stage 3
stage2_as_long stage 2 for as many seconds as ``stage3`` takes
stage3         ``--last`` epochs of stage 3
recipe         the same at the recipe's own rate, where ``--rate`` gives the others another one
============== =======================================================================================================

Held-out utterances go through tokenizer, flow and Griffin-Lim to a judge that had no part in training (reconstruction),
and test sentences through policy and flow (synthesis). What is finished is kept in ``--work`` and not run again. Writes
``results/e2e.json`` after every system.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from machine import HERE, machine, save

from tts_align.batch import Reads
from tts_align.cli.entry import run
from tts_align.cli.lightning import AlignCLI
from tts_align.data.demo.sentences import SPEAKERS
from tts_align.data.manifest import read_manifest
from tts_align.data.select import select
from tts_align.data.sound import FeatureExtractor, collate_recordings
from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Expected, Reading, SpeechSample
from tts_align.evaluation.judges.ctc import CTCJudge
from tts_align.evaluation.listening import speak_and_judge
from tts_align.evaluation.metrics.tokens import TokenCounts
from tts_align.evaluation.parts import Parts
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.speaking import evenly_spread, utterance_requests
from tts_align.evaluation.statistics.intervals import cluster_bootstrap, paired_difference
from tts_align.models.base.generation import Sampling
from tts_align.models.base.tokenizer import TokenizerHead
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.codec.mel_fsq import MelFSQ
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.flow.vocoder import FlowVocoder
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.objectives import Part
from tts_align.utils.readers import read_yaml

SAMPLING = Sampling(top_p=0.9, top_k=0, repetition_window=0, min_ratio=1.0, max_ratio=15.0)
ONLY_IN_STAGE_3 = tuple(f"objective__{name}" for name in ("second_flow_weight", "text_task", "resample"))
"""Knobs of the recipe that stage 2 must not have."""
PAIRS = (
    ("rm", "rm_fm"),
    ("rm_fm", "rm_fm_lm"),
    ("cascaded", "stage2"),
    ("stage2", "stage3"),
    ("stage2_as_long", "stage3"),
    ("base", "stage2"),
    ("base", "stage3"),
    ("base", "rm_fm_lm"),
    ("base", "recipe"),
    ("rm_fm_lm", "recipe"),
)
"""Second minus first."""


def fitted(work: Path, name: str, seed: int, *overlays: str, **flags: Any) -> tuple[AlignCLI, float, str]:
    """Fit recipes/e2e.yaml with overlays and flags, or find it finished; processor seconds and the command."""
    paths = ["recipes/e2e.yaml", *(f"recipes/e2e/{overlay}.yaml" for overlay in overlays)]
    arguments = [word for path in paths for word in ("--config", str(HERE.parent / path))]
    own = {
        "seed_everything": seed,
        "run__directory": work / f"seed{seed}" / name,
        "run__threads": 1,
        "run__test_after_fit": "false",
        "model__test": "null",
        "trainer__callbacks": json.dumps(averaging()),
    }
    for key, value in (own | flags).items():
        arguments += [f"--{key.replace('__', '.')}", str(value)]
    start = time.process_time()
    cli = run(["fit", *arguments])
    words = [word.replace(f"{HERE.parent}/", "") for word in arguments]
    return cli, time.process_time() - start, f"tts-align fit {shlex.join(words)}"


def averaging() -> list[Any]:
    """Those of the recipe's callbacks that change what is learnt; the others listen."""
    callbacks = read_yaml(HERE.parent / "recipes/e2e.yaml")["trainer"]["callbacks"]
    return [one for one in callbacks if one["class_path"].endswith(".MovingAverage")]


def reconstructed(tokenizer: TokenizerHead, vocoder: Vocoder, rows: int) -> dict[str, Any]:
    """Held-out utterances made again of their speech tokens, and those speech tokens."""
    manifest = read_manifest("demo:audio/dev.parquet")
    items = select(manifest.rows, Reads.SPEECH)[:rows]
    items, sounds = FeatureExtractor(tokenizer, MelVocoder("demo:audio/codec")).extract(items, manifest)
    recordings = collate_recordings(sounds)
    with torch.no_grad():
        made = tokenizer(recordings.features, recordings.frames)
        before = MelFSQ("demo:audio/codec")(recordings.features, recordings.frames)
    speech = [row[mask] for row, mask in zip(made.tokens, made.mask, strict=True)]
    speakers = [item[0].row.speaker for item in items]
    told = [
        SpeechSample(row, sound, 16000, who)
        for row, sound, who in zip(speech, vocoder.speak(speech, speakers), speakers, strict=True)
    ]
    expected = [Expected(item[0].row.text, {"": str(item[0].transcript)}, ("",)) for item in items]
    errors = [verdict.cer for verdict in CTCJudge("demo:audio/judge").judge(told, expected)]
    mel, frames = heard_mel(vocoder, speech, speakers)
    width = min(mel.shape[1], recordings.features.shape[1])
    real = torch.arange(width) < torch.minimum(frames, recordings.frames)[:, None]
    distance = (mel[:, :width] - recordings.features[:, :width]).abs().mean(-1)
    counts = TokenCounts.of(made.tokens, made.mask, tokenizer.codebook_size)
    return {
        "reconstruction": dict(zip([item[0].row.id for item in items], errors, strict=True)),
        "reconstruction_utterances": len(items),
        "mel_distance": round(float((distance * real).sum() / real.sum()), 4),
        "tokens_unchanged": round(float((made.tokens == before.tokens)[made.mask].float().mean()), 4),
        "entropy_bits": round(float(counts.entropy_bits()), 3),
        "information_bits": round(float(counts.mutual_information_bits()), 3),
        "used_share": round(float(counts.used_share()), 3),
    }


def heard_mel(vocoder: Vocoder, speech: Sequence[torch.Tensor], speakers: Sequence[str]) -> Any:
    """Log-mel and frames of speech tokens."""
    if isinstance(vocoder, FlowVocoder):
        return vocoder.log_mel(speech, speakers)
    assert isinstance(vocoder, MelVocoder)
    return vocoder.log_mel(speech, vocoder.codec.speaker_index(speakers))


def spoken(
    policy: Any, vocoder: Vocoder, sentences: int, seed: int, split: str = "test", judge: str = "judge"
) -> dict[str, dict[str, Any]]:
    """Utterances of held-out sentences by name: sentence, error rates, and whether the reading is right."""
    prompts = evenly_spread(read_prompts(f"demo:audio/sentences/{split}.jsonl"), sentences)
    requests = utterance_requests(prompts, SPEAKERS, 1, seed + 1)
    parts = Parts(policy=policy, judge=CTCJudge(f"demo:audio/{judge}"), sampling=SAMPLING, vocoder=vocoder)
    judged: list[Candidate] = speak_and_judge(policy.eval(), parts, requests, 128)
    found = {}
    for one in judged:
        assert one.verdict is not None
        found[one.id] = {
            "sentence": one.prompt.id,
            "cer": one.verdict.cer,
            "nearest_cer": one.verdict.nearest_cer,
            "accuracy": float(one.verdict.reading is Reading.RIGHT),
        }
    return found


def base(sentences: int, rows: int, seed: int) -> dict[str, Any]:
    """The system as it ships."""
    vocoder = MelVocoder("demo:audio/codec")
    found = reconstructed(MelFSQ("demo:audio/codec").eval(), vocoder, rows)
    return found | {"spoken": spoken(Qwen2CodecLM("demo:audio/base"), vocoder, sentences, seed)}


def measured(cli: AlignCLI, seconds: float, command: str, sentences: int, rows: int, seed: int) -> dict[str, Any]:
    """What a fitted system reconstructs and says."""
    module = cli.model.eval()
    vocoder, tokenizer = module.vocoder, module.parts[Part.TOKENIZER]
    assert vocoder is not None
    metrics = {name: round(float(value), 4) for name, value in cli.trainer.callback_metrics.items() if "val/" in name}
    return {
        **reconstructed(tokenizer, vocoder, rows),
        "spoken": spoken(module.policy, vocoder, sentences, seed),
        "steps": cli.trainer.global_step,
        "epoch_steps": int(cli.trainer.num_training_batches),
        "cpu_seconds": round(seconds, 1),
        "validation": metrics,
        "command": command,
    }


def row(seed: int, system: str, found: dict[str, Any]) -> dict[str, Any]:
    """A system's line in the results."""
    errors, judged = list(found["reconstruction"].values()), list(found["spoken"].values())
    kept = {name: value for name, value in found.items() if name not in ("reconstruction", "spoken")}
    means = {name: sum(one[name] for one in judged) / len(judged) for name in ("accuracy", "cer", "nearest_cer")}
    return {
        "seed": seed,
        "system": system,
        "reconstruction_cer": round(sum(errors) / len(errors), 4),
        **{name: round(value, 4) for name, value in means.items()},
        "n": len(judged),
        **kept,
    }


def compared(work: Path, first: str, second: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Second minus first over the utterances of all seeds, with intervals that resample sentences."""
    pairs = []
    for seed in seeds:
        paths = [work / f"seed{seed}" / f"{name}.json" for name in (first, second)]
        if all(path.is_file() for path in paths):
            pairs.append([json.loads(path.read_text()) for path in paths])
    if not pairs:
        return {}
    found: dict[str, Any] = {"second": second, "first": first, "seeds": len(pairs)}
    for name in ("accuracy", "cer", "nearest_cer"):
        sides = [[one["spoken"][key][name] for one, _ in pairs for key in sorted(one["spoken"])]]
        sides.append([other["spoken"][key][name] for one, other in pairs for key in sorted(one["spoken"])])
        clusters = [one["spoken"][key]["sentence"] for one, _ in pairs for key in sorted(one["spoken"])]
        found[name] = interval(paired_difference(*sides, clusters))
    names = [key for one, _ in pairs for key in sorted(one["reconstruction"])]
    before = [one["reconstruction"][key] for one, _ in pairs for key in sorted(one["reconstruction"])]
    after = [other["reconstruction"][key] for one, other in pairs for key in sorted(one["reconstruction"])]
    return found | {"reconstruction_cer": interval(paired_difference(before, after, names))}


def interval(found: Any) -> dict[str, float]:
    """As it is written."""
    return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def pooled(work: Path, system: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Means of a system over all seeds, with intervals that resample sentences."""
    paths = [work / f"seed{seed}" / f"{system}.json" for seed in seeds]
    judged = [one for path in paths if path.is_file() for one in json.loads(path.read_text())["spoken"].values()]
    clusters = [one["sentence"] for one in judged]
    found = {
        name: interval(cluster_bootstrap([one[name] for one in judged], clusters))
        for name in ("accuracy", "cer", "nearest_cer")
    }
    return {"system": system, "n": len(judged), **found}


def main(
    work: Path = Path("runs/e2e_benchmark"),
    seeds: tuple[int, ...] = (0, 1, 2),
    systems: tuple[str, ...] = ("rm", "cascaded", "rm_fm"),
    first: int | None = None,
    long: int | None = None,
    last: int = 1,
    rate: float | None = None,
    sentences: int = 160,
    rows: int = 200,
    max_rows: int | None = None,
    out: str = "e2e",
) -> None:
    """Run what is missing and write the results.

    Args:
        work: where the runs are kept.
        seeds: of everything drawn.
        systems: which of rm, cascaded and rm_fm are run beside the others.
        first: epochs of stage 1; the recipe's by default.
        long: epochs of stage 2 of every variant; the recipe's by default.
        last: epochs of stage 3, and of the stage 2 beside it.
        rate: learning rate of those; the recipe's by default.
        sentences: of the test, each in both voices.
        rows: held-out utterances that are reconstructed.
        max_rows: training rows, for trials, which are validated on one batch; all by default.
        out: name of the results.
    """
    settings = {"epochs": {"first": first, "long": long, "last": last}, "rate": rate}

    def keep(seed: int, name: str, *overlays: str, **flags: Any) -> dict[str, Any]:
        path = work / f"seed{seed}" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            if name == "base":
                found = base(sentences, rows, seed)
            else:
                few = {} if max_rows is None else {"data__max_rows": max_rows, "trainer__limit_val_batches": 1}
                found = measured(*fitted(work, name, seed, *overlays, **few, **flags), sentences, rows, seed)
            path.write_text(json.dumps(found, ensure_ascii=False))
            summarise(work, seeds, out, settings)
        return json.loads(path.read_text())  # type: ignore[no-any-return]

    def variant(seed: int, name: str) -> dict[str, Any]:
        flags: dict[str, Any] = {} if first is None else {"model__stage_fit__epochs": first}
        return keep(seed, name, "stage2", name, **flags, **({} if long is None else {"trainer__max_epochs": long}))

    def further(seed: int, name: str, start: str, stage: int, steps: int, rate: float | None = rate) -> dict[str, Any]:
        flags: dict[str, Any] = {
            "objective__start": work / f"seed{seed}" / start,
            "objective__stage": stage,
            "model__stage_fit": "null",
            "model__lr_scheduler__init_args__total_iters": steps,
            "trainer__max_steps": steps,
            "trainer__max_epochs": -1,
        }
        if rate is not None:
            flags["model__optimizer__init_args__lr"] = rate
        return keep(seed, name, **flags, **({} if stage == 3 else dict.fromkeys(ONLY_IN_STAGE_3, "null")))

    for seed in seeds:
        keep(seed, "base")
        steps = last * variant(seed, "rm_fm_lm")["epoch_steps"]
        stage3 = further(seed, "stage3", "rm_fm_lm", 3, steps)
        stage2 = further(seed, "stage2", "rm_fm_lm", 2, steps)
        as_long = round(steps * stage3["cpu_seconds"] / stage2["cpu_seconds"])
        further(seed, "stage2_as_long", "rm_fm_lm", 2, as_long)
        if rate is not None:
            further(seed, "recipe", "rm_fm_lm", 3, steps, None)
    for seed in seeds if {"rm", "cascaded"} & set(systems) else ():
        steps = last * variant(seed, "rm")["epoch_steps"]
        if "cascaded" in systems:
            further(seed, "cascaded", "rm", 2, steps)
    for seed in seeds if "rm_fm" in systems else ():
        variant(seed, "rm_fm")
    summarise(work, seeds, out, settings)


def summarise(work: Path, seeds: Sequence[int], out: str, settings: dict[str, Any]) -> None:
    """Collect what has been kept, and compare."""
    rows = [
        row(seed, path.stem, json.loads(path.read_text()))
        for seed in seeds
        for path in sorted((work / f"seed{seed}").glob("*.json"))
    ]
    systems = dict.fromkeys(one["system"] for one in rows)
    comparisons = [one for pair in PAIRS if (one := compared(work, *pair, seeds))]
    results = {
        "machine": machine(),
        **settings,
        "rows": rows,
        "pooled": [pooled(work, system, seeds) for system in systems],
        "comparisons": comparisons,
    }
    print(save(out, results))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
