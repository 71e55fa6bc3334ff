# SPDX-License-Identifier: Apache-2.0
"""Rows spoken anew by the policy itself, so that training meets what the policy now says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from tts_align.batch import Batch
from tts_align.models.base.code_places import code_places
from tts_align.models.base.generation import Encoded, Prompt, Sampling, Spoken
from tts_align.models.base.layout import Layout, collate

WHOLE = Sampling(top_p=1.0, top_k=0, repetition_window=0, min_ratio=0.0)
"""Draws from the whole distribution, so that what is spoken is the policy's own."""


@runtime_checkable
class Speaker(Protocol):
    """What of a policy a roll-out uses."""

    layout: Layout

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Spoken]:
        """See :meth:`tts_align.models.base.policy.CodecLM.generate`."""


def roll_out(batch: Batch, policy: Speaker, sampling: Sampling = WHOLE) -> Batch:
    """The same texts with speech that the policy draws now; a row without end keeps what it had.

    What is drawn for a row depends on the row's own seed only. The counts of the step stay those of the stored rows, so
    that they do not depend on the cut into micro-batches either.

    Args:
        batch: with utterances.
        policy: speaks; without gradients, in evaluation mode.
        sampling: how.
    """
    said = batch.utterances
    assert said is not None
    prompts = [
        Encoded(row.text, row.prefix, row.prompt).prompt(seed) for row, seed in zip(said.rows, said.seeds, strict=True)
    ]
    spoken = policy.generate(prompts, sampling)
    rows = [
        replace(row, speech=tuple(one.speech.tolist()), bistream=False) if one.finished and len(one.speech) else row
        for row, one in zip(said.rows, spoken, strict=True)
    ]
    device = said.speech.device
    spoken_anew = replace(
        said, **code_places(rows, policy.layout), rows=tuple(rows), transcripts=(None,) * len(rows)
    ).to(device)
    return replace(batch, rows=collate(rows, policy.layout).to(device), utterances=spoken_anew)
