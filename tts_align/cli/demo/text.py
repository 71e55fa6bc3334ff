# SPDX-License-Identifier: Apache-2.0
"""The demo's sentences as a text tokenizer sees them, and as prompts."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Unigram

from tts_align.data.demo.sentences import (
    ADVERBS,
    DEMONSTRATIVES,
    ENDINGS,
    NOUNS,
    SPEAKERS,
    TARGET,
    Sentence,
    Split,
    split_sentences,
    voice_token,
)
from tts_align.data.records import Span
from tts_align.evaluation.prompts import SentencePrompt

# So that a sentence of the user's own is read letter by letter instead of not at all.
_KANA = "".join(map(chr, range(ord("ぁ"), ord("ん") + 1))) + "ー、。？"


def text_tokenizer() -> Tokenizer:
    """Unigram tokenizer whose pieces are the grammar's words, and single characters for everything else.

    Example:
        >>> text_tokenizer().encode("この鍋はとても辛いです").tokens
        ['この', '鍋', 'は', 'とても', '辛い', 'です']
    """
    words = [*filter(None, DEMONSTRATIVES), *NOUNS, "は", *ADVERBS, TARGET, *ENDINGS]
    known = dict.fromkeys([*words, *SPEAKERS])
    letters = dict.fromkeys([*"".join(known), *_KANA])
    single = [letter for letter in letters if letter not in known]
    pieces = [("<unk>", 0.0), *((word, -1.0) for word in words), *((letter, -10.0) for letter in single)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0))
    tokenizer.add_special_tokens([AddedToken(voice_token(speaker)) for speaker in SPEAKERS])
    return tokenizer


def prompt(sentence: Sentence) -> SentencePrompt:
    """A sentence to speak, 辛い marked."""
    start, end = sentence.span
    return SentencePrompt(
        id=sentence.id,
        text=sentence.text,
        language="ja",
        spans=(Span(start, end, (sentence.reading_right,), (sentence.reading_wrong,)),),
        transcripts=sentence.candidates,
    )


def prompts(split: Split, seed: int = 0) -> list[SentencePrompt]:
    """The sentences of a split."""
    return [prompt(sentence) for sentence in split_sentences(seed)[split]]
