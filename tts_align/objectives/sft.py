# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: imitate the good speech."""

from __future__ import annotations

from tts_align.batch import Mean, Reads
from tts_align.objectives.base import Objective, Outcome, Step


class SFT(Objective, name="sft"):
    """Mean cross-entropy of the speech tokens of good rows: those labelled desirable or chosen, and unlabelled ones."""

    reads = Reads.SPEECH

    def forward(self, step: Step) -> Outcome:
        """Share of the mean over all tokens of the step."""
        loss = -step.mean(step.policy.logp, step.batch.totals.tokens)
        return Outcome(loss, {"desirable_logp": Mean.of(step.policy.logp, step.policy.mask)})
