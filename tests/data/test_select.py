# SPDX-License-Identifier: Apache-2.0
"""Pairs serve as two rows, labelled rows form pairs, and the counts say so."""

import pytest

from tts_align.batch import Reads
from tts_align.data.records import Pair, Row, Sound
from tts_align.data.select import select, usable


def row(number: int, text: str, label: bool | None, speaker: str = "a") -> Row:
    return Row(f"{number}", text, "ja", speaker, speech=(number,), desirable=label)


ROWS = [
    row(1, "one", True),
    row(2, "one", True),
    row(3, "one", False),
    row(4, "one", False, speaker="b"),  # another voice: no pair with the rows above
    row(5, "two", True),
    row(6, "three", None),
    Row("7", "four", pair=Pair(Sound((70,)), Sound((71,)))),
]


def speech_tokens(items: tuple) -> list[tuple[int, ...]]:
    return [tuple(utterance.sound.speech[0] for utterance in item) for item in items]


def test_counts_by_hand():
    counted = usable(ROWS)
    assert (counted.speech, counted.pairs, counted.formed) == (5, 1, 1)  # 1 2 5 6 70; 7; 3 with 1 or 2
    assert (counted.desirable, counted.undesirable) == (4, 3)  # 1 2 5 70; 3 4 71
    assert (counted.sentences, counted.one_sided) == (4, 2)  # one/a both, one/b bad, two good, four both
    table = str(counted)
    assert "5 rows" in table
    assert "2 pairs (1 given, 1 formed)" in table
    assert "4 desirable + 3 undesirable" in table
    assert "50% (2 of 4)" in table


def test_what_each_objective_reads():
    assert speech_tokens(select(ROWS, Reads.SPEECH)) == [(1,), (2,), (5,), (6,), (70,)]
    assert speech_tokens(select(ROWS, Reads.LABELLED)) == [(1,), (2,), (3,), (4,), (5,), (70,), (71,)]
    given, formed = speech_tokens(select(ROWS, Reads.PAIR))
    assert given == (70, 71)
    assert formed in [(1, 3), (2, 3)]


def test_pairs_follow_the_seed_only():
    assert select(ROWS, Reads.PAIR, seed=1) == select(ROWS, Reads.PAIR, seed=1)
    assert len({str(tuple(select(ROWS, Reads.PAIR, seed=seed))) for seed in range(20)}) == 2


@pytest.mark.parametrize("reads", [Reads.LABELLED, Reads.SPEECH])
def test_paired_only_uses_the_rows_of_the_pairs(reads: Reads):
    pairs = select(ROWS, Reads.PAIR)
    expected = [side for pair in pairs for side in pair if reads is Reads.LABELLED or side.desirable]
    assert [item[0] for item in select(ROWS, reads, paired_only=True)] == expected


def test_each_row_stands_in_one_pair_at_most():
    rows = [row(i, f"{i % 3}", i % 5 < 2) for i in range(60)]
    pairs = speech_tokens(select(rows, Reads.PAIR))
    used = [code for pair in pairs for code in pair]
    assert len(used) == len(set(used))
    # Independently: of each sentence as many pairs as its rarer side has rows.
    sides = [[r.desirable for r in rows if r.text == f"{text}"] for text in range(3)]
    assert len(pairs) == sum(min(side.count(True), side.count(False)) for side in sides)


def test_equal_utterances_with_opposite_labels_are_no_pair():
    rows = [Row("a", "one", speech=(1,), desirable=True), Row("b", "one", speech=(1,), desirable=False)]
    assert usable(rows).formed == 0


def test_flipped_labels():
    plain, flipped = select(ROWS, Reads.LABELLED), select(ROWS, Reads.LABELLED, flip_labels=True)
    assert speech_tokens(plain) == speech_tokens(flipped)
    assert [item[0].desirable for item in plain] == [not item[0].desirable for item in flipped]
    assert speech_tokens(select(ROWS, Reads.PAIR, flip_labels=True))[0] == (71, 70)


def test_options_without_effect_are_refused():
    with pytest.raises(ValueError, match="paired_only has no effect"):
        select(ROWS, Reads.PAIR, paired_only=True)
    with pytest.raises(ValueError, match="flip_labels has no effect"):
        select(ROWS, Reads.SPEECH, flip_labels=True)


def test_a_manifest_without_use_says_what_it_has():
    with pytest.raises(ValueError, match=r"reads pair rows, but the manifest has none; it has:\n.*\n.*0 pairs"):
        select([row(1, "one", True)], Reads.PAIR)
