# SPDX-License-Identifier: Apache-2.0
"""How the three kinds of model of the embedded experiment are trained: codec, recognisers, base language model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tts_align.data.demo.audio import Clip
from tts_align.evaluation.judges.ctc import KanaRecogniser, RecogniserSizes
from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.codec.log_mel import LogMel, log_mel_batch
from tts_align.models.codec.mel import CodecSizes, MelCodec
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.utils.files import written_atomically
from tts_align.utils.progress import Bar
from tts_align.utils.readers import load_tensors

KEPT_STEPS = 50
"""A training that can be resumed is kept after each such number of steps."""


@dataclass(frozen=True)
class Schedule:
    """One training run.

    Args:
        steps: Optimiser steps.
        batch_size: Utterances per step.
        learning_rate: Peak, reached after 5 % of the steps; a cosine brings it down to 2 % of itself.
        weight_decay: AdamW's, on matrices only.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01


def optimise(
    model: nn.Module,
    loss: Callable[[], Tensor],
    schedule: Schedule,
    name: str,
    kept: Path | None = None,
    skip: Callable[[int], None] = lambda _: None,
) -> None:
    """AdamW with warm-up, cosine and gradient clipping, in bfloat16 where PyTorch's autocast thinks it safe.

    Args:
        model: What is trained.
        loss: Draws the next batch and gives its loss.
        schedule: Length and rates.
        name: Shown at the progress bar.
        kept: File of an interrupted training, resumed if it is there and removed at the end; none by default.
        skip: Passes over the batches of a number of steps, when a training is resumed.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, schedule.steps))
    begin = _resumed(model, optimizer, scheduler, kept)
    skip(begin)
    model.train()
    with Bar(range(begin, schedule.steps), desc=name, unit="step", initial=begin, total=schedule.steps) as bar:
        for step in bar:
            with torch.autocast("cpu", torch.bfloat16):
                value = loss()
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{value.item():.3f}")
            if kept is not None and (step + 1) % KEPT_STEPS == 0:
                states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                with written_atomically(kept) as scratch:
                    torch.save(states | {"scheduler": scheduler.state_dict(), "steps": step + 1}, scratch)
    if kept is not None:
        kept.unlink(missing_ok=True)
    model.eval()


def _resumed(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, kept: Path | None) -> int:
    """Steps that an interrupted training has done; its states are put in place."""
    if kept is None or not kept.exists():
        return 0
    states = load_tensors(kept)
    model.load_state_dict(states["model"])
    optimizer.load_state_dict(states["optimizer"])
    scheduler.load_state_dict(states["scheduler"])
    return int(states["steps"])


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step.

    >>> [round(rate_factor(step, 100), 2) for step in (0, 4, 50, 100)]
    [0.2, 1.0, 0.51, 0.02]
    """
    warm_up = min(1.0, (step + 1) / max(1, steps // 20))
    return warm_up * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def endless_batches(lengths: Sequence[int], batch_size: int, generator: random.Random) -> Iterator[list[int]]:
    """Positions in batches of roughly like length, in a new order every epoch."""
    spread = 0.2 * max(lengths)
    while True:
        order = sorted(range(len(lengths)), key=lambda row: lengths[row] + generator.uniform(0, spread))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        generator.shuffle(batches)
        yield from batches


def log_mels(features: LogMel, clips: Sequence[Clip]) -> list[Float[Tensor, "f m"]]:
    """Features of each clip."""
    rows = []
    for start in range(0, len(clips), 64):
        padded, frames = log_mel_batch(features, [clip.audio for clip in clips[start : start + 64]])
        rows += [row[:count].clone() for row, count in zip(padded, frames.tolist(), strict=True)]
    return rows


def padded_rows(rows: Sequence[Float[Tensor, "f m"]]) -> tuple[Float[Tensor, "b f m"], Int[Tensor, " b"]]:
    """Rows in one tensor, and the length of each."""
    return pad_sequence(list(rows), batch_first=True), torch.tensor([len(row) for row in rows])


def train_codec(sizes: CodecSizes, clips: Sequence[Clip], schedule: Schedule, seed: int) -> MelCodec:
    """Train tokenizer and decoder together to reproduce the log-mel (mean of absolute and squared error)."""
    torch.manual_seed(seed)
    codec = MelCodec(sizes)
    rows, speakers = log_mels(codec.features, clips), codec.speaker_index([clip.speaker for clip in clips])
    batches = endless_batches([len(row) for row in rows], schedule.batch_size, random.Random(seed))

    def loss() -> Tensor:
        chosen = next(batches)
        log_mel, frames = padded_rows([rows[row] for row in chosen])
        real = torch.arange(log_mel.shape[1]) < frames[:, None]
        error = (codec(log_mel, frames, speakers[chosen]) - log_mel).float()[real]
        return error.abs().mean() + error.square().mean()

    optimise(codec, loss, schedule, "codec")
    return codec.requires_grad_(False)


def train_recogniser(
    sizes: RecogniserSizes, clips: Sequence[Clip], schedule: Schedule, seed: int, name: str
) -> KanaRecogniser:
    """Train a recogniser with CTC on log-mel with a little noise added."""
    torch.manual_seed(seed)
    recogniser = KanaRecogniser(sizes)
    rows = log_mels(recogniser.features, clips)
    batches = endless_batches([len(row) for row in rows], schedule.batch_size, random.Random(seed))

    def loss() -> Tensor:
        chosen = next(batches)
        log_mel, frames = padded_rows([rows[row] for row in chosen])
        return recogniser.loss(log_mel + 0.05 * torch.randn_like(log_mel), frames, [clips[row].kana for row in chosen])

    optimise(recogniser, loss, schedule, name)
    return recogniser.requires_grad_(False)


def train_base(
    model: Qwen2CodecLM, draw: Callable[[], Iterator[TokenRow]], schedule: Schedule, kept: Path | None = None
) -> None:
    """Train a language model to speak.

    Args:
        model: Trained in place.
        draw: Gives the rows of one epoch; the reading of each sentence is drawn anew.
        schedule: Length and rates.
        kept: File of an interrupted training, see :func:`optimise`.
    """

    def endless() -> Iterator[TokenRow]:
        while True:
            yield from draw()

    rows = endless()

    def loss() -> Tensor:
        batch = collate([next(rows) for _ in range(schedule.batch_size)], model.layout)
        return -model(batch).logp.sum() / batch.target.numel()

    def skip(steps: int) -> None:
        for _ in range(steps * schedule.batch_size):
            next(rows)

    optimise(model, loss, schedule, "base", kept, skip)
