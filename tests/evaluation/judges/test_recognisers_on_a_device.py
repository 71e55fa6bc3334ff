# SPDX-License-Identifier: Apache-2.0
"""Recognisers follow the trainer's device, here a pretended one, and hear there what they hear on the CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from simulated_device import simulated_device
from tiny_ctc import save_ctc, tone
from tiny_whisper import save_whisper

from tts_align.data.records import Span
from tts_align.evaluation.judges.base import Expected, SpeechSample
from tts_align.evaluation.judges.recogniser import ReadingRules, RecogniserJudge
from tts_align.evaluation.judges.transformers_ctc import TransformersCTCJudge
from tts_align.evaluation.judges.whisper import WhisperJudge

KANA = list("からいつのべ")
SENTENCE = Expected("べの辛い", right=("からい",), spans=(Span(2, 4, ("からい",), ("つらい",)),), language="ja")


@pytest.mark.parametrize("kind", ["whisper", "ctc"])
def test_on_a_device_as_on_the_cpu(tmp_path: Path, kind: str) -> None:
    rules = ReadingRules(0.0, subtract_unheard=True, max_cer=math.inf)
    folder = str(save_whisper(tmp_path / kind) if kind == "whisper" else save_ctc(tmp_path / kind, KANA))

    def judge() -> RecogniserJudge:
        if kind == "whisper":
            return WhisperJudge(folder, max_tokens=3, readings=rules)
        return TransformersCTCJudge(folder, readings=rules)

    samples = [SpeechSample(torch.zeros(0, dtype=torch.long), tone(text, KANA), 16_000) for text in ("べのから", "べ")]
    wanted = judge().judge(samples, [SENTENCE] * 2)
    with simulated_device() as device:
        moved = judge().to(device)
        assert moved.own_device == device
        found = moved.judge(samples, [SENTENCE] * 2)
    for one, other in zip(wanted, found, strict=True):
        assert (one.transcript, one.cer, one.reading) == (other.transcript, other.cer, other.reading)
        assert one.readings == pytest.approx(other.readings, abs=1e-3)
