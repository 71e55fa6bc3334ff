# SPDX-License-Identifier: Apache-2.0
"""Columns that nobody has filled in, filled in by a reward model: pseudo-labels to train another one on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tts_align.data.records import Row
from tts_align.models.reward.batches import speech_batches
from tts_align.models.reward.config import Attribute
from tts_align.models.reward.model import RewardModel


@torch.no_grad()
def fill_columns(rows: Sequence[Row], directory: str, batch_rows: int = 64) -> tuple[Row, ...]:
    """Rows with the attributes, and what is heard (``notes.transcript``), as a reward model predicts them.

    What a row already says stays. Pairs stay as they are: their columns would have to hold for both sides.

    Args:
        rows: with speech tokens; recordings get theirs from ``tts-align prepare``.
        directory: of the reward model.
        batch_rows: at a time.
    """
    model = RewardModel(directory).eval()
    places = [place for place, row in enumerate(rows) if row.pair is None]
    if silent := [rows[place].id for place in places if not rows[place].speech]:
        raise ValueError(
            f"expected speech tokens in every row, got none in {len(silent)}, {silent[0]} first: make them with "
            "`tts-align prepare`"
        )
    found = list(rows)
    for batch in speech_batches([rows[place].speech for place in places], batch_rows):
        logits = model.attributes(model.encode(model.embed(batch.tokens), batch.mask), batch.mask)
        said = {one.name: _words(one, one.predict(logits[one.name]).tolist()) for one in model.sizes.attributes}
        heard = model.transcribe(batch.tokens, batch.mask) if {"asr", "ctc"} & set(model.tasks) else []
        for number, place in enumerate(places[here] for here in batch.places):
            row = rows[place]
            attributes = {name: values[number] for name, values in said.items()} | dict(row.attributes)
            notes = {**({"transcript": heard[number]} if heard else {}), **row.notes}
            found[place] = replace(row, attributes=attributes, notes=notes)
    return tuple(found)


def _words(attribute: Attribute, values: Sequence[int | float | Sequence[bool]]) -> list[str | float]:
    """Predictions as a manifest writes them."""
    if attribute.kind == "classes":
        return [attribute.classes[int(value)] for value in values]  # type: ignore[arg-type]
    if attribute.kind == "events":
        return [",".join(name for name, on in zip(attribute.classes, row, strict=True) if on) for row in values]  # type: ignore[arg-type]
    return [float(value) for value in values]  # type: ignore[arg-type]
