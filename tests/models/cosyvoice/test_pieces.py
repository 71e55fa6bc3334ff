# SPDX-License-Identifier: Apache-2.0
"""Long texts are cut as the CosyVoice runtime cuts them; what is expected was given by its own code."""

from __future__ import annotations

import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_align.models.cosyvoice import pieces
from tts_align.models.cosyvoice.pieces import spoken_pieces

ZH = "今天天气很好" * 6 + "。"
"""37 characters, one sentence."""


def words(text: str) -> int:
    """Stands for the text tokenizer: a token for each word."""
    return len(text.split())


def split(text: str) -> tuple[str, ...]:
    return spoken_pieces(text, words, "split")


@pytest.mark.parametrize("text", ["Hello.", "Hello", "辛い", "no stop " * 100, "", "  ", "<|en|>" + ZH * 4, "..."])
@pytest.mark.parametrize("front_end", ["whole", "split"])
def test_what_the_runtime_would_not_cut_stays_as_it_is(text: str, front_end: str):
    assert spoken_pieces(text, words, front_end) == (text,)  # type: ignore[arg-type]


def test_chinese_is_cut_by_characters():
    """Two sentences are 74 characters; a third would make more than 80."""
    assert split(ZH * 3) == (ZH * 2, ZH)
    assert split(ZH * 4) == (ZH * 2, ZH * 2)
    assert spoken_pieces(ZH * 4, words, "whole") == (ZH * 4,)


def test_a_short_tail_joins_the_piece_before():
    assert split(ZH * 2 + "再见，我的朋友们。") == (ZH * 2 + "再见，我的朋友们。",)
    assert split(ZH * 4 + "再见。") == (ZH * 2, ZH * 2 + "再见。")


def test_english_is_cut_by_tokens():
    sentence = "one two three four five six seven eight nine ten. "
    assert [words(piece) for piece in split(sentence * 20)] == [80, 80, 40]
    assert "".join(split(sentence * 20)) == (sentence * 20).strip()
    assert split(sentence * 9) == (sentence * 9,)


def test_marks_and_blanks_are_cleaned_where_a_text_is_cut():
    dirty = f"面积是5²（大约）。 {ZH}【注】{ZH[:-1]}a b."
    assert "".join(split(dirty * 2)) == f"面积是5平方大约。{ZH}注{ZH[:-1]}a b。" * 2


def test_a_closing_quote_stays_with_its_sentence():
    quoted = f"他说：“{ZH[:-1]}。”"
    joined = split(quoted * 4)
    assert all(piece.endswith("”") for piece in joined)
    assert "".join(joined) == quoted * 4


@given(st.lists(st.sampled_from([ZH, "好。", "你好吗？", "一二三四五六七八九十" * 3 + "！"]), min_size=1, max_size=12))
def test_nothing_is_lost_and_no_piece_is_long(sentences: list[str]):
    text = "".join(sentences)
    found = split(text)
    assert "".join(found) == text
    assert all(len(piece) <= 60 + 37 + 19 for piece in found)


def test_numbers_need_a_library_and_the_message_says_which(monkeypatch: pytest.MonkeyPatch):
    pieces._normaliser.cache_clear()
    monkeypatch.setitem(sys.modules, "wetext", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs wetext: pip install 'tts-align\[normalise\]'"):
        spoken_pieces("It costs 5 euros.", words, "normalise")


def test_the_normaliser_is_asked_by_language(monkeypatch: pytest.MonkeyPatch):
    """Stand-ins for the libraries: which of them is asked, and that the full stop is added as the runtime does."""

    class Normalizer:
        def __init__(self, remove_erhua: bool | None = None) -> None:
            self.name = "en" if remove_erhua is None else f"zh, erhua kept: {not remove_erhua}"

        def normalize(self, text: str) -> str:
            return text.replace("%", f" [{self.name}]")

    class Engine:
        def number_to_words(self, digits: str) -> str:
            return {"5": "five"}[digits]

    monkeypatch.setitem(sys.modules, "wetext", types.SimpleNamespace(Normalizer=Normalizer))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "inflect", types.SimpleNamespace(engine=Engine))  # type: ignore[arg-type]
    pieces._normaliser.cache_clear()
    assert spoken_pieces("It is 5 %", words, "normalise") == ("It is five  [en].",)
    assert spoken_pieces("好 %", words, "normalise") == ("好[zh, erhua kept: True]。",)
    pieces._normaliser.cache_clear()


def test_the_real_normaliser():
    pytest.importorskip("wetext", reason="wetext is not installed (the extra normalise)")
    pytest.importorskip("inflect", reason="inflect is not installed (the extra normalise)")
    pieces._normaliser.cache_clear()
    assert spoken_pieces("共465篇", words, "normalise") == ("共四百六十五篇。",)
    assert "five" in spoken_pieces("I have 5 apples", words, "normalise")[0]
