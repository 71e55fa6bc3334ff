# SPDX-License-Identifier: Apache-2.0
"""What each loss makes of the speech tokens, and stage 2 against stage 3: the ablations of arXiv 2606.09234 in small.

    python benchmarks/e2e.py                         # all of it: about half an hour of one core
    python benchmarks/e2e.py --variants '[rm_fm_lm]' # one of them; a later call adds others

The tokenizer of the embedded codec is trained further by the reward model alone (the cascaded baseline), by that
and the flow, and by all three losses; then each is frozen, and flow, reward model and policy are trained on its tokens.
Held-out utterances go through tokenizer, flow and Griffin-Lim to a judge that had no part in training (reconstruction),
and test sentences through policy and flow (synthesis). From stage 2 of the third, training goes on for as long in stage
2 and in stage 3. ``--overlays '[scratch]'`` starts from a tokenizer of random weights instead. What is finished is kept
in ``--work`` and not run again. Writes ``results/e2e.json``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from machine import HERE, machine, save

from tts_align.batch import Reads
from tts_align.cli.entry import run
from tts_align.cli.lightning import AlignCLI
from tts_align.data.manifest import read_manifest
from tts_align.data.select import select
from tts_align.data.sound import FeatureExtractor, collate_recordings
from tts_align.evaluation.judges.base import Expected, SpeechSample
from tts_align.evaluation.judges.ctc import CTCJudge
from tts_align.evaluation.metrics.tokens import TokenCounts
from tts_align.evaluation.report import METRICS, JudgedUtterance
from tts_align.evaluation.statistics.intervals import cluster_bootstrap, paired_difference
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.flow.vocoder import FlowVocoder
from tts_align.objectives import Part
from tts_align.utils.files import read_json_lines

RECIPES = HERE.parent / "recipes"
VARIANTS = ("rm", "rm_fm", "rm_fm_lm")


def recipe(*overlays: str, **flags: Any) -> list[str]:
    """Arguments of a fit: recipes/e2e.yaml, overlays of it, and flags."""
    paths = ["recipes/e2e.yaml", *(f"recipes/e2e/{name}.yaml" for name in overlays)]
    arguments = [word for path in paths for word in ("--config", str(HERE.parent / path))]
    for key, value in flags.items():
        arguments += [f"--{key.replace('__', '.')}", str(value)]
    return ["fit", *arguments]


def command(arguments: Sequence[str]) -> str:
    """The same as it is typed."""
    words = [word.replace(f"{HERE.parent}/", "") for word in arguments]
    return f"tts-align {shlex.join(words)}"


def fitted(arguments: list[str], threads: int) -> AlignCLI:
    """Fit, or go on, or find it finished; then it is tested once more, which costs little."""
    return run([*arguments, "--run.threads", str(threads)])


def heard(cli: AlignCLI, rows: int) -> dict[str, Any]:
    """Reconstruction of held-out utterances, the speech tokens in it, and how probable the policy finds them."""
    module, judge = cli.model.eval(), CTCJudge("demo:audio/judge")
    tokenizer, vocoder = module.parts[Part.TOKENIZER], module.vocoder
    assert isinstance(vocoder, FlowVocoder)
    manifest = read_manifest("demo:audio/dev.parquet")
    items = select(manifest.rows, Reads.SPEECH)[:rows]
    speaker = MelVocoder("demo:audio/codec")
    originals = speaker.speak([torch.tensor(item[0].sound.speech) for item in items], [i[0].row.speaker for i in items])
    items, sounds = FeatureExtractor(tokenizer, speaker).extract(items, manifest)
    recordings = collate_recordings(sounds)
    with torch.no_grad():
        made = tokenizer(recordings.features, recordings.frames)
    speech_tokens = [row[mask] for row, mask in zip(made.tokens, made.mask, strict=True)]
    speakers = [item[0].row.speaker for item in items]
    again = vocoder.speak(speech_tokens, speakers)
    expected = [Expected(item[0].row.text, {"": str(item[0].transcript)}, ("",)) for item in items]
    ids = [item[0].row.text for item in items]
    errors = {}
    for name, waveforms in (("original", originals), ("reconstruction", again)):
        told = [
            SpeechSample(row, sound, 16000, who)
            for row, sound, who in zip(speech_tokens, waveforms, speakers, strict=True)
        ]
        errors[name] = [verdict.cer for verdict in judge.judge(told, expected)]
    mel, frames = vocoder.log_mel(speech_tokens, speakers)
    width = min(mel.shape[1], recordings.features.shape[1])
    real = torch.arange(width) < torch.minimum(frames, recordings.frames)[:, None]
    distance = (mel[:, :width] - recordings.features[:, :width]).abs().mean(-1)
    per_row = ((distance * real).sum(1) / real.sum(1)).tolist()
    counts = TokenCounts.of(made.tokens, made.mask, tokenizer.codebook_size)
    return {
        "utterances": len(items),
        "cer": {name: interval(values, ids) for name, values in errors.items()},
        "mel_distance": interval(per_row, ids),
        "codes": {
            "tokens": int(counts.tokens.sum()),
            "entropy_bits": round(float(counts.entropy_bits()), 3),
            "entropy_bits_miller_madow": round(float(counts.entropy_bits(miller_madow=True)), 3),
            "information_bits": round(float(counts.mutual_information_bits()), 3),
            "used_share": round(float(counts.used_share()), 3),
        },
        "validation": validation(cli.run.directory),
        "_cer": errors["reconstruction"],
        "_ids": ids,
    }


def validation(directory: Path) -> dict[str, float]:
    """Losses on the held-out rows at the end of the last stage."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("val/")]
    return {name.removeprefix("val/"): round(events.Scalars(name)[-1].value, 4) for name in names}


def interval(values: Sequence[float], clusters: Sequence[str]) -> dict[str, float]:
    """Mean with a 95 % interval over sentences."""
    found = cluster_bootstrap(values, clusters)
    return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def spoken(directory: Path) -> dict[str, JudgedUtterance]:
    """Test utterances of the system after training."""
    rows = [JudgedUtterance.from_row(row) for _, row in read_json_lines(directory / "test/utterances.jsonl")]
    return {one.id: one for one in rows if one.system == "aligned"}


def synthesis(directory: Path) -> dict[str, Any]:
    """Error rate and accuracy of test sentences."""
    rows = list(spoken(directory).values())
    ids = [one.sentence for one in rows]
    return {"utterances": len(rows)} | {name: interval([METRICS[name](one) for one in rows], ids) for name in METRICS}


def difference(first: dict[str, JudgedUtterance], second: dict[str, JudgedUtterance]) -> dict[str, Any]:
    """Second minus first, on the same sentences, voices and seeds."""
    ids = sorted(first.keys() & second.keys())
    clusters = [first[name].sentence for name in ids]
    found = {}
    for name, number in METRICS.items():
        one = paired_difference([number(first[i]) for i in ids], [number(second[i]) for i in ids], clusters)
        found[name] = {"value": round(one.value, 4), "low": round(one.low, 4), "high": round(one.high, 4)}
    return found


def main(
    work: Path = Path("runs/e2e_benchmark"),
    variants: tuple[str, ...] = VARIANTS,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    second_epochs: int = 2,
    third_epochs: int = 1,
    sentences: int = 50,
    rows: int = 100,
    max_rows: int | None = None,
    seed: int = 0,
    threads: int = 1,
    third: bool = True,
    overlays: tuple[str, ...] = (),
    out: str = "e2e",
) -> None:
    """Run what is missing and write the results.

    Args:
        work: where the runs are kept.
        variants: which of rm, rm_fm and rm_fm_lm.
        epochs: of stage 1.
        learning_rate: of stage 1.
        second_epochs: of stage 2.
        third_epochs: of stage 3, and of the longer stage 2 that it is compared with.
        sentences: of the test.
        rows: held-out utterances that are reconstructed.
        max_rows: training rows; all by default.
        seed: of everything drawn.
        threads: of the processor.
        third: also compare stage 2 with stage 3, starting from rm_fm_lm.
        overlays: further overlays of recipes/e2e/ that all runs take.
        out: name of the results.
    """
    common: dict[str, Any] = {"seed_everything": seed, "data__seed": seed, "model__test__sentences": sentences}
    if max_rows is not None:
        common["data__max_rows"] = max_rows
    commands: dict[str, str] = {}
    for name in variants:
        arguments = recipe(
            "stage2",
            name,
            *overlays,
            run__directory=work / f"seed{seed}" / name,
            model__stage_fit__epochs=epochs,
            model__stage_fit__learning_rate=learning_rate,
            trainer__max_epochs=second_epochs,
            **common,
        )
        commands[name] = command(arguments)
        cli = fitted(arguments, threads)
        keep(
            work,
            seed,
            name,
            heard(cli, rows) | {"synthesis": synthesis(cli.run.directory), "command": command(arguments)},
        )
    if third and "rm_fm_lm" in variants:
        start = work / f"seed{seed}" / "rm_fm_lm"
        for name, stage in (("stage2_longer", 2), ("stage3", 3)):
            arguments = recipe(
                *overlays,
                objective__stage=stage,
                objective__start=start,
                model__stage_fit="null",
                run__directory=work / f"seed{seed}" / name,
                trainer__max_epochs=third_epochs,
                **common,
            )
            cli = fitted(arguments, threads)
            keep(
                work,
                seed,
                name,
                heard(cli, rows) | {"synthesis": synthesis(cli.run.directory), "command": command(arguments)},
            )
    settings = {"epochs": [epochs, second_epochs, third_epochs], "learning_rate": learning_rate, "max_rows": max_rows}
    summarise(work, seed, out, settings)


def keep(work: Path, seed: int, name: str, row: dict[str, Any]) -> None:
    """Write what a system gave."""
    path = work / f"seed{seed}" / f"{name}.json"
    path.write_text(json.dumps(row, ensure_ascii=False))


def summarise(work: Path, seed: int, out: str, settings: dict[str, Any]) -> None:
    """Collect what has been kept, and compare."""
    folder = work / f"seed{seed}"
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    differences: dict[str, Any] = {}
    for first, second in (("rm", "rm_fm"), ("rm_fm", "rm_fm_lm"), ("stage2_longer", "stage3"), ("rm_fm_lm", "stage3")):
        if {first, second} <= found.keys():
            one, other = found[first], found[second]
            cer = paired_difference(one["_cer"], other["_cer"], one["_ids"])
            differences[f"{second} minus {first}"] = {
                "reconstruction_cer": {
                    "value": round(cer.value, 4),
                    "low": round(cer.low, 4),
                    "high": round(cer.high, 4),
                },
                "synthesis": difference(spoken(folder / first), spoken(folder / second)),
            }
    systems = {name: {k: v for k, v in row.items() if not k.startswith("_")} for name, row in found.items()}
    results = {"machine": machine(), "seed": seed, **settings, "systems": systems, "differences": differences}
    print(save(out, results))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
