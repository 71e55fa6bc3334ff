# SPDX-License-Identifier: Apache-2.0
"""From a written word to candidates: kana, pinyin, phonemes, homophones; a dictionary only proposes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tts_align.data.records import Span
from tts_align.evaluation.readings import english, japanese, mandarin
from tts_align.evaluation.readings.lexicon import Lexicon, read_lexicon
from tts_align.evaluation.readings.spelling import Marked, Script, candidate_readings, reference_texts, spell

NOTHING = Lexicon()
CURRY = Marked("このカレーは辛い。", [Span(6, 8, ("からい",), ("つらい",))], right=("からい",), language="ja")
GROWN = Marked("他长大了", [Span(1, 2, ("zhang3",), ("chang2",))], right=("zhang3",), language="zh")
READ = Marked("I read it.", [Span(2, 6, ("R EH1 D",), ("R IY1 D",))], right=("R EH1 D",), language="en")


def test_candidates_of_a_kana_reading_share_everything_but_the_word() -> None:
    assert spell(CURRY, Script.WRITTEN, NOTHING) == {
        "からい": ("このカレーはからい。", "このカレーはカライ。"),
        "つらい": ("このカレーはつらい。", "このカレーはツライ。"),
    }


def test_the_end_of_a_word_at_the_end_is_scored_too() -> None:
    """けん begins けんか: without anything behind it the shorter word could never lose."""
    marked = Marked("彼の拳", [Span(2, 3, ("けん",), ("けんか",))], right=("けん",), language="ja")
    assert spell(marked, Script.WRITTEN, NOTHING)["けん"] == ("彼のけん。", "彼のケン。")


def test_the_written_form_is_never_a_candidate() -> None:
    lexicon = Lexicon({"辛い": {"からい": ("辛い", "辣い")}})
    assert spell(CURRY, Script.WRITTEN, lexicon)["からい"][0] == "このカレーは辣い。"
    assert all("辛い" not in text for texts in spell(CURRY, Script.WRITTEN, lexicon).values() for text in texts)


def test_but_it_is_no_error_of_the_transcript() -> None:
    spelled = spell(CURRY, Script.WRITTEN, NOTHING)
    assert CURRY.text in reference_texts(CURRY, spelled, Script.WRITTEN, NOTHING)["つらい"]
    assert reference_texts(Marked("なべ"), {}, Script.WRITTEN, NOTHING) == {"": ("なべ",)}


def test_transcripts_without_a_span() -> None:
    marked = Marked("辛いよ", (), {"からい": "からいよ", "つらい": "つらいよ"}, ("からい",), "ja")
    assert spell(marked, Script.WRITTEN, NOTHING)["つらい"] == ("つらいよ", "ツライヨ")
    assert spell(marked, Script.KANA, NOTHING) == {
        "からい": ("からいよ", "カライヨ"),
        "つらい": ("つらいよ", "ツライヨ"),
    }


def test_kana_of_a_whole_sentence() -> None:
    pytest.importorskip("pyopenjtalk", reason="pyopenjtalk-plus proposes kana")
    spelled = spell(CURRY, Script.KANA, NOTHING)
    assert spelled == {
        "からい": ("このかれーわからい", "コノカレーワカライ"),
        "つらい": ("このかれーわつらい", "コノカレーワツライ"),
    }
    own = Lexicon({"カレー": {"かりー": ()}})
    assert spell(CURRY, Script.KANA, own)["からい"][0] == "このかりーわからい"


def test_kana_without_a_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(japanese, "_open_jtalk", lambda: None)
    assert japanese.sentence("カレー、は", NOTHING) == "かれーは"
    assert japanese.readings("辛い") == ()
    with pytest.raises(ValueError, match=r"'辛い' is wanted in kana: pip install 'tts-align\[ja\]'"):
        japanese.sentence("辛い", NOTHING)


def test_readings_come_from_the_user_first_and_then_from_a_dictionary() -> None:
    pytest.importorskip("pyopenjtalk", reason="pyopenjtalk-plus proposes readings")
    unknown = Marked("辛い", [Span(0, 2, ("からい",))], right=("からい",), language="ja")
    assert candidate_readings(CURRY, Lexicon({"辛い": {"つらい": (), "しんどい": ()}})) == ("からい", "つらい")
    assert candidate_readings(unknown, Lexicon({"辛い": {"つらい": (), "カライ": ()}})) == ("からい", "つらい")
    assert "つらい" in candidate_readings(unknown, NOTHING)
    assert candidate_readings(Marked("なべ"), NOTHING) == ()


def test_pinyin_of_a_whole_sentence() -> None:
    pytest.importorskip("pypinyin", reason="pypinyin proposes pinyin")
    assert spell(GROWN, Script.PINYIN, NOTHING) == {
        "zhang3": ("ta1 zhang3 da4 le5",),
        "chang2": ("ta1 chang2 da4 le5",),
    }
    assert mandarin.sentence("银行 OK！校长", NOTHING) == "yin2 hang2 xiao4 zhang3"
    assert mandarin.sentence("银行", Lexicon({"银行": {"yín xíng": ()}})) == "yin2 xing2"


def test_a_homophone_of_one_sound_stands_for_a_reading() -> None:
    """Characters in both columns of a dictionary, and the character itself, tell nothing."""
    pypinyin = pytest.importorskip("pypinyin", reason="pypinyin proposes homophones")
    for reading, texts in spell(GROWN, Script.WRITTEN, NOTHING).items():
        assert texts
        for text in texts:
            other = text[1]
            assert text == f"他{other}大了"
            assert pypinyin.pinyin(other, heteronym=True, style=pypinyin.Style.TONE3)[0] == [reading]


def test_homophones_of_a_longer_word() -> None:
    pypinyin = pytest.importorskip("pypinyin", reason="pypinyin proposes homophones")
    found = mandarin.homophones("银行", "yin2 hang2")
    assert found
    for one in found:
        assert not set(one) & set("银行")
        assert pypinyin.lazy_pinyin(one, style=pypinyin.Style.TONE3) == ["yin2", "hang2"]
    assert mandarin.homophones("银行", "yin2") == ()


def test_readings_of_a_character() -> None:
    pytest.importorskip("pypinyin", reason="pypinyin proposes readings")
    marked = Marked("他长大了", [Span(1, 2, ("zhǎng",))], right=("zhǎng",), language="zh")
    assert candidate_readings(marked, NOTHING) == ("zhǎng", "chang2")


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("zhǎng", "zhang3"),
        ("lǜ", "lv4"),
        ("lü4", "lv4"),
        ("lu:4", "lv4"),
        ("de", "de5"),
        ("de0", "de5"),
        ("xī'ān", "xi1 an1"),
    ],
)
def test_pinyin_is_compared_in_one_form(given: str, plain: str) -> None:
    assert mandarin.numbered(given) == plain


def test_phonemes_and_homophones_of_english(tmp_path: Path) -> None:
    """The dictionary is a file in the form of the CMU dictionary."""
    file = tmp_path / "cmudict.dict"
    lines = ["read R EH1 D", "read(2) R IY1 D", "red R EH1 D", "reed R IY1 D # plant", "i AY1", "it IH1 T", ";;; end"]
    file.write_text("\n".join(lines))
    lexicon = read_lexicon(file)
    assert lexicon.readings("Read") == ("R EH1 D", "R IY1 D")
    assert spell(READ, Script.PHONEMES, lexicon) == {
        "R EH1 D": ("AY1 R EH1 D IH1 T",),
        "R IY1 D": ("AY1 R IY1 D IH1 T",),
    }
    written = spell(READ, Script.WRITTEN, lexicon)
    assert "I red it." in written["R EH1 D"]
    assert "I reed it." in written["R IY1 D"]


def test_english_without_a_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(english, "_cmudict", dict)
    english._one_sound.cache_clear()
    assert english.readings("read") == ()
    assert spell(READ, Script.WRITTEN, NOTHING) == {"R EH1 D": (), "R IY1 D": ()}
    english._one_sound.cache_clear()
    with pytest.raises(ValueError, match=r"the word 'it' of 'It' is wanted in phonemes: pip install 'tts-align\[en\]'"):
        english.sentence("It", NOTHING)


def test_a_lexicon_with_tabs(tmp_path: Path) -> None:
    file = tmp_path / "words.tsv"
    file.write_text("# own words\n辛い\tからい\tカライ\t唐い\n辛い\tつらい\n\n", "utf-8")
    lexicon = read_lexicon(file)
    assert lexicon.readings("辛い") == ("からい", "つらい")
    assert lexicon.spellings("辛い", "からい") == ("カライ", "唐い")
    assert read_lexicon(None) == NOTHING


@pytest.mark.parametrize("line", ["辛い\t", "辛い", "\tからい"])
def test_a_line_without_a_reading_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "words.tsv"
    file.write_text(f"長い\tながい\n{line}\n", "utf-8")
    with pytest.raises(ValueError, match=r"words.tsv:2: expected a word and its reading"):
        read_lexicon(file)


def test_a_lexicon_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the lexicon .*none.tsv cannot be read"):
        read_lexicon(tmp_path / "none.tsv")
