# SPDX-License-Identifier: Apache-2.0
"""Columns filled in by a reward model: what it predicts, where nobody has said anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_reward, make_rows

from tts_align.data.manifest import read_manifest, write_manifest
from tts_align.data.pseudo import fill_columns
from tts_align.data.records import Pair, Row, Sound
from tts_align.models.reward.config import Attribute

ATTRIBUTES = (
    Attribute("mood", "classes", ("happy", "sad")),
    Attribute("sounds", "events", ("cough", "laugh")),
    Attribute("mos", "mos"),
)


def test_predictions_fill_what_is_missing_and_nothing_else(tmp_path: Path):
    model = make_reward(attributes=ATTRIBUTES).eval()
    model.save(tmp_path / "reward")
    rows = make_rows(sentences=4)
    rows[0] = replace(rows[0], attributes={"mood": "sad", "place": "Paris"}, notes={"transcript": "x"})
    pair = Row("pair", "a", pair=Pair(Sound((1, 2)), Sound((3,))))
    found = fill_columns([*rows, pair], str(tmp_path / "reward"), batch_rows=3)
    assert found[-1] == pair
    assert found[0].attributes["mood"] == "sad"
    assert found[0].attributes["place"] == "Paris"
    assert found[0].notes == {"transcript": "x"}
    for before, row in zip(rows[1:], found[1:-1], strict=True):
        speech = torch.tensor(before.speech)[None]
        mask = torch.ones_like(speech, dtype=torch.bool)
        with torch.no_grad():
            logits = model.attributes(model.encode(model.embed(speech), mask), mask)
        assert row.attributes["mood"] == ("happy", "sad")[int(logits["mood"].argmax())]
        events = [name for name, on in zip(("cough", "laugh"), (logits["sounds"][0] > 0).tolist(), strict=True) if on]
        assert row.attributes["sounds"] == ",".join(events)
        shares = logits["mos"][0].softmax(-1) * torch.arange(1, 6)
        assert row.attributes["mos"] == pytest.approx(float(shares.sum()), rel=1e-5)
        assert row.notes["transcript"] == model.transcribe(speech, mask)[0]
    # A manifest can hold it, and the model's own labels understand it.
    again = read_manifest(write_manifest(found, tmp_path / "rows.parquet")).rows
    assert [row.attributes for row in again] == [row.attributes for row in found]
    model.encode_labels([None] * 8, [row.attributes for row in found[:-1]])


def test_recordings_have_no_codes_yet(tmp_path: Path):
    make_reward().save(tmp_path / "reward")
    with pytest.raises(ValueError, match="got none in 1, b first: make them with `tts-align prepare`"):
        fill_columns([Row("a", "a", speech=(1,)), Row("b", "b", audio="b.wav")], str(tmp_path / "reward"))
