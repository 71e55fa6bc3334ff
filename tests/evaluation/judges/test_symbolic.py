# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_align.evaluation.judges.base import Expected, Reading, SpeechSample
from tts_align.evaluation.judges.symbolic import CODES_PER_KANA, KANA, SymbolicJudge, begin_code, decode

READINGS = {"からい": "なべわからいよ", "つらい": "なべわつらいよ"}
EXPECTED = Expected("鍋は辛いよ", READINGS, ("からい",))


def spell(text, voice="sakura", repeats=2):
    return [code for kana in text for code in [begin_code(kana, voice)] + [begin_code(kana, voice) + 1] * repeats]


def transcript(speech_tokens):
    return "".join(segment.kana for segment in decode(speech_tokens))


def judged(speech_tokens, expected=EXPECTED):
    return SymbolicJudge().judge([SpeechSample(torch.tensor(speech_tokens, dtype=torch.long), None, 0)], [expected])[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KANA), st.integers(1, 3)), max_size=12), st.sampled_from(["sakura", "takumi"])
)
def test_clean_codes_are_read_back(kana, voice):
    speech_tokens = [code for one, repeats in kana for code in spell(one, voice, repeats)]
    assert transcript(speech_tokens) == "".join(one for one, _ in kana)
    assert [segment.start for segment in decode(speech_tokens)] == [
        sum(1 + r for _, r in kana[:i]) for i in range(len(kana))
    ]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_one_disturbed_code_in_a_kana_of_three_changes_nothing(data):
    text = data.draw(st.text(KANA, min_size=1, max_size=8))
    speech_tokens = spell(text)
    place, code = (
        data.draw(st.integers(0, len(speech_tokens) - 1)),
        data.draw(st.integers(0, CODES_PER_KANA * len(KANA) - 1)),
    )
    kana, within = divmod(place, 3)
    # Where the onset of the second of two equal kana becomes what follows an onset, it says one long kana.
    lost = within == 0 and kana > 0 and text[kana - 1] == text[kana] and code == speech_tokens[place + 1]
    expected = text[:kana] + text[kana + 1 :] if lost else text
    assert transcript([*speech_tokens[:place], code, *speech_tokens[place + 1 :]]) == expected


def test_an_onset_lost_between_two_equal_kana_is_one_long_kana():
    speech_tokens = spell("あああまま")
    speech_tokens[12] = speech_tokens[13]
    assert transcript(speech_tokens) == "あああま"


def test_voices_do_not_share_codes_and_both_are_understood():
    assert not set(spell(KANA, "sakura")) & set(spell(KANA, "takumi"))
    assert transcript(spell("なべ", "sakura") + spell("わ", "takumi")) == "なべわ"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, CODES_PER_KANA * len(KANA) - 1), max_size=40))
def test_any_codes_are_read_as_something_and_no_code_twice(speech_tokens):
    segments = decode(speech_tokens)
    assert [segment.start for segment in segments] == [0, *[segment.end for segment in segments]][: len(segments)]
    assert (segments[-1].end if segments else 0) == len(speech_tokens)


@pytest.mark.parametrize(
    ("said", "reading", "cer", "nearest"),
    [
        ("なべわからいよ", Reading.RIGHT, 0, 0),
        ("なべわつらいよ", Reading.WRONG, 1 / 7, 0),
        ("なべわくらいよ", Reading.NEITHER, 1 / 7, 1 / 7),
        ("なべわらいよ", Reading.NEITHER, 1 / 7, 1 / 7),
        ("なべわからよ", Reading.NEITHER, 1 / 7, 1 / 7),
        ("なべつらいよ", Reading.WRONG, 2 / 7, 1 / 7),
        ("なべわからいよよよよ", Reading.RIGHT, 3 / 7, 3 / 7),
    ],
)
def test_verdicts(said, reading, cer, nearest):
    verdict = judged(spell(said))
    assert verdict.transcript == said
    assert verdict.reading is reading
    assert (verdict.cer, verdict.nearest_cer) == pytest.approx((cer, nearest))


def test_target_share_is_where_the_word_is():
    """なべわ are 9 speech tokens, the word 9 more, the whole 21."""
    assert judged(spell("なべわつらいよ")).target_share == pytest.approx((9 / 21, 18 / 21))
    assert judged(spell("なべわ")).target_share is None


def test_the_same_word_elsewhere_in_the_sentence_is_not_taken_for_it():
    verdict = judged(spell("からいべわつらいよ"))
    assert verdict.reading is Reading.WRONG
    assert verdict.target_share is not None
    assert verdict.target_share[0] > 0.5


def test_silence_is_neither():
    verdict = judged([])
    assert (verdict.reading, verdict.cer, verdict.target_share) == (Reading.NEITHER, 1, None)


def test_sentence_without_a_marked_word():
    verdict = judged(spell("なべわ"), Expected("鍋は", {"": "なべわ"}))
    assert (verdict.reading, verdict.cer) == (Reading.UNMARKED, 0)


def test_a_judge_that_reads_codes_says_so():
    assert not SymbolicJudge.needs_audio
