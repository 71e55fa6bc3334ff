# SPDX-License-Identifier: Apache-2.0
"""Buzzes instead of eSpeak's voices: pitch, length and nothing else, so that tests need no synthesiser."""

import pytest
import torch

from tts_align.data.demo import manner
from tts_align.data.demo.audio import SAMPLE_RATE, VOICES
from tts_align.data.demo.espeak import EspeakPhrase

BASE_PITCH = dict(zip(VOICES.values(), (100.0, 50.0), strict=True))


def buzz(phrase: EspeakPhrase) -> torch.Tensor:
    """A tone with overtones, as high as the pitch and as long as the rate say, fading at the end."""
    seconds = len(phrase.text) * 18 / phrase.rate
    time = torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = BASE_PITCH[phrase.voice] * 2 ** (phrase.pitch / 40)
    tone = sum(torch.sin(2 * torch.pi * pitch * k * time) / k for k in range(1, 5))
    return 0.3 * tone * (1 - time / seconds)


def pitched_bank(patch: pytest.MonkeyPatch) -> manner.MannerBank:
    """Every phrase as a buzz; while the patch holds, every new bank is of such."""
    patch.setattr(manner, "synthesise", lambda phrases: [buzz(phrase) for phrase in phrases])
    return manner.MannerBank(1280)
