# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from tts_align.data.records import Span
from tts_align.evaluation.prompts import SentencePrompt, read_prompts, write_prompts

SPICY = SentencePrompt(
    "s1",
    "鍋は辛い",
    "ja",
    "sakura",
    (Span(2, 4, ("からい",), ("つらい",)),),
    {"からい": "なべわからい", "つらい": "なべわつらい"},
)
PLAIN = SentencePrompt("s2", "なべ")


def test_prompts_come_back(tmp_path):
    path = tmp_path / "sentences.jsonl"
    assert write_prompts(path, [SPICY, PLAIN]) == 2
    assert read_prompts(path) == [SPICY, PLAIN]


def test_what_follows_from_the_rest_is_filled_in():
    assert SPICY.right == ("からい",)
    assert PLAIN.transcripts == {"": "なべ"}
    expected = SPICY.expected
    assert (expected.text, expected.right, expected.transcripts["つらい"]) == ("鍋は辛い", ("からい",), "なべわつらい")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "なべ"}, "column 'id' is missing"),
        ({"id": "a"}, "column 'text' is missing"),
        ({"id": "a", "text": " "}, "text is empty"),
        ({"id": "a", "text": "鍋", "spans": [{"start": 0, "end": 2, "right": ["なべ"]}]}, "does not lie in the text"),
        ({"id": "a", "text": "鍋", "spans": [{"start": 0, "end": 1}]}, "expected a span with start, end and right"),
        ({"id": "a", "text": "鍋", "transcripts": {"なべ": "なべ"}}, "none is marked right"),
        (
            {"id": "a", "text": "鍋", "transcripts": {"なべ": "なべ"}, "right": ["か"]},
            "no entry for the right reading 'か'",
        ),
    ],
)
def test_faults_are_named_with_their_line(tmp_path, row, fault):
    path = tmp_path / "sentences.jsonl"
    path.write_text(json.dumps({"id": "z", "text": "ok"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"sentences.jsonl:2: .*{fault}"):
        read_prompts(path)


def test_all_faults_are_named_twenty_at_most(tmp_path):
    path = tmp_path / "sentences.jsonl"
    path.write_text("".join(json.dumps({"id": str(i // 2), "text": "か"}) + "\n" for i in range(50)))
    with pytest.raises(ValueError, match="id '0' is taken by line 1") as error:
        read_prompts(path)
    assert len(str(error.value).splitlines()) == 21
    assert str(error.value).endswith("and 5 more")


def test_an_empty_file(tmp_path):
    path = tmp_path / "sentences.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no sentence"):
        read_prompts(path)


def test_a_bare_reading_stands_for_a_list_of_one():
    row = {
        "id": "a",
        "text": "辛い",
        "spans": [{"start": 0, "end": 2, "right": "からい"}],
        "transcripts": {"からい": "からい"},
    }
    assert SentencePrompt.from_row(row).right == ("からい",)


@pytest.mark.parametrize(
    ("knobs", "wanted"),
    [
        ({"spans": (Span(0, 1, ("い",), ("う",)),), "transcripts": {"い": "x", "う": "y"}}, "x"),
        ({"spans": (Span(0, 1, ("い", "う")),), "transcripts": {"い": "x", "う": "y"}}, "x"),
        ({"transcripts": {"": "x"}}, "x"),
        ({"transcripts": {"": "a"}}, ""),
        ({}, ""),
        ({"spans": (Span(0, 1, ("い",)),)}, ""),
    ],
    ids=["right one", "first right one", "unmarked", "the text itself", "nothing said", "no transcript"],
)
def test_what_a_recogniser_should_write(knobs, wanted):
    assert SentencePrompt("s", "a", **knobs).target_text == wanted


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"spans": [{"start": 0.0, "end": 1, "right": "a"}]}, "start and end are numbers of characters, and whole"),
        ({"spans": [{"start": True, "end": 1, "right": "a"}]}, "and whole"),
        ({"spans": [{"start": 0, "end": 1, "right": [3]}]}, r"expected words, got \[3\]"),
        ({"spans": {"start": 0}}, "spans: expected a list of"),
        ({"spans": ["a"]}, "spans: expected a list of"),
        ({"language": "klingon"}, "language: expected a code such as ja, en-US or zh-Hant, got 'klingon'"),
        ({"language": 7}, "language: expected text, got 7"),
        ({"speaker": ["a"]}, r"speaker: expected text, got \['a'\]"),
        ({"instruct": 1}, "instruct: expected text, got 1"),
        ({"transcripts": {"a": 1}}, "transcripts: expected a transcript for each reading"),
        ({"transcripts": ["a"]}, "transcripts: expected a transcript for each reading"),
    ],
)
def test_wrong_types_are_refused_and_not_made_right(columns, what):
    with pytest.raises(ValueError, match=what):
        SentencePrompt.from_row({"id": "a", "text": "辛い"} | columns)


@pytest.mark.parametrize("language", ["ja", "en-US", "zh-Hant", "yue", "zh-Hans-CN", "x" * 3, ""])
def test_codes_of_languages(language):
    assert SentencePrompt.from_row({"id": "a", "text": "辛い", "language": language}).language == language
