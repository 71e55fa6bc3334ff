# SPDX-License-Identifier: Apache-2.0
"""Utterances to be spoken, made when they are asked for: the same ones, under the same key, without their memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping

import numpy as np
from torch import nn

from tts_align.evaluation.candidates import candidate_seed
from tts_align.evaluation.prompts import SentencePrompt
from tts_align.evaluation.speaking import ReadTexts, UtteranceRequest, UtteranceRequests, encode
from tts_align.models.base.generation import Context, Encoded
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.utils.shards import digest, streamed_digest


class Reader(Qwen2CodecLM):
    """Reads a text in two pieces, letter by letter; nothing else of the policy is there."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def pieces(self, text: str) -> list[str]:
        return [text[:3], text[3:]]

    def encode_text(self, text: str, context: Context) -> Encoded:
        return Encoded((len(context.speaker), *map(ord, text)), 1)


PROMPTS = [
    SentencePrompt(f"s{number}", f"sentence {number}", speaker="own" if number % 3 == 1 else "") for number in range(7)
]


def by_hand(speakers: list[str], samples: int, seed: int) -> list[UtteranceRequest]:
    found = []
    for prompt in PROMPTS:
        for speaker in [prompt.speaker] if prompt.speaker else speakers or [""]:
            for number in range(samples):
                found.append(
                    UtteranceRequest(prompt, speaker, number, candidate_seed(seed, prompt.id, speaker, number))
                )
    return found


def test_they_are_those_of_the_loops():
    for speakers in ([], ["a"], ["a", "b"]):
        expected = by_hand(speakers, 3, 5)
        found = UtteranceRequests(PROMPTS, speakers, 3, 5)
        assert list(found) == expected
        assert list(found[1::2]) == expected[1::2]
        assert list(found[1::2][2:5]) == expected[1::2][2:5]
        done = {item.id for item in expected[::4]}
        assert list(found[::2].without(done)) == [item for item in expected[::2] if item.id not in done]


def test_the_key_of_a_file_of_candidates_is_that_of_earlier_runs():
    """A list of sentences and a dictionary of what is read, in words."""
    items = by_hand(["a", "b"], 2, 5)
    before = {
        (item.prompt.id, item.speaker): tuple(
            (piece, Encoded((len(item.speaker), *map(ord, piece)), 1))
            for piece in (item.prompt.text[:3], item.prompt.text[3:])
        )
        for item in items
    }
    read = ReadTexts(Reader(), UtteranceRequests(PROMPTS, ["a", "b"], 2, 5))
    assert isinstance(read, Mapping)
    assert dict(read) == before == encode(Reader(), items)
    assert len(read) == len(before)
    assert streamed_digest("sample", PROMPTS, read, 2, 5) == digest("sample", PROMPTS, before, 2, 5)
    assert streamed_digest({}) == digest({})
    assert streamed_digest([], "a") == digest([], "a")


def test_many_take_little_memory():
    """Five thousand utterances took 2 MB, the texts as numbers as much again."""
    prompts = [SentencePrompt(f"s{number}", "a sentence of some words" * 3) for number in range(300)]
    tracemalloc.start()
    try:
        items = UtteranceRequests(prompts, ["anna", "bert"], 8, 0)
        streamed_digest(ReadTexts(Reader(), items))
        left = items[1::2].without({items[1].id})
        assert len(left) == 2399
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert np.all(np.diff([item.sample for item in left[:3]]) == 2)
