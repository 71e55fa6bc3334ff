# SPDX-License-Identifier: Apache-2.0
"""The built-in objectives; importing this package fills ``Objective.registry``."""

from tts_align.batch import Reads, RowsWanted
from tts_align.objectives.base import Objective, Outcome, Part, Parts, Step
from tts_align.objectives.diffro import DiffRO
from tts_align.objectives.dpo import DPO
from tts_align.objectives.e2e import E2E
from tts_align.objectives.kto import KTO
from tts_align.objectives.mtr import MTR
from tts_align.objectives.sft import SFT
from tts_align.objectives.tkto import TKTO

__all__ = [
    "DPO",
    "E2E",
    "KTO",
    "MTR",
    "SFT",
    "TKTO",
    "DiffRO",
    "Objective",
    "Outcome",
    "Part",
    "Parts",
    "Reads",
    "RowsWanted",
    "Step",
]
