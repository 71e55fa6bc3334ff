# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest

from tts_align.data.demo.sentences import (
    ADVERBS,
    DEMONSTRATIVES,
    ENDINGS,
    KARAI_NOUNS,
    NOUNS,
    READINGS,
    TSURAI_NOUNS,
    all_sentences,
    right_rates,
    split_sentences,
)


def test_size_of_the_grammar():
    sentences = all_sentences()
    assert len(sentences) == 5 * 24 * 4 * 6 == 2880
    assert len({sentence.id for sentence in sentences}) == len({sentence.text for sentence in sentences}) == 2880
    assert len(KARAI_NOUNS) == len(TSURAI_NOUNS) == 12
    assert len(ENDINGS) >= 6
    assert len(DEMONSTRATIVES) >= 5
    assert len(ADVERBS) == 4


def test_spans_show_the_word():
    for sentence in all_sentences():
        start, end = sentence.span
        assert sentence.text[start:end] == "辛い"
        assert sentence.text.count("辛い") == 1
        for reading in READINGS:
            kana, (first, last) = sentence.transcript(reading), sentence.kana_span(reading)
            assert kana[first:last] == reading
            assert kana.count(reading) == 1, "the reading must not turn up in another word"
            assert sentence.spoken(reading).replace(" ", "") == kana


def test_right_and_wrong():
    for sentence in all_sentences():
        assert {sentence.reading_right, sentence.reading_wrong} == set(READINGS)
        assert (sentence.reading_right == "からい") == (sentence.noun in KARAI_NOUNS)
    by_text = {sentence.text: sentence for sentence in all_sentences()}
    assert by_text["この仕事はかなり辛いです"].candidates == {
        "からい": "このしごとわかなりからいです",
        "つらい": "このしごとわかなりつらいです",
    }
    assert by_text["この仕事はかなり辛いです"].reading_right == "つらい"


@pytest.mark.parametrize("seed", [0, 7])
def test_splits_share_out_every_cell_alike(seed):
    splits = split_sentences(seed)
    assert {name: len(members) for name, members in splits.items()} == {
        "test": 576,
        "dev": 288,
        "preference": 1152,
        "base": 864,
    }
    ids = [sentence.id for members in splits.values() for sentence in members]
    assert len(set(ids)) == len(ids) == 2880, "splits are disjoint and complete"
    for members in splits.values():
        assert len(set(Counter(sentence.cell for sentence in members).values())) == 1
    assert splits == split_sentences(seed)
    assert splits != split_sentences(seed + 1)


@pytest.mark.parametrize("seed", [0, 7])
def test_corpus_is_wrong_a_third_of_the_time_by_cell(seed):
    rates = right_rates(seed)
    assert rates.keys() == {(noun, adverb) for noun in NOUNS for adverb in ADVERBS}
    assert sum(rates.values()) / len(rates) == pytest.approx(2 / 3 * 0.7375 + 1 / 3 * 0.5025)
    wrong_cells = Counter(noun for (noun, _), rate in rates.items() if rate < 0.5)
    assert Counter(wrong_cells.values()) == {1: 16, 2: 8}
    for nouns in (KARAI_NOUNS, TSURAI_NOUNS):
        assert sum(wrong_cells[noun] == 2 for noun in nouns) == 4
    assert rates == right_rates(seed)
    assert rates != right_rates(seed + 1)
