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
    "AlignModule": "tts_align.training.module",
    "AlignTrainer": "tts_align.cli.trainer",
    "Batch": "tts_align.batch",
    "CodecLM": "tts_align.models.base.policy",
    "CosyVoiceLM": "tts_align.models.cosyvoice.lm",
    "CosyVoiceTokenizer": "tts_align.models.cosyvoice.frontend",
    "CosyVoiceVocoder": "tts_align.models.cosyvoice.vocoder",
    "DiTFlow": "tts_align.models.flow.dit",
    "FlowVocoder": "tts_align.models.flow.vocoder",
    "CTCJudge": "tts_align.evaluation.judges.ctc",
    "Judge": "tts_align.evaluation.judges.base",
    "Mean": "tts_align.batch",
    "MelFSQ": "tts_align.models.codec.mel_fsq",
    "MelTokenizer": "tts_align.models.codec.mel",
    "MelVocoder": "tts_align.models.codec.vocoder",
    "Objective": "tts_align.objectives.base",
    "Outcome": "tts_align.objectives.base",
    "Part": "tts_align.objectives.base",
    "Qwen2CodecLM": "tts_align.models.policy.qwen2",
    "Reads": "tts_align.batch",
    "Rows": "tts_align.batch",
    "Sampling": "tts_align.models.base.generation",
    "Scored": "tts_align.batch",
    "RewardModel": "tts_align.models.reward.model",
    "SpeechTokenizer": "tts_align.models.base.tokenizer",
    "Step": "tts_align.objectives.base",
    "SymbolicJudge": "tts_align.evaluation.judges.symbolic",
    "Vocoder": "tts_align.models.base.vocoder",
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
