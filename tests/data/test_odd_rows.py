# SPDX-License-Identifier: Apache-2.0
"""Rows that a campaign of hostile inputs has found: each is a fault with its place, the others are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tts_align.data.manifest import read_manifest
from tts_align.data.records import ManifestError


def not_text(words: list[bytes]) -> pa.Array:
    """Bytes in a column that says it holds text."""
    array = pa.array(words, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


@pytest.mark.parametrize("column", ["id", "text", "speaker", "extra"])
def test_bytes_that_are_no_text(tmp_path: Path, column: str):
    columns = {"id": pa.array(["a", "b"]), "text": pa.array(["x", "y"]), "speech": pa.array([[1], [2]])}
    columns[column] = not_text([b"ok", b"\xe5\xe5"])
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(ManifestError, match=r"rows.parquet:row 2: holds text that is not UTF-8") as error:
        read_manifest(tmp_path / "rows.parquet")
    assert "1 fault" in str(error.value)
    (row,) = read_manifest(tmp_path / "rows.parquet", "drop").rows
    assert (row.speech, getattr(row, column, "ok")) == ((1,), "ok")


def test_names_of_columns_that_are_no_text(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"id": ["a"], "text": ["x"], "speech": [[1]], "カレー": ["y"]}), path)
    path.write_bytes(path.read_bytes().replace("カレー".encode(), b"\xe3\x82\xab\xe5\xe5\xe5\xe3\x83\xbc"))
    with pytest.raises(ManifestError, match=r"rows.parquet: (not a Parquet file|cannot be read to its end): "):
        read_manifest(path)


def test_half_a_character_in_a_note(tmp_path: Path):
    rows = [{"id": name, "text": "x", "speech": [1], "notes": {"heard": heard}} for name, heard in ("a\ud800", "bc")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ManifestError, match=r"rows.jsonl:1: .*half"):
        read_manifest(tmp_path / "rows.jsonl")
    (row,) = read_manifest(tmp_path / "rows.jsonl", "drop").rows
    assert row.id == "b"


@pytest.mark.parametrize("label", [10**400, -(10**400)], ids=["much", "little"])
@pytest.mark.parametrize("stars", [None, 4.0])
def test_labels_beyond_what_a_float_holds(tmp_path: Path, label: int, stars: float | None):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "a", "text": "x", "speech": [1], "label": label}) + "\n")
    with pytest.raises(ManifestError, match=r"rows.jsonl:1: label: ") as error:
        read_manifest(path, desirable_stars=stars)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64"])
def test_unsigned_speech_tokens(tmp_path: Path, kind: str):
    """As NumPy and Polars write them."""
    lists = pa.list_(getattr(pa, kind)())
    columns = {"id": ["a", "b"], "text": ["x", "y"], "speech": pa.array([[1], [2, 19]], lists)}
    columns["prompt_speech"], columns["prompt_text"] = pa.array([[3], None], lists), ["z", None]
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = read_manifest(tmp_path / "rows.parquet", codebook_size=20).rows
    assert [(row.speech, row.prompt_speech) for row in rows] == [((1,), (3,)), ((2, 19), ())]
    most = pa.array([[1], [int(np.iinfo(kind).max)]], lists)
    parquet.write_table(pa.table({**columns, "speech": most}), tmp_path / "rows.parquet")
    with pytest.raises(ManifestError, match=rf"row 2: speech: speech tokens must lie in 0\.\.19, got {most[1][0]}\.\."):
        read_manifest(tmp_path / "rows.parquet", codebook_size=20)
