# SPDX-License-Identifier: Apache-2.0
"""The examples of the benchmark's own METRICS.md and of its evaluator's behaviour, worked by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_align.evaluation.protocols import Reference, count_errors, find_protocol
from tts_align.evaluation.protocols.jkyb import Tagged, find_target, text_cer

JKYB = find_protocol("jkyb")


def details(tagged, heard, natural, marginal=(), written=None, text="彼は寂しい。"):
    spoken = tagged.replace("<", "").replace(">", "")
    return JKYB.score(Reference(text, "ja", spoken, tagged, natural, marginal), heard, written)


def test_a_natural_reading():
    score = details("カレワ<サビシ>イ", "カレワサビシイ", ("サビシ",), ("サミシ",))
    assert score.details == {
        "target_accuracy": 1,
        "relaxed_target_accuracy": 1,
        "target_kana_cer": 0,
        "relaxed_target_kana_cer": 0,
    }
    assert score.counts.errors == 0


def test_a_marginal_reading_is_right_when_relaxed_only():
    """サビシ and サミシ differ in one of three kana."""
    found = details("カレワ<サビシ>イ", "カレワサミシイ", ("サビシ",), ("サミシ",)).details
    assert (found["target_accuracy"], found["relaxed_target_accuracy"]) == (0, 1)
    assert found["target_kana_cer"] == pytest.approx(1 / 3)


def test_the_example_of_the_metrics_page():
    """天気は<晴>れ heard as テンキワセイレ: セイ, in canonical kana セエ, stands for ハ: two edits of one."""
    found = find_target(Tagged.parse("テンキワ<ハ>レ"), "ハ", "テンキワセエレ")
    assert (found.said, found.context_errors, found.errors) == ("セエ", 0, 2)


def test_a_candidate_of_another_length_is_looked_for_by_itself():
    """ハイ<エイ> heard as セオヨギ: エイ finds ヨギ beside two context edits, オヨギ finds itself."""
    found = details("ハイ<エイ>", "セオヨギ", ("エイ",), ("オヨギ",)).details
    assert (found["target_accuracy"], found["relaxed_target_accuracy"]) == (0, 1)
    assert details("ハイ<エイ>", "セオヨギ", ("エイ", "オヨギ")).details["target_accuracy"] == 1


def test_errors_outside_the_word_are_the_sentences():
    """<アメ>ツチ heard as テンチ: テン is acceptable, and the lost ツ is no error of it."""
    score = details("<アメ>ツチ", "テンチ", ("アメ",), ("テン",))
    assert (score.details["target_accuracy"], score.details["relaxed_target_accuracy"]) == (0, 1)
    assert score.counts.errors == 3  # アメツチ to テンチ
    assert details("カレワ<サビシ>イ", "ソレワサビシイ", ("サビシ",)).details["target_kana_cer"] == 0


def test_a_word_that_was_left_out_is_all_wrong():
    found = details("ライゲツ<ウ>ミズキ", "ライゲツミズキ", ("ウ",))
    assert (found.details["target_kana_cer"], found.counts.errors) == (1, 1)


def test_a_word_at_the_edge_is_not_found_elsewhere():
    """ウ begins the sentence: the ウ at its end does not save it."""
    assert details("<ウ>ミ", "アミウ", ("ウ",)).details["target_accuracy"] == 0


def test_readings_sound_as_in_their_sentence():
    """シジヲ<ウ>ケタ: after オ an ウ is long, オ: heard as シジヲオケタ it is right."""
    assert details("シジヲ<ウ>ケタ", "シジヲウケタ", ("ウ",)).details["target_accuracy"] == 1


def test_nothing_heard_is_wrong():
    score = details("カレワ<サビシ>イ", "", ("サビシ",), ("サミシ",))
    assert (score.details["target_accuracy"], score.details["target_kana_cer"], score.counts.rate) == (0, 1, 1)


def test_text_is_compared_where_a_second_recogniser_wrote_it():
    score = details("カレワ<サビシ>イ", "カレワサビシイ", ("サビシ",), written="彼は淋しい")
    assert score.details["text_cer"] == pytest.approx(1 / 5)
    assert text_cer("ＡＢ、Ｃ", "AB c") == pytest.approx(1 / 3)


def test_a_sentence_of_another_set_is_refused():
    with pytest.raises(ValueError, match=r"needs the tagged reading.*--suite jkyb"):
        JKYB.score(Reference("鍋は辛い", "ja"), "なべわからい")


@pytest.mark.parametrize("text", ["カナ", "<カ>ナ<カ>", "カ>ナ<", "<カナ"])
def test_tags_must_be_one_pair(text):
    with pytest.raises(ValueError, match="one word between < and >"):
        Tagged.parse(text)


KANA = st.text(st.sampled_from("アカサ"), max_size=5)


@settings(max_examples=50, deadline=None)
@given(KANA, KANA.filter(bool), KANA, KANA)
def test_the_place_is_the_best_of_all(before, target, after, heard):
    """Against all places, tried one by one: fewest errors around it, then the nearest, then the least moved."""
    best = min(
        (
            count_errors(before, heard[:start]).errors + count_errors(after, heard[end:]).errors,
            count_errors(target, heard[start:end]).errors,
            abs(start - len(before)) + abs(len(heard) - end - len(after)),
            start,
            end,
        )
        for start in range(len(heard) + 1)
        for end in range(start, len(heard) + 1)
        if (before or start == 0) and (after or end == len(heard))
    )
    found = find_target(Tagged(before, target, after), target, heard)
    assert found.said == heard[best[3] : best[4]]
    assert found.context_errors == best[0]


@settings(max_examples=50, deadline=None)
@given(KANA, KANA.filter(bool), KANA)
def test_what_is_said_right_is_found(before, target, after):
    assert find_target(Tagged(before, target, after), target, before + target + after).errors == 0
