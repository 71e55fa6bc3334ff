# SPDX-License-Identifier: Apache-2.0
"""The shipped rows say what each sentence ought to sound like; nothing else about them depends on it."""

from __future__ import annotations

import pytest

from tts_align.batch import Reads
from tts_align.data.demo.sentences import all_sentences
from tts_align.data.manifest import read_manifest
from tts_align.data.select import select
from tts_align.utils.assets import ASSETS

COUNTS = {
    ("audio", "preference"): (2552, 1618, 934),
    ("audio", "dev"): (658, 411, 247),
    ("symbolic", "preference"): (1109, None, None),
    ("symbolic", "dev"): (227, None, None),
}


@pytest.mark.parametrize(("corpus", "split"), COUNTS)
def test_shipped_rows(corpus: str, split: str):
    rows = read_manifest(f"demo:{corpus}/{split}.parquet").rows
    sentences = {one.id: one for one in all_sentences()}
    for row in rows:
        sentence = sentences[row.notes["sentence"]]
        assert row.text == sentence.text
        assert row.transcript == sentence.transcript(sentence.reading_right)
        assert row.spans[0].right == (sentence.reading_right,)
        # Heard is what was said: in a bad row not what was wanted.
        assert row.desirable == (row.notes["reading"] == "right")
    count, good, bad = COUNTS[corpus, split]
    assert len(rows) == count
    if good is not None:
        assert len(select(rows, Reads.SPEECH)) == good
        labelled = select(rows, Reads.LABELLED)
        assert sum(not item[0].desirable for item in labelled) == bad


@pytest.mark.parametrize("corpus", ["audio", "symbolic"])
def test_what_was_heard_of_bad_rows_is_not_what_was_wanted(corpus: str):
    rows = read_manifest(f"demo:{corpus}/preference.parquet").rows
    (everything,) = zip(*select(rows, Reads.ANY), strict=True)
    assert len(everything) == len(rows)
    assert all(one.transcript == one.row.notes["transcript"] for one in everything)
    assert not any(one.transcript == one.row.target_text for one in everything if not one.desirable)


def test_all_that_is_shipped_is_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 10e6
