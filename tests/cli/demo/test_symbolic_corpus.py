# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from tts_align.cli.demo.symbolic import CODES, NOISE, SIZES, epochs, make_base, prompts, synthesise
from tts_align.cli.demo.training import Schedule
from tts_align.data.demo.sentences import READINGS, SPEAKERS, all_sentences, right_rates, split_sentences
from tts_align.evaluation.judges.symbolic import KANA, VOICES, decode
from tts_align.models.base.generation import Encoded


def test_alphabet_and_voices_are_those_of_the_grammar():
    used = {kana for sentence in all_sentences() for reading in READINGS for kana in sentence.transcript(reading)}
    assert set(KANA) == used
    assert len(KANA) == len(used)
    assert tuple(VOICES) == tuple(SPEAKERS)
    assert SIZES.codebook_size == CODES == 4 * len(used)


def test_noisy_speech_is_decoded_exactly():
    generator = np.random.default_rng(0)
    sentences = generator.permutation(np.array(all_sentences(), dtype=object))[:300]
    clean = disturbed = total = 0
    for sentence, reading, speaker in itertools.product(sentences, READINGS, SPEAKERS):
        speech_tokens = synthesise(sentence, reading, speaker, generator)
        segments = decode(speech_tokens)
        assert "".join(segment.kana for segment in segments) == sentence.transcript(reading)
        own = 2 * VOICES.index(speaker)
        begins = sum(code % 4 == own for code in speech_tokens)
        clean += begins == len(segments)
        disturbed += sum(code % 4 not in (own, own + 1) for code in speech_tokens)
        total += len(speech_tokens)
    assert clean < 1200  # some are noisy
    assert disturbed / total == pytest.approx(
        NOISE / 2, rel=0.25
    )  # half of the noise falls on the other voice's speech tokens


def encode_text(text, context):
    return Encoded(tuple(map(ord, f"{context.speaker[0]}{text}")), 1)


def test_readings_follow_the_cells_and_are_drawn_anew():
    sentences, rates = split_sentences()["dev"], right_rates()
    draw = epochs(encode_text, sentences, seed=0)
    right, spoken = Counter(), Counter()
    by_text = {tuple(map(ord, sentence.text)): sentence for sentence in sentences}
    first = list(draw())
    for row in itertools.chain(first, *(draw() for _ in range(3))):
        sentence = by_text[row.text[1:]]
        said = "".join(segment.kana for segment in decode(row.speech))
        wrong_cell = rates[sentence.cell] < 0.5
        spoken[wrong_cell] += 1
        right[wrong_cell] += said == sentence.transcript(sentence.reading_right)
    assert len(first) == 2 * len(sentences)
    assert len({row.text for row in first}) == len(first)
    assert right[False] / spoken[False] == pytest.approx(0.97, abs=0.02)
    assert right[True] / spoken[True] == pytest.approx(0.04, abs=0.02)


def test_prompts_mark_the_word():
    for split, count in (("test", 576), ("dev", 288)):
        assert len(prompts(split)) == count
    some = prompts("preference", count=50)
    assert some == prompts("preference", count=50) != prompts("preference", seed=1, count=50)
    assert len({prompt.id for prompt in some}) == 50
    for prompt in some:
        span = prompt.spans[0]
        assert prompt.text[span.start : span.end] == "辛い"
        assert prompt.right == span.right
        assert set(prompt.transcripts) == {*span.right, *span.wrong}


def test_base_is_the_same_for_the_same_seed():
    schedule = Schedule(steps=1, batch_size=2, learning_rate=1e-3)
    sizes = dataclasses.replace(SIZES, hidden_size=16, layers=1, heads=2, key_value_heads=1, intermediate_size=16)
    one, two, other = (make_base(seed, schedule, sizes).digest() for seed in (3, 3, 4))
    assert one == two != other
