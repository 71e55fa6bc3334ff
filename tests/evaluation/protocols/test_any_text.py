# SPDX-License-Identifier: Apache-2.0
"""Whatever a test set or a recogniser writes (mixed scripts, digits, full-width forms, emoji, nothing) is scored."""

import math

import jiwer
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tts_align.evaluation.protocols import ErrorCounts, Reference, aggregate, find_protocol

PIECES = ["辛い", "からい", "カラー", "ｶﾞ", "長大", "３时", "50", "zhang3", "Hello", "don't", "“Ｑ”", "😀👍🏽", "é", "-"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=5).map("".join)
CASES = [("seed", "en"), ("seed", "zh"), ("cv3", "en"), ("cv3", "ja"), ("cv3", "ko"), ("cv3", ""), ("whisper", "en")]
CASES += [("whisper", "ja"), ("pinyin", "zh"), ("jkyb", "ja")]
WRITERS = {name: find_protocol(name) for name, _ in CASES}


def scored(name, language, target, heard):
    for extra in ("opencc", "pypinyin") if language == "zh" else ():
        pytest.importorskip(extra, reason="a reference or transcript in Mandarin needs the extra zh")
    tags = {"spoken": target, "tagged": f"カ<ラ>{target.translate({60: None, 62: None})}", "natural": ("ラ",)}
    return WRITERS[name].score(Reference(target, language, **(tags if name == "jkyb" else {})), heard)


@pytest.mark.parametrize(("name", "language"), CASES)
@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS)
@example("", "")
@example("", "la la")
@example("😀", "")
@example("...", "!")
def test_any_two_texts_have_a_rate(name, language, target, heard):
    score = scored(name, language, target, heard)
    numbers = [score.counts.rate, *score.details.values()]
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    protocol = WRITERS[name]
    lengths = [len(protocol.units(text)) for text in (score.normalised_target, score.normalised_transcript)]
    assert score.counts.reference_length == lengths[0]
    assert score.counts.insertions - score.counts.deletions == lengths[1] - lengths[0]
    assert score.counts.errors <= max(lengths)


@pytest.mark.parametrize(("name", "language"), CASES)
@settings(max_examples=20, deadline=None)
@given(TEXTS)
def test_what_is_said_as_it_is_written_is_right(name, language, text):
    if language == "zh" and name != "pinyin":  # a reference is taken as it is, a transcript is simplified
        text = "".join(one for one in text if not "\u3400" <= one <= "\u9fff")
    score = scored(name, language, text, text)
    assert score.counts.errors == 0
    assert score.normalised_target == score.normalised_transcript


@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS)
def test_english_words_are_counted_as_by_jiwer(target, heard):
    score = scored("cv3", "en", target, heard)
    theirs = jiwer.process_words(score.normalised_target, score.normalised_transcript)
    ours = score.counts
    kinds = (ours.substitutions, ours.deletions, ours.insertions)
    assert kinds == (theirs.substitutions, theirs.deletions, theirs.insertions)


def test_references_of_nothing_do_not_divide_by_zero():
    rates = aggregate([ErrorCounts(0, 0, 2, 0), ErrorCounts(0, 0, 0, 0)])
    assert (rates.macro, rates.corpus, rates.reference_length) == (1.0, 2.0, 0)
