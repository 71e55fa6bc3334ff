# SPDX-License-Identifier: Apache-2.0
"""Attributes of utterances as a reward model tells them: measures that a rule of ``tts-align label`` may ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.models.reward.batches import speech_batches
from tts_align.models.reward.config import Attribute


def attribute_measures(attribute: Attribute, logits: Float[Tensor, "r e"]) -> dict[str, Float[Tensor, " r"]]:
    """What the logits (r, e) of an attribute say of each row, as numbers (r) with names.

    ``manner.lively`` is the probability of a class or event; a score or number has the attribute's own name.
    """
    if attribute.kind in ("mos", "regression"):
        return {attribute.name: attribute.predict(logits)}
    sure = logits.softmax(-1) if attribute.kind == "classes" else logits.sigmoid()
    return {f"{attribute.name}.{name}": sure[:, place] for place, name in enumerate(attribute.classes)}


@torch.no_grad()
def measured_attributes(
    speech: Mapping[str, Sequence[int]], directory: Path, batch_rows: int = 256
) -> dict[str, dict[str, float]]:
    """Measures of :func:`attribute_measures` of each utterance, by its name; none of one without speech tokens.

    Args:
        speech: speech tokens of utterances by name.
        directory: of the reward model.
        batch_rows: utterances at a time.

    Raises:
        ValueError: the model knows no attribute, or other speech tokens.
    """
    from tts_align.models.reward.model import RewardModel  # a second of import that other rules need not wait for

    model = RewardModel(str(directory)).eval()
    if not model.sizes.attributes:
        raise ValueError(f"reward: the model in {directory} knows no attribute, only {', '.join(model.tasks)}")
    for name, said in speech.items():
        if said and max(said) >= model.codebook_size:
            raise ValueError(
                f"reward: the model in {directory} reads {model.codebook_size} speech tokens, got {max(said)} in "
                f"{name!r}: it was trained on those of another codec"
            )
    names, found = list(speech), {name: dict[str, float]() for name in speech}
    for batch in speech_batches(list(speech.values()), batch_rows):
        logits = model.attributes(model.encode(model.embed(batch.tokens), batch.mask), batch.mask)
        for attribute in model.sizes.attributes:
            for measure, values in attribute_measures(attribute, logits[attribute.name]).items():
                for place, value in zip(batch.places, values.tolist(), strict=True):
                    found[names[place]][measure] = value
    return found
