# SPDX-License-Identifier: Apache-2.0
"""What commands need of a module: its policy, how it samples, and what turns speech tokens into sound and listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tts_align.evaluation.judges.base import Judge
from tts_align.models.base.generation import Sampling
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.vocoder import Vocoder


@runtime_checkable
class SpeaksAndListens(Protocol):
    """Attributes of an ``AlignModule`` that sampling and judging use."""

    policy: CodecLM
    sampling: Sampling
    vocoder: Vocoder | None
    judge: Judge | None


@dataclass
class Parts:
    """The same without a module around them."""

    policy: CodecLM
    judge: Judge | None
    sampling: Sampling
    vocoder: Vocoder | None = None
