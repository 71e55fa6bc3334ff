# SPDX-License-Identifier: Apache-2.0
"""The policy's learning rate in stage 2 of ``e2e``, chosen on dev sentences: the policy alone, on frozen speech tokens.

    python benchmarks/e2e_rates.py --run runs/e2e/stage1 --rates '[1e-3, 5e-3]'
    python benchmarks/e2e_rates.py --run runs/e2e/stage1 --start base       # a cascaded policy on the same tokens
    python benchmarks/e2e_rates.py --tokens manifest                        # on what the base was taught
    python benchmarks/e2e_rates.py --run runs/e2e/stage1 --rates '[5e-3]' --epochs 6 --average 0.99 --draws 3

In stage 2 the parts share nothing, so the policy's share can be looked at by itself, in half a minute. Its good rows
are tokenised once; cross-entropy, AdamW, clip 1, 20 steps of warm-up, a rate that falls linearly to a twentieth. Dev
sentences in both voices are heard by the labelling recogniser; the judge of the test hears nothing. Adds to
``results/e2e_rates.json``.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from e2e import spoken
from jsonargparse import auto_cli
from machine import HERE, machine, save

from tts_align.batch import Reads
from tts_align.data.demo.sentences import SPEAKERS
from tts_align.data.manifest import read_manifest
from tts_align.data.select import select
from tts_align.data.sound import FeatureExtractor, collate_recordings
from tts_align.models.base.generation import Context
from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.base.vocoder import Vocoder
from tts_align.models.codec.mel_fsq import MelFSQ
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.flow.dit import DiTFlow
from tts_align.models.flow.vocoder import FlowVocoder
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.training.callbacks.moving_average import kept_share, moved

ROWS_PER_STEP, WARM_UP, END = 16, 20, 0.05
Tokens = Literal["run", "codec", "manifest"]


@dataclass(frozen=True)
class Said:
    """A good row as the policy learns it: its text, its voice and its speech tokens."""

    text: str
    speaker: str
    speech: tuple[int, ...]


def tokenised(tokens: Tokens, run: Path | None, manifest_path: str) -> list[Said]:
    """Good rows with the speech tokens of the manifest, of the codec's tokenizer, or of a run's."""
    manifest = read_manifest(manifest_path)
    items = select(manifest.rows, Reads.SPEECH)
    if tokens == "manifest":
        return [Said(one.row.text, one.row.speaker, one.sound.speech) for (one,) in items]
    tokenizer = MelFSQ(str(run / "parts/tokenizer") if run else "demo:audio/codec").eval()
    items, sounds = FeatureExtractor(tokenizer, MelVocoder("demo:audio/codec")).extract(items, manifest)
    found = []
    for start in range(0, len(items), 64):
        recordings = collate_recordings(sounds[start : start + 64])
        with torch.no_grad():
            made = tokenizer(recordings.features, recordings.frames)
        for (one,), row, mask in zip(items[start : start + 64], made.tokens, made.mask, strict=True):
            found.append(Said(one.row.text, one.row.speaker, tuple(row[mask].tolist())))
    return found


def vocoder_of(run: Path | None) -> Vocoder:
    """The codec's own decoder, or the run's flow."""
    if run is None:
        return MelVocoder("demo:audio/codec")
    vocoder = FlowVocoder(steps=5, guidance=0)
    flow = DiTFlow(directory=str(run / "parts/flow")).eval()
    vocoder.attach(flow, MelFSQ(str(run / "parts/tokenizer")).eval(), SPEAKERS)
    return vocoder


@torch.no_grad()
def nats(policy: Qwen2CodecLM, rows: Sequence[TokenRow]) -> float:
    """Mean cross-entropy of a target."""
    policy.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64], policy.layout)
        total, count = total - float(policy(batch).logp.sum()), count + batch.target.numel()
    return total / count


def train(policy: Qwen2CodecLM, rows: Sequence[TokenRow], rate: float, steps: int, seed: int, decay: float) -> None:
    """Cross-entropy on shuffled rows; at the end the policy has the moving average of its weights."""
    average = {name: one.detach().clone() for name, one in policy.named_parameters()}
    generator, order = random.Random(seed), list[int]()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + (END - 1) * step / steps)
    )
    policy.train()
    for step in range(steps):
        if len(order) < ROWS_PER_STEP:
            order += generator.sample(range(len(rows)), len(rows))
        batch = collate([rows[row] for row in order[:ROWS_PER_STEP]], policy.layout)
        del order[:ROWS_PER_STEP]
        loss = -policy(batch).logp.sum() / batch.target.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        moved(average, dict(policy.named_parameters()), kept_share(decay, step + 1))
    with torch.no_grad():
        for name, one in policy.named_parameters():
            one.copy_(average[name])


def tried(
    tokens: Tokens,
    run: Path | None,
    start: str,
    rate: float,
    epochs: int,
    average: float,
    sentences: int,
    draws: int,
    max_rows: int | None,
) -> dict[str, Any]:
    """One policy trained, and what it says of dev sentences."""
    policy = Qwen2CodecLM("demo:audio/base" if start == "base" or run is None else str(run / "parts/policy")).float()
    policy.requires_grad_(True)
    good, held_out = (
        [policy.encode_text(one.text, Context(one.speaker)).row(one.speech) for one in tokenised(tokens, run, path)]
        for path in ("demo:audio/preference.parquet", "demo:audio/dev.parquet")
    )
    good, steps = good[:max_rows], round(epochs * len(good[:max_rows]) / ROWS_PER_STEP)
    before, begin = nats(policy, held_out), time.process_time()
    train(policy, good, rate, steps, 0, average)
    seconds = time.process_time() - begin
    told = [
        one
        for seed in range(11, 11 + draws)
        for one in spoken(policy, vocoder_of(run), sentences, seed, "dev", "labeller").values()
    ]
    means = {name: round(sum(one[name] for one in told) / len(told), 4) for name in ("accuracy", "cer", "nearest_cer")}
    return {
        "tokens": tokens,
        "start": start,
        "rate": rate,
        "epochs": epochs,
        "average": average,
        "steps": steps,
        "nats_before": round(before, 3),
        "nats": round(nats(policy, held_out), 3),
        "nats_of_training_rows": round(nats(policy, good[:600]), 3),
        **means,
        "n": len(told),
        "cpu_seconds": round(seconds, 1),
    }


def main(
    tokens: Tokens = "run",
    run: Path | None = None,
    start: Literal["run", "base"] = "run",
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 5e-3),
    epochs: int = 5,
    average: float = 0.0,
    sentences: int = 160,
    draws: int = 1,
    max_rows: int | None = None,
    out: str = "e2e_rates",
) -> None:
    """Train a policy at each rate and add the rows to the results.

    Args:
        tokens: speech tokens of a run's tokenizer, of the codec's, or of the manifest.
        run: a finished stage whose ``parts`` are taken, for the tokens of a run.
        start: policy that is trained on: the run's, or the base.
        rates: peak learning rates.
        epochs: passes over the good rows.
        average: decay of the moving average of the weights that the training ends with; 0 for none.
        sentences: dev sentences, each in both voices.
        draws: times that each is spoken.
        max_rows: training rows, for trials; all by default.
        out: name of the results.
    """
    if (tokens == "run") != (run is not None):
        raise ValueError(f"expected --run for the speech tokens of a run and for no other, got {tokens} and {run}")
    path = HERE / "results" / f"{out}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    for rate in rates:
        rows.append(
            tried(tokens, run, "base" if run is None else start, rate, epochs, average, sentences, draws, max_rows)
        )
        print(rows[-1], save(out, {"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
