# SPDX-License-Identifier: Apache-2.0
"""The built-in objectives; importing this package fills ``Objective.registry``."""

from tts_align.objectives.base import Objective, Outcome, Part, Reads, Step
from tts_align.objectives.dpo import DPO
from tts_align.objectives.kto import KTO
from tts_align.objectives.sft import SFT
from tts_align.objectives.tkto import TKTO

__all__ = ["DPO", "KTO", "SFT", "TKTO", "Objective", "Outcome", "Part", "Reads", "Step"]
