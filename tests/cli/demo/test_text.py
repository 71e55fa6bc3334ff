# SPDX-License-Identifier: Apache-2.0
from tts_align.cli.demo.text import prompts, text_tokenizer
from tts_align.data.demo.sentences import SPEAKERS, all_sentences, split_sentences


def test_every_sentence_is_its_words():
    tokenizer = text_tokenizer()
    for sentence in all_sentences():
        words = [sentence.demonstrative, sentence.noun, "は", sentence.adverb, "辛い", sentence.ending]
        assert tokenizer.encode(sentence.text).tokens == [word for word in words if word]


def test_other_text_is_spelt():
    tokenizer = text_tokenizer()
    assert tokenizer.encode("とてなべ。").tokens == ["と", "て", "な", "べ", "。"]
    assert tokenizer.encode("猫").ids == [0]


def test_a_voice_is_one_token():
    tokenizer = text_tokenizer()
    ids = [tokenizer.token_to_id(f"<{speaker}>") for speaker in SPEAKERS]
    assert None not in ids
    assert tokenizer.encode(f"<{SPEAKERS[0]}>この鍋").tokens == [f"<{SPEAKERS[0]}>", "この", "鍋"]


def test_prompts_mark_the_word():
    rows = prompts("dev")
    assert [row.id for row in rows] == [sentence.id for sentence in split_sentences()["dev"]]
    for row in rows:
        (span,) = row.spans
        assert row.text[span.start : span.end] == "辛い"
        assert {*span.right, *span.wrong} == row.transcripts.keys() == {"からい", "つらい"}
        assert row.right == span.right
