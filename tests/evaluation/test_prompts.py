# SPDX-License-Identifier: Apache-2.0
import json
import tracemalloc

import pytest

from tts_align.data.records import Span
from tts_align.evaluation import prompts
from tts_align.evaluation.prompts import SentencePrompt, read_prompts, stream_prompts, write_prompts
from tts_align.utils.shards import digest, streamed_digest

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
@pytest.mark.parametrize("read", [read_prompts, stream_prompts])
def test_faults_are_named_with_their_line(tmp_path, row, fault, read):
    path = tmp_path / "sentences.jsonl"
    path.write_text(json.dumps({"id": "z", "text": "ok"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"sentences.jsonl:2: .*{fault}"):
        read(path)


@pytest.mark.parametrize("read", [read_prompts, stream_prompts])
def test_all_faults_are_named_twenty_at_most(tmp_path, read):
    path = tmp_path / "sentences.jsonl"
    path.write_text("".join(json.dumps({"id": str(i // 2), "text": "か"}) + "\n" for i in range(50)))
    with pytest.raises(ValueError, match="id '0' is taken by line 1") as error:
        read(path)
    assert len(str(error.value).splitlines()) == 21
    assert str(error.value).endswith("and 5 more")


@pytest.mark.parametrize("read", [read_prompts, stream_prompts])
def test_an_empty_file(tmp_path, read):
    path = tmp_path / "sentences.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no sentence"):
        read(path)


@pytest.mark.parametrize(
    "form",
    [
        lambda lines: "\n".join(lines) + "\n",
        lambda lines: "\n".join(lines),
        lambda lines: "\r\n".join(lines) + "\r\n",
        lambda lines: "\ufeff" + "\n\n".join(lines) + "\n \n",
    ],
)
def test_sentences_that_stay_in_their_file_are_those_that_are_read(tmp_path, form):
    path = tmp_path / "sentences.jsonl"
    lines = [json.dumps(one.to_row(), ensure_ascii=False, default=list) for one in (SPICY, PLAIN)]
    path.write_text(form(lines), "utf-8", newline="")
    streamed, read = stream_prompts(path), read_prompts(path)
    assert list(streamed) == read == [SPICY, PLAIN]
    assert [streamed[1], streamed[0]] == [PLAIN, SPICY]
    assert streamed_digest("sample", streamed) == streamed_digest("sample", read) == digest("sample", read)


def test_plain_text_is_streamed_as_it_is_read(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("one\n\ntwo\n")
    assert list(stream_prompts(path)) == read_prompts(path)
    assert [one.id for one in stream_prompts("words:ja/test_words")] == [
        one.id for one in read_prompts("words:ja/test_words")
    ]


def test_no_more_sentences_are_in_memory_than_are_at_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "_AT_HAND", 8)
    path = tmp_path / "sentences.jsonl"
    write_prompts(path, (SentencePrompt(f"s{number}", f"{number} " * 100) for number in range(500)))
    tracemalloc.start()
    streamed = stream_prompts(path)
    assert sum(len(one.text) for one in streamed) > 100_000
    kept, _ = tracemalloc.get_traced_memory()
    read_too = read_prompts(path)
    with_list, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(read_too) == len(streamed)
    assert kept < (with_list - kept) / 3


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
