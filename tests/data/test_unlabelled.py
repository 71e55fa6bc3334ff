# SPDX-License-Identifier: Apache-2.0
"""Rows without a label beside labelled ones are no good speech by themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import build, make_rows, make_trainer, save_rows

from tts_align.batch import Reads
from tts_align.data.records import Pair, Row, Sound
from tts_align.data.unlabelled import settle_unlabelled
from tts_align.objectives import KTO, SFT

GOOD, BAD = Row("good", "a", speech=(1,), desirable=True), Row("bad", "a", speech=(2,), desirable=False)
LOOSE, PAIR = Row("loose", "b", speech=(3,)), Row("pair", "c", pair=Pair(Sound((4,)), Sound((5,))))
MIXED = (GOOD, BAD, LOOSE, PAIR)


@pytest.mark.parametrize("reads", [Reads.SPEECH, Reads.ANY])
def test_a_partly_labelled_manifest_is_refused_unless_told_what_they_are(reads: Reads):
    with pytest.raises(ValueError, match=r"1 rows have no label, 'loose' first, and 2 have one; .* desirable, or drop"):
        settle_unlabelled(MIXED, reads, "stop")
    assert settle_unlabelled(MIXED, reads, "desirable") == MIXED
    assert settle_unlabelled(MIXED, reads, "drop") == (GOOD, BAD, PAIR)


@pytest.mark.parametrize(
    ("rows", "reads", "paired_only"),
    [
        (MIXED, Reads.LABELLED, False),  # what has no label is not read at all
        (MIXED, Reads.PAIR, False),
        (MIXED, Reads.SPEECH, True),
        ((LOOSE, LOOSE), Reads.SPEECH, False),  # recordings
        ((LOOSE, PAIR), Reads.SPEECH, False),
        ((GOOD, BAD), Reads.SPEECH, False),
    ],
)
def test_where_nothing_is_open_nothing_is_asked(rows: tuple[Row, ...], reads: Reads, paired_only: bool):
    assert settle_unlabelled(rows, reads, "stop", paired_only) == rows


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
def test_a_run_stops_before_it_trains_on_what_nobody_listened_to(tmp_path: Path, tiny_policy: Path):
    rows = make_rows()
    rows[3] = replace(rows[3], desirable=None)
    manifest = save_rows(tmp_path, rows)

    def fit(objective, **knobs):
        module, data = build(objective, tiny_policy, manifest, tmp_path / "cache", **knobs)
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
        return len(data.sources())

    with pytest.raises(ValueError, match=rf"{manifest}: 1 rows have no label"):
        fit(SFT())
    assert fit(SFT(), unlabelled="desirable") == 9
    assert fit(SFT(), unlabelled="drop") == 8
    assert fit(KTO()) == 15
