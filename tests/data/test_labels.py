# SPDX-License-Identifier: Apache-2.0
"""Thumbs and stars as users' tables have them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_align.data.labels import read_label
from tts_align.data.manifest import read_manifest, write_manifest
from tts_align.data.records import ManifestError

GOOD = (True, 1, 1.0, "true", "TRUE", " 1 ", "1.0", "up", "Good", "yes", "desirable", "👍", "thumbs up")
BAD = (False, 0, 0.0, "false", "False", "0", "0.0", "down", "BAD", "no", "undesirable", "👎", "thumbs down")


@pytest.mark.parametrize("value", GOOD)
def test_thumbs_up(value: Any):
    assert read_label(value) is True


@pytest.mark.parametrize("value", BAD)
def test_thumbs_down(value: Any):
    assert read_label(value) is False


@pytest.mark.parametrize("value", [None, math.nan])
def test_no_label(value: Any):
    """A table that pandas wrote has NaN where there is none."""
    assert read_label(value) is None
    assert read_label(value, desirable_stars=4.0) is None


@pytest.mark.parametrize("value", [5, 4, 4.5, "5", "4/5", "4 / 5", "4 stars", "★★★★", "★★★★★", "★★★★☆", "up", True])
def test_many_stars(value: Any):
    assert read_label(value, desirable_stars=4.0) is True


@pytest.mark.parametrize("value", [1, 3, 3.5, "1", "3/5", "1 star", "★", "★★★☆☆", "down", False])
def test_few_stars(value: Any):
    assert read_label(value, desirable_stars=4.0) is False


@given(st.floats(1, 5), st.floats(1, 5, exclude_min=True))
def test_from_the_threshold_on(stars: float, threshold: float):
    assert read_label(stars, threshold) is (stars >= threshold)


@pytest.mark.parametrize("value", [2, 5, 4.5, "3", "4/5", "★★"])
def test_stars_mean_nothing_without_a_threshold(value: Any):
    with pytest.raises(ValueError, match=r"looks like a number of stars: .*desirable_stars"):
        read_label(value)


@pytest.mark.parametrize("value", ["maybe", "", "goodbad", [1], {"up": 1}, -1, "+", "6/10", math.inf])
def test_what_says_neither_is_refused(value: Any):
    with pytest.raises(ValueError, match=r"label: "):
        read_label(value)


@pytest.mark.parametrize("value", [0, 6, "0", "★★★★★★"])
def test_numbers_that_are_no_stars(value: Any):
    with pytest.raises(ValueError, match="expected 1 to 5 stars"):
        read_label(value, desirable_stars=4.0)


@pytest.mark.parametrize("threshold", [1.0, 0.0, 5.5, math.nan])
def test_a_threshold_that_divides_nothing(threshold: float):
    with pytest.raises(ValueError, match="desirable_stars must lie above 1"):
        read_label(3, threshold)


def _file(folder: Path, *labels: Any) -> Path:
    path = folder / "rated.jsonl"
    rows = [{"id": f"r{n}", "text": "one", "speech": [n], "label": label} for n, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_manifest_of_stars(tmp_path: Path):
    rows = read_manifest(_file(tmp_path, 5, 1, "★★★★☆", 3, None), desirable_stars=4.0).rows
    assert [row.desirable for row in rows] == [True, False, True, False, None]
    again = read_manifest(write_manifest(rows, tmp_path / "thumbs.parquet")).rows
    assert [row.desirable for row in again] == [True, False, True, False, None]


@pytest.mark.parametrize("on_bad_row", ["stop", "drop"])
def test_one_star_is_never_taken_for_a_thumb_up(tmp_path: Path, on_bad_row: Any):
    """Dropping what has several stars would leave the worst rows as the desirable ones."""
    with pytest.raises(ManifestError, match=r"rated.jsonl:2: label: 4 looks like a number of stars") as error:
        read_manifest(_file(tmp_path, 1, 4, 1), on_bad_row)
    assert "on_bad_row" not in str(error.value)


def test_an_ambiguous_label_is_named_with_file_and_line(tmp_path: Path):
    with pytest.raises(ManifestError, match=r"rated.jsonl:2: label: expected true or false.*got 'fine'"):
        read_manifest(_file(tmp_path, "up", "fine"))


def test_a_threshold_without_stars_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert [row.desirable for row in read_manifest(_file(tmp_path, "up", "bad"), desirable_stars=4.0).rows] == [1, 0]
    assert "desirable_stars has no effect" in caplog.text
