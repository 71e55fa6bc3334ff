# SPDX-License-Identifier: Apache-2.0
"""Every rule of every protocol on examples worked by hand; the official scripts' steps re-typed for comparison."""

import json
import string
import sys

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_align.evaluation.protocols import PROTOCOLS, Reference, find_protocol
from tts_align.evaluation.protocols.base import MissingExtra, primary
from tts_align.evaluation.protocols.chinese import converter
from tts_align.evaluation.protocols.kana import canonical_kana, is_kana
from tts_align.evaluation.protocols.seed import HANZI_PUNCTUATION

SEED, CV3 = find_protocol("seed"), find_protocol("cv3")


def errors(protocol, target, transcript, language):
    score = find_protocol(protocol).score(Reference(target, language), transcript)
    return score.counts.errors, score.counts.reference_length


def official(hypothesis, truth, language):
    """``process_one`` of seed-tts-eval's run_wer.py, step by step, with today's name of jiwer's function."""
    for one in HANZI_PUNCTUATION + string.punctuation:
        if one == "'":
            continue
        truth, hypothesis = truth.replace(one, ""), hypothesis.replace(one, "")
    truth, hypothesis = truth.replace("  ", " "), hypothesis.replace("  ", " ")
    if language == "zh":
        truth, hypothesis = " ".join(truth), " ".join(hypothesis)
    else:
        truth, hypothesis = truth.lower(), hypothesis.lower()
    return jiwer.process_words(truth, hypothesis).wer


@pytest.mark.parametrize(
    ("target", "transcript", "errors_", "length"),
    [
        ("Hello, World!", "hello world", 0, 2),  # punctuation deleted, lower case
        ("It's well-known.", "its wellknown", 1, 2),  # the apostrophe is kept, the hyphen deleted without a space
        ("fifty men", "50 men", 1, 2),  # no number is normalised
        ("colour", "color", 1, 1),  # nor a spelling
        ("Mr. Smith", "mister smith", 1, 2),  # nor an abbreviation
        ("he — said “no”…", "he said no", 0, 3),  # the dash between two spaces leaves two, of which one is left
        ("a - - b", "a b", 0, 2),  # three spaces become two, which count as one between words
        ("it’s", "its", 0, 1),  # the typographic apostrophe is punctuation, and deleted
    ],
)
def test_seed_english_by_hand(target, transcript, errors_, length):
    assert errors("seed", target, transcript, "en") == (errors_, length)
    assert official(transcript, target, "en") == errors_ / length


@pytest.mark.parametrize(
    ("target", "transcript", "errors_", "length"),
    [
        ("你好，世界。", "你好世界", 0, 4),
        ("我爱 AI", "我爱ai", 2, 4),  # Latin letters one by one, in their own case; spaces do not count
        ("二〇二四年", "2024年", 4, 5),
        ("这是「书」", "这是书", 0, 3),
        ("今天·明天～", "今天明天", 0, 4),
    ],
)
def test_seed_chinese_by_hand(target, transcript, errors_, length):
    pytest.importorskip("opencc")
    assert errors("seed", target, transcript, "zh") == (errors_, length)
    assert official(transcript, target, "zh") == errors_ / length


def test_seed_simplifies_transcripts_and_never_references():
    pytest.importorskip("opencc")
    assert errors("seed", "汉字", "漢字", "zh") == (0, 2)
    assert errors("seed", "漢字", "漢字", "zh") == (1, 2)


TEXT = st.text(st.sampled_from(list("aB' ,.-\t") + list("你漢A、。　…’")), max_size=14)


@settings(max_examples=120, deadline=None)
@given(TEXT, TEXT, st.sampled_from(["en", "zh"]))
def test_seed_is_the_official_script(target, transcript, language):
    if language == "zh":
        pytest.importorskip("opencc")
        transcript = converter().convert(transcript)
    score = SEED.score(Reference(target, language), transcript)
    assert score.counts.rate == pytest.approx(official(transcript, target, language))
    assert (score.target_text, score.transcript) == (target, transcript)


def test_the_punctuation_is_zhons():
    assert len(set(HANZI_PUNCTUATION)) == len(HANZI_PUNCTUATION) == 82
    assert not set("ー々'") & set(HANZI_PUNCTUATION)
    assert set("・〜") - set(HANZI_PUNCTUATION) == {"・"}  # ・ U+30FB stays, · U+00B7 goes


def test_seed_refuses_other_languages():
    with pytest.raises(ValueError, match="rules for en, zh only, got sentences of language ja"):
        SEED.check(["en", "ja-JP"])
    CV3.check(["ja", "de", ""])


@pytest.mark.parametrize(
    ("target", "transcript", "language", "errors_", "length"),
    [
        ("カレーは、辛い。", "カレーはからい", "ja", 2, 6),  # characters; kana and kanji are not folded: 辛 is か ら
        ("서울 시", "서울시", "ko", 0, 3),  # spaces do not count among characters
        ("Grüße, Welt!", "grüße welt", "de", 0, 2),  # words in lower case
        ("ABC", "abc", "ja", 3, 3),  # characters keep their case
    ],
)
def test_cv3_by_hand(target, transcript, language, errors_, length):
    assert errors("cv3", target, transcript, language) == (errors_, length)


@pytest.mark.parametrize(
    ("target", "transcript", "language", "errors_", "length"),
    [
        ("Mr. Smith won't pay $20.", "mister smith will not pay twenty dollars", "en", 0, 6),
        ("um, I, uh, know [laughs] (really)", "i know", "en", 0, 2),  # fillers and brackets go
        ("fifty-two", "52", "en", 0, 1),  # numbers are folded
        ("Größe, bitte!", "größe bitte", "de", 0, 2),
        ("カレーが辛い。", "カレーか辛い", "ja", 1, 6),  # characters; diacritics stay
        ("你好，世界", "你好 世界", "zh", 0, 4),
    ],
)
def test_whisper_by_hand(target, transcript, language, errors_, length):
    assert errors("whisper", target, transcript, language) == (errors_, length)


def test_whisper_folds_spellings_with_the_map_of_a_model(tmp_path):
    path = tmp_path / "normalizer.json"
    path.write_text(json.dumps({"colour": "color"}))
    folding = find_protocol(f"whisper:{path}")
    assert folding.score(Reference("The colour", "en"), "the color").counts.errors == 0
    assert errors("whisper", "The colour", "the color", "en") == (1, 2)
    assert folding.identity() != find_protocol("whisper").identity()
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected an object of words"):
        find_protocol(f"whisper:{path}")


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("ガッコウ", "ガッコオ"),
        ("ガッコー", "ガッコオ"),
        ("ケイエイ", "ケエエエ"),
        ("ケーエー", "ケエエエ"),
        ("はなぢを、つづく ﾂﾗｲ！", "ハナジオツズクツライ"),
        ("ヰヱヲ", "イエオ"),
        ("カア", "カア"),
        ("ゲーム・オーバー", "ゲエムオオバア"),
        ("ー", "ア"),
        ("キョウ", "キョオ"),
    ],
)
def test_kana_has_one_spelling_for_each_sound(raw, canonical):
    assert canonical_kana(raw) == canonical
    assert canonical_kana(canonical) == canonical


@settings(max_examples=80, deadline=None)
@given(st.text(st.sampled_from(list("アウオコソトケエイーんっゃをぢハワ、 <>")), max_size=12))
def test_canonical_kana_is_a_projection_and_tags_do_not_change_it(text):
    once = canonical_kana(text)
    assert canonical_kana(once) == once
    assert canonical_kana(text, tags=True).replace("<", "").replace(">", "") == once


ROWS = {
    "ア": "アカサタナハマヤラワガザダバパァャヮ",
    "イ": "イキシチニヒミリギジビピィ",
    "ウ": "ウクスツヌフムユルグズブプゥュヴ",
    "エ": "エケセテネヘメレゲゼデベペェ",
    "オ": "オコソトノホモヨロゴゾドボポォョ",
}


@given(st.text(st.sampled_from("アイウエオカコケンッ大ー<>ョヴ"), max_size=9))
def test_long_vowels_letter_by_letter(text):
    """The rule read slowly: a letter that lengthens the vowel before it becomes that vowel, tags are seen through."""
    found, before, vowel = "", "ア", "ア"
    for one in text:
        if one == "ー":
            one = vowel or before
        elif vowel + one in ("オウ", "エイ"):
            one = vowel
        found += one
        if one not in "<>":
            before, vowel = one, next((name for name, row in ROWS.items() if one in row), "")
    assert canonical_kana(text, tags=True) == found


def test_kana_by_hand():
    """かれーわからい against かれーわつらい: カ is ツ, one of seven; the spoken form is compared where there is one."""
    protocol = find_protocol("kana")
    reference = Reference("カレーは辛い", "ja", spoken="カレーワカライ")
    assert protocol.score(reference, "かれーわ、つらい。").counts == protocol.count("カレエワカライ", "カレエワツライ")
    assert protocol.score(reference, "かれーわ、つらい。").counts.errors == 1
    assert protocol.score(reference, "かれえはからい").counts.errors == 1  # ハ is not ワ
    assert (is_kana("カレー、は"), is_kana("辛い"), is_kana("A")) == (True, False, False)
    with pytest.raises(ValueError, match="for ja, got sentences of language en"):
        protocol.check(["ja", "en"])


def test_kana_reads_kanji_by_the_dictionary():
    pytest.importorskip("pyopenjtalk")
    score = find_protocol("kana").score(Reference("今日は良い天気です", "ja"), "きょーわよいてんきです")
    assert (score.normalised_target, score.counts.errors) == ("キョオワヨイテンキデス", 0)


def test_pinyin_by_hand():
    """银行 yin2 hang2 as 银形 yin2 xing2: one of two syllables; 妈 and 马 differ by tone alone."""
    pytest.importorskip("pypinyin")
    protocol = find_protocol("pinyin")
    score = protocol.score(Reference("银行！", "zh"), "银形")
    assert (score.normalised_target, score.normalised_transcript, score.counts.errors) == (
        "yin2 hang2",
        "yin2 xing2",
        1,
    )
    assert protocol.score(Reference("银行", "zh"), "銀航").counts.errors == 0  # of one sound, and traditional
    tones = protocol.score(Reference("妈", "zh"), "马")
    assert (tones.counts.errors, tones.details["toneless_error_rate"]) == (1, 0)
    mixed = protocol.score(Reference("我爱 PyTorch，它的", "zh"), "wo3 ai4 pytorch ta1 de5")
    assert (mixed.counts.errors, mixed.counts.reference_length) == (0, 5)
    with pytest.raises(ValueError, match="for zh, got sentences of language en"):
        protocol.check(["zh", "en"])


@pytest.mark.parametrize(
    ("package", "work", "extra"),
    [
        ("opencc", lambda: SEED.check(["zh"]), "zh"),
        ("pypinyin", lambda: find_protocol("pinyin").check(["zh"]), "zh"),
        ("pyopenjtalk", lambda: find_protocol("kana").score(Reference("辛い", "ja"), "からい"), "ja"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, work, extra):
    from tts_align.evaluation.protocols import chinese, kana, pinyin

    for cached in (chinese.converter, kana._pyopenjtalk, pinyin._pypinyin):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"not installed: pip install 'tts-align\[{extra}\]'"):
        work()


def test_protocols_by_name():
    assert [find_protocol(name).name for name in PROTOCOLS] == list(PROTOCOLS)
    assert {name: find_protocol(name).headline for name in PROTOCOLS} == dict.fromkeys(PROTOCOLS, "macro") | {
        "whisper": "corpus"
    }
    with pytest.raises(ValueError, match=r"unknown protocol 'sead': expected one of seed, cv3, .*did you mean 'seed'"):
        find_protocol("sead")


@pytest.mark.parametrize("name", ["seed", "cv3", "whisper", "kana"])
@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from(list("abc' ,カあー")), max_size=12))
def test_a_text_has_no_errors_against_itself_and_silence_is_all_deletions(name, text):
    protocol = find_protocol(name)
    same = protocol.score(Reference(text, "en" if name != "kana" else "ja"), text) if name != "kana" else None
    if same is not None:
        assert same.counts.errors == 0
        silent = protocol.score(Reference(text, "en"), "").counts
        assert (silent.deletions, silent.insertions) == (silent.reference_length, 0)


@pytest.mark.parametrize(
    ("code", "language"), [("zh-CN", "zh"), ("cmn", "zh"), ("ja_JP", "ja"), ("yue-Hant", "yue"), ("", "")]
)
def test_primary_language(code, language):
    assert primary(code) == language
