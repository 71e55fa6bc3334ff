# SPDX-License-Identifier: Apache-2.0
"""The symbolic corpus: the demo's sentences in speech tokens that spell kana, and the small model trained on it.

The corpus proves the methods: its speech is random in length and slightly noisy, like codec tokens, yet every reading
in it is known exactly (:mod:`tts_align.evaluation.judges.symbolic`), and everything about it takes seconds.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from tts_align.cli.demo.build import text_tokenizer
from tts_align.cli.demo.training import Schedule, train_base
from tts_align.data.demo.sentences import SPEAKERS, Sentence, Split, right_rates, split_sentences
from tts_align.data.records import Span
from tts_align.evaluation.judges.symbolic import CODES_PER_KANA, KANA, LONGEST_REPEAT, begin_code
from tts_align.evaluation.prompts import SentencePrompt
from tts_align.models.base.generation import Context, Encoded, Sampling
from tts_align.models.base.layout import TokenRow
from tts_align.models.policy.qwen2 import Qwen2CodecLM, Sizes

CODES = CODES_PER_KANA * len(KANA)
NOISE = 0.005
"""Share of speech tokens that are replaced by a token of another kana."""
# A kana repeats its inside token, so repetition must be allowed.
SAMPLING = Sampling(top_p=0.96, top_k=0, repetition_window=0, min_ratio=1.0, max_ratio=20.0)
"""How candidates are drawn."""
SIZES = Sizes(
    codebook_size=CODES,
    text_vocabulary=0,
    hidden_size=96,
    layers=3,
    heads=4,
    key_value_heads=2,
    intermediate_size=256,
    rope_theta=10000.0,
    prefix_format="<{speaker}>",
)
"""Of the base model, but for its text vocabulary."""
SCHEDULE = Schedule(steps=600, batch_size=64, learning_rate=4e-3)

Encoder = Callable[[str, Context], Encoded]

# Only kana of three tokens or more are disturbed, one token each: of two tokens, one wrong, nobody could tell which.
_TOKENS_PER_KANA_SPOKEN = 1 + (1 + LONGEST_REPEAT) / 2
_SHARE_OF_LONG_KANA = (LONGEST_REPEAT - 1) / LONGEST_REPEAT
_NOISE_PER_LONG_KANA = NOISE * _TOKENS_PER_KANA_SPOKEN / _SHARE_OF_LONG_KANA


def synthesise(sentence: Sentence, reading: str, speaker: str, generator: np.random.Generator) -> list[int]:
    """Speech tokens of a sentence with 辛い read as ``reading``.

    Args:
        sentence: what is said.
        reading: からい or つらい.
        speaker: whose speech tokens are used.
        generator: draws lengths and noise.
    """
    transcript = sentence.transcript(reading)
    repeats = generator.integers(1, LONGEST_REPEAT + 1, len(transcript))
    noisy = (generator.random(len(transcript)) < _NOISE_PER_LONG_KANA) & (repeats > 1)
    speech_tokens: list[int] = []
    for kana, repeat, disturbed in zip(transcript, repeats.tolist(), noisy.tolist(), strict=True):
        begin = begin_code(kana, speaker)
        segment = [begin] + [begin + 1] * repeat
        if disturbed:
            # Not by a token of its own: a second begin would truly be a second kana.
            other = CODES_PER_KANA + int(generator.integers(CODES - CODES_PER_KANA))
            segment[generator.integers(len(segment))] = (CODES_PER_KANA * KANA.index(kana) + other) % CODES
        speech_tokens += segment
    return speech_tokens


def epochs(encode_text: Encoder, sentences: Sequence[Sentence], seed: int) -> Callable[[], Iterator[TokenRow]]:
    """What gives the rows of one epoch: every sentence in both voices, readings, lengths and noise drawn anew.

    Args:
        encode_text: of the model that shall learn.
        sentences: what is said.
        seed: of the draws, and of which cells are wrong.
    """
    generator, rates = np.random.default_rng(seed), right_rates(seed)
    pairs = [
        (sentence, speaker, encode_text(sentence.text, Context(speaker)))
        for sentence in sentences
        for speaker in SPEAKERS
    ]

    def draw() -> Iterator[TokenRow]:
        for index in generator.permutation(len(pairs)):
            sentence, speaker, encoded = pairs[index]
            is_right = generator.random() < rates[sentence.cell]
            reading = sentence.reading_right if is_right else sentence.reading_wrong
            yield encoded.row(synthesise(sentence, reading, speaker, generator))

    return draw


def make_base(seed: int = 0, schedule: Schedule = SCHEDULE, sizes: Sizes = SIZES) -> Qwen2CodecLM:
    """Train a base model from random weights on the ``base`` and ``preference`` sentences.

    Args:
        seed: of weights, split, cells and corpus.
        schedule: of the training.
        sizes: of the model.
    """
    torch.manual_seed(seed)
    tokenizer = text_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        tokenizer.save(str(file))
        model = Qwen2CodecLM(
            sizes=dataclasses.replace(sizes, text_vocabulary=tokenizer.get_vocab_size()), tokenizer=str(file)
        )
    splits = split_sentences(seed)
    train_base(model, epochs(model.encode_text, splits["base"] + splits["preference"], seed), schedule)
    return model


def prompt(sentence: Sentence) -> SentencePrompt:
    """The sentence as a prompt, 辛い marked."""
    start, end = sentence.span
    return SentencePrompt(
        id=sentence.id,
        text=sentence.text,
        language="ja",
        spans=(Span(start, end, (sentence.reading_right,), (sentence.reading_wrong,)),),
        transcripts=sentence.candidates,
    )


def prompts(split: Split, seed: int = 0, count: int | None = None) -> list[SentencePrompt]:
    """Sentences of a split as prompts, all of them or a number drawn by the seed."""
    sentences = split_sentences(seed)[split]
    if count is not None:
        sentences = sorted(random.Random(f"prompts {seed}").sample(sentences, count), key=lambda one: one.id)
    return [prompt(sentence) for sentence in sentences]
