# SPDX-License-Identifier: Apache-2.0
import pytest

from tts_align.data.demo.sentences import READINGS, all_sentences
from tts_align.training.callbacks.romaji import morae, romaji


@pytest.mark.parametrize(
    ("kana", "latin"),
    [
        ("からい", "karai"),
        ("つらい", "tsurai"),
        ("カレー", "karē"),
        ("びょーき", "byōki"),
        ("しゅっちょー", "shutchō"),
        ("けっこー", "kekkō"),
        ("まっちゃ", "matcha"),
        ("じゃ", "ja"),
        ("こんばんわ", "konbanwa"),
        ("ふぁん", "fan"),
        ("あっ", "a'"),
        ("ー", "ー"),
        ("abc", "abc"),
        ("", ""),
    ],
)
def test_hepburn(kana, latin):
    assert romaji(kana) == latin


def test_every_sentence_of_the_demo_is_written_and_every_kana_accounted_for():
    for sentence in all_sentences()[::7]:
        for reading in READINGS:
            kana = sentence.transcript(reading)
            assert romaji(kana).isalpha()
            assert max(romaji(kana)) < "ŭ"  # Latin letters with macrons at most
            assert sum(count for _, count in morae(kana)) == len(kana)
