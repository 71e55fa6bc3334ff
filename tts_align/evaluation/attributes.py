# SPDX-License-Identifier: Apache-2.0
"""Attributes of candidates as a reward model tells them: measures that a rule of ``tts-align label`` may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from tts_align.evaluation.candidates import Candidate


@torch.no_grad()
def with_attributes(candidates: Sequence[Candidate], directory: Path, batch_rows: int = 256) -> list[Candidate]:
    """Candidates with what a reward model says of their attributes among their measures.

    Probabilities of classes and events are named ``attribute.class``, scores and numbers as the attribute is; see
    :meth:`tts_align.models.reward.config.Attribute.measures`. A candidate without speech tokens gets none.

    Args:
        candidates: with speech tokens.
        directory: of the reward model.
        batch_rows: candidates at a time.

    Raises:
        ValueError: the model knows no attribute, or other speech tokens.
    """
    from tts_align.models.reward.model import RewardModel  # a second of import that other rules need not wait for

    model = RewardModel(str(directory)).eval()
    if not model.sizes.attributes:
        raise ValueError(f"reward: the model in {directory} knows no attribute, only {', '.join(model.tasks)}")
    if stray := [one for one in candidates if one.speech and max(one.speech) >= model.codebook_size]:
        raise ValueError(
            f"reward: the model in {directory} reads {model.codebook_size} speech tokens, got {max(stray[0].speech)} "
            f"in candidate {stray[0].id!r}: it was trained on those of another codec"
        )
    found = list(candidates)
    places = sorted((i for i, one in enumerate(found) if one.speech), key=lambda place: len(found[place].speech))
    for start in range(0, len(places), batch_rows):
        some = places[start : start + batch_rows]
        # :: (r, s)
        speech = pad_sequence([torch.tensor(found[place].speech) for place in some], batch_first=True)
        mask = torch.arange(speech.shape[1]) < torch.tensor([len(found[place].speech) for place in some])[:, None]
        logits = model.attributes(model.encode(model.embed(speech), mask), mask)
        numbers = {name: row for one in model.sizes.attributes for name, row in one.measures(logits[one.name]).items()}
        for number, place in enumerate(some):
            said = {name: float(row[number]) for name, row in numbers.items()}
            found[place] = replace(found[place], measures={**found[place].measures, **said})
    return found
