# SPDX-License-Identifier: Apache-2.0
"""Alignment of speech language models: several objectives behind one training step.

The public names load when they are first used, so ``import tts_align`` costs nothing. The same names, without their
module, are what a recipe may write after ``class_path:``.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "AlignData": "tts_align.data.datamodule",
    "AlignModule": "tts_align.module",
    "AlignTrainer": "tts_align.verbs.trainer",
    "Batch": "tts_align.batch",
    "CodecLM": "tts_align.models.base",
    "CosyVoiceLM": "tts_align.models.cosyvoice.lm",
    "CosyVoiceTokenizer": "tts_align.models.cosyvoice.frontend",
    "CosyVoiceVocoder": "tts_align.models.cosyvoice.vocoder",
    "DiTFlow": "tts_align.models.dit",
    "FlowVocoder": "tts_align.models.flow_vocoder",
    "CTCJudge": "tts_align.judges.ctc",
    "Judge": "tts_align.judges.base",
    "Mean": "tts_align.batch",
    "MelFSQ": "tts_align.models.fsq",
    "MelTokenizer": "tts_align.models.mel",
    "MelVocoder": "tts_align.models.mel",
    "Objective": "tts_align.objectives.base",
    "Outcome": "tts_align.objectives.base",
    "Part": "tts_align.objectives.base",
    "Qwen2CodecLM": "tts_align.models.qwen2",
    "Reads": "tts_align.objectives.base",
    "Rows": "tts_align.batch",
    "Sampling": "tts_align.models.base",
    "Scored": "tts_align.batch",
    "RewardModel": "tts_align.models.reward",
    "SpeechTokenizer": "tts_align.models.base",
    "Step": "tts_align.objectives.base",
    "SymbolicJudge": "tts_align.judges.symbolic",
    "Vocoder": "tts_align.models.base",
}
"""Public name -> the module that defines it."""

__all__ = ["PUBLIC", *sorted(PUBLIC)]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted([*globals(), *PUBLIC])
