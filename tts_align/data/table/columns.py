# SPDX-License-Identifier: Apache-2.0
"""The columns of a table of checked rows, and a row of it as a record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from tts_align.data.records import Pair, Row, Sound, Span

ROWS_PER_BATCH = 8192
"""Every batch of a table but the last one has this number of rows, so that a row is found by division."""
STRINGS = ("id", "text", "language", "speaker", "audio", "rejected_audio", "instruct", "prompt_text", "prompt_audio",
           "transcript", "rest")  # fmt: skip
TOKENS = ("speech", "rejected", "prompt_speech")
NONE, BAD, GOOD = -1, 0, 1
"""Labels: none, undesirable, desirable."""


def token_type(codebook_size: int | None) -> pa.DataType:
    """The narrowest type for speech tokens; without a codebook they may be anything that 32 bits hold."""
    return pa.int16() if codebook_size is not None and codebook_size <= 2**15 else pa.int32()


def schema(token: pa.DataType) -> pa.Schema:
    """Columns of checked rows.

    A pair's chosen side lies in ``speech`` and ``audio``. What few rows have and nobody computes with (spans, scores,
    notes, attributes) is JSON in ``rest``.

    Args:
        token: type of speech tokens.
    """
    names: dict[str, pa.DataType] = dict.fromkeys(STRINGS, pa.string())
    names |= dict.fromkeys(TOKENS, pa.list_(token))
    names |= {"speaker_vector": pa.list_(pa.float64()), "label": pa.int8(), "pair": pa.bool_()}
    return pa.schema(names)


def to_rest(row: Row) -> str:
    """Spans, scores, notes and attributes as JSON; empty if there are none."""
    spans = [[span.start, span.end, span.right, span.wrong] for span in row.spans]
    return rest_of(spans, row.scores, row.notes, row.attributes)


def rest_of(spans: Sequence[Any], scores: Mapping[str, float], notes: Any, attributes: Any) -> str:
    """The same of its parts."""
    parts = {"spans": spans, "scores": scores, "notes": notes, "attributes": attributes}
    there = {name: dict(part) if isinstance(part, Mapping) else part for name, part in parts.items() if part}
    return json.dumps(there, ensure_ascii=False) if there else ""


def to_batch(rows: Iterable[Row], token: pa.DataType) -> pa.RecordBatch:
    """Rows as a batch of a table."""
    found = [_columns(row) for row in rows]
    kinds = schema(token)
    return pa.RecordBatch.from_arrays(
        [pa.array([one[name] for one in found], kind.type) for name, kind in zip(kinds.names, kinds, strict=True)],
        schema=kinds,
    )


def _columns(row: Row) -> dict[str, Any]:
    first, *others = row.sounds
    other = others[0] if others else Sound()
    label = NONE if row.desirable is None else GOOD if row.desirable else BAD
    columns = {name: getattr(row, name, "") for name in STRINGS}
    columns |= {"audio": first.audio, "rejected_audio": other.audio, "rest": to_rest(row)}
    columns |= {"speech": first.speech, "rejected": other.speech, "prompt_speech": row.prompt_speech}
    return columns | {"speaker_vector": row.speaker_vector, "label": label, "pair": row.pair is not None}


def to_row(columns: Mapping[str, Any]) -> Row:
    """A row of a table as a record."""
    given = {name: columns[name] for name in STRINGS if name not in ("audio", "rejected_audio", "rest")}
    sound = Sound(tuple(columns["speech"]), columns["audio"])
    pair = None
    if columns["pair"]:
        pair, sound = Pair(sound, Sound(tuple(columns["rejected"]), columns["rejected_audio"])), Sound()
    label = columns["label"]
    return Row(
        speech=sound.speech,
        audio=sound.audio,
        desirable=None if label == NONE else label == GOOD,
        pair=pair,
        prompt_speech=tuple(columns["prompt_speech"]),
        speaker_vector=tuple(columns["speaker_vector"]),
        **given,
        **from_rest(columns["rest"]),
    )


def from_rest(rest: str) -> dict[str, Any]:
    """Spans, scores, notes and attributes as a row has them."""
    if not rest:
        return {}
    parts = json.loads(rest)
    if "spans" in parts:
        parts["spans"] = tuple(
            Span(start, end, tuple(right), tuple(wrong)) for start, end, right, wrong in parts["spans"]
        )
    return parts
