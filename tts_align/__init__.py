# SPDX-License-Identifier: Apache-2.0
"""Alignment of speech language models: several objectives behind one training step.

The public names load when they are first used, so ``import tts_align`` costs nothing. The names of classes, without
their module, are what a recipe may write after ``class_path:``. The functions of tensors, such as :func:`dpo_loss` and
:func:`gumbel_softmax_st`, serve any training loop.
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
    "DPO": "tts_align.objectives.dpo",
    "DiffRO": "tts_align.objectives.diffro",
    "E2E": "tts_align.objectives.e2e",
    "Judge": "tts_align.evaluation.judges.base",
    "KTO": "tts_align.objectives.kto",
    "MTR": "tts_align.objectives.mtr",
    "Mean": "tts_align.batch",
    "MelFSQ": "tts_align.models.codec.mel_fsq",
    "MelTokenizer": "tts_align.models.codec.mel",
    "MelVocoder": "tts_align.models.codec.vocoder",
    "Objective": "tts_align.objectives.base",
    "Outcome": "tts_align.objectives.base",
    "Part": "tts_align.objectives.base",
    "Parts": "tts_align.objectives.base",
    "Qwen2CodecLM": "tts_align.models.policy.qwen2",
    "Reads": "tts_align.batch",
    "RowNoise": "tts_align.gumbel",
    "Rows": "tts_align.batch",
    "RowsWanted": "tts_align.batch",
    "SFT": "tts_align.objectives.sft",
    "Sampling": "tts_align.models.base.generation",
    "Scored": "tts_align.batch",
    "RewardModel": "tts_align.models.reward.model",
    "ShardedStrategy": "tts_align.training.sharding",
    "SherpaJudge": "tts_align.evaluation.judges.sherpa",
    "SpeechTokenizer": "tts_align.models.base.tokenizer",
    "Step": "tts_align.objectives.base",
    "SymbolicJudge": "tts_align.evaluation.judges.symbolic",
    "TKTO": "tts_align.objectives.tkto",
    "TransformersCTCJudge": "tts_align.evaluation.judges.transformers_ctc",
    "Vocoder": "tts_align.models.base.vocoder",
    "WhisperJudge": "tts_align.evaluation.judges.whisper",
    "annealed": "tts_align.gumbel",
    "chosen_logp": "tts_align.logprobs",
    "dpo_loss": "tts_align.objectives.dpo",
    "fit": "tts_align.cli.python",
    "full_kl": "tts_align.logprobs",
    "gumbel_softmax_st": "tts_align.gumbel",
    "ipo_loss": "tts_align.objectives.dpo",
    "kto_loss": "tts_align.objectives.kto",
    "masked_mean": "tts_align.logprobs",
    "masked_sum": "tts_align.logprobs",
    "posterior_noise": "tts_align.gumbel",
    "row_generators": "tts_align.gumbel",
    "token_values": "tts_align.objectives.tkto",
    "token_weights": "tts_align.objectives.tkto",
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
