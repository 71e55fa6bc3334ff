# SPDX-License-Identifier: Apache-2.0
"""The flow of the embedded experiment: trained on speech tokens of its codec, and heard through Griffin-Lim."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tts_align.cli.demo.training import Schedule, endless_batches, log_mels, optimise, padded_rows
from tts_align.data.demo.audio import Clip
from tts_align.evaluation.judges.ctc import CTCJudge, error_rate
from tts_align.models.base.flow_records import FlowDraws
from tts_align.models.codec.mel import MelCodec, encode
from tts_align.models.codec.mel_fsq import MelFSQ
from tts_align.models.flow.dit import DiTFlow, DiTFlowSizes
from tts_align.models.flow.prior import PriorSizes
from tts_align.models.flow.vocoder import FlowVocoder
from tts_align.utils.averages import moving_average
from tts_align.utils.progress import Bar

STEPS = 5
"""Of the solver, when the flow is heard."""
DECAY = 0.999
"""Of the moving average of the weights, which is what is kept."""
_COMMON = {
    "mel_channels": 48,
    "speaker_channels": 2,
    "frames_per_token": 8,
    "patch_frames": 8,
    "predicts": "mel",
    "chunk_frames": 40,
    "time_channels": 32,
    "position_kernel": 3,
    "position_groups": 8,
    "dropout": 0.0,
}
SHIPPED = DiTFlowSizes(1080, dim=64, depth=2, heads=4, head_dim=16, prior=PriorSizes(), **_COMMON)  # type: ignore[arg-type]
"""The codec's decoder and a small transformer that corrects it."""
FROM_NOISE = DiTFlowSizes(
    1080,
    dim=192,
    depth=3,
    heads=4,
    head_dim=48,
    upsampling="learned",
    lookahead=2,
    lookahead_channels=192,
    **_COMMON,  # type: ignore[arg-type]
)
"""No decoder: everything is made from noise and speech tokens; measured, not shipped."""


def train_flow(sizes: DiTFlowSizes, codec: MelCodec, clips: Sequence[Clip], schedule: Schedule, seed: int) -> DiTFlow:
    """Train a flow to make the log-mel of clips of their speech tokens, and average its weights.

    With a prior its decoder begins as the codec's, and its table is the codec's codebook and stays so: what reads the
    codebook through a linear map can then take the table's place exactly.

    Args:
        sizes: of the flow.
        codec: makes the speech tokens.
        clips: speech of the codec's voices.
        schedule: length and rates.
        seed: of weights and draws.
    """
    torch.manual_seed(seed)
    flow = DiTFlow(sizes)
    rows, speakers = log_mels(codec.features, clips), codec.speaker_index([clip.speaker for clip in clips])
    speech = encode(codec, [clip.audio for clip in clips])
    voices = torch.eye(len(codec.sizes.speakers))
    if flow.prior is not None:
        with torch.no_grad():
            flow.table.weight.copy_(codec.tokenizer.embed(torch.arange(codec.tokenizer.codebook_size)[None])[0])
            flow.prior.take_over(codec.decoder, flow.project_speaker(voices))
        flow.table.requires_grad_(False)
    batches = endless_batches([len(row) for row in rows], schedule.batch_size, random.Random(seed))
    average, generator = moving_average(flow, DECAY), torch.Generator().manual_seed(seed)
    begun = False

    def loss() -> Tensor:
        nonlocal begun
        if begun:  # of the step before
            average.update_parameters(flow)
        begun = True
        chosen = next(batches)
        mel, frames = padded_rows([rows[row] for row in chosen])
        tokens, counts = padded_rows([speech[row] for row in chosen])
        draws = FlowDraws.draw(
            (counts * sizes.frames_per_token).tolist(),
            sizes.mel_channels,
            [generator] * len(chosen),
            streaming=False,
        )
        real = torch.arange(mel.shape[1]) < frames[:, None]
        token_mask = torch.arange(tokens.shape[1]) < counts[:, None]
        return flow.loss(tokens, token_mask, mel, real, voices[speakers[chosen]], draws).value

    optimise(flow, loss, schedule, "flow")
    average.update_parameters(flow)
    trained: DiTFlow = average.module  # type: ignore[assignment]
    return trained.requires_grad_(False).eval()


def reconstructed(flow: DiTFlow, codec: Path, clips: Sequence[Clip]) -> list[Tensor]:
    """Clips through tokenizer, flow (without guidance) and Griffin-Lim."""
    tokenizer, vocoder = MelFSQ(str(codec)), FlowVocoder(steps=STEPS, guidance=0.0)
    voices = MelCodec.load(codec).sizes.speakers
    vocoder.attach(flow, tokenizer, voices)
    sounds: list[Tensor] = []
    for start in Bar(range(0, len(clips), 128), desc="reconstruction", unit="batch"):
        some = clips[start : start + 128]
        sounds += vocoder.speak(tokenizer.encode([one.audio for one in some]), [one.speaker for one in some])
    return sounds


def reconstruction_error(flow: DiTFlow, parts: Path, clips: Sequence[Clip]) -> float:
    """Mean character error rate of what the judge hears in :func:`reconstructed` clips.

    Args:
        flow: in evaluation mode.
        parts: folder that holds ``codec`` and ``judge``.
        clips: speech that nothing was trained on.
    """
    transcripts = CTCJudge(str(parts / "judge")).recogniser.transcribe(reconstructed(flow, parts / "codec", clips))
    errors = [error_rate(clip.kana, heard) for clip, heard in zip(clips, transcripts, strict=True)]
    return sum(errors) / len(errors)
