# SPDX-License-Identifier: Apache-2.0
"""A policy without weights, whose speech is a function of text and seed, and the parts that go with it."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from tts_align.cli.judge import judge
from tts_align.cli.sample import sample
from tts_align.data.records import Span
from tts_align.evaluation.judges.base import Judge, Reading, Verdict
from tts_align.evaluation.prompts import SentencePrompt, write_prompts
from tts_align.models.base.generation import Context, Encoded, Sampling, Spoken
from tts_align.models.base.layout import Layout
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.vocoder import Vocoder

READINGS = (Reading.RIGHT, Reading.WRONG, Reading.NEITHER)


class Talker(CodecLM):
    """Says 1 to 6 speech tokens, drawn by text and seed; counts what it is asked, and dies when told to."""

    layout = Layout("cosyvoice2", 50)
    adapted = False

    def __init__(self, dies_after=None):
        super().__init__()
        self.batches, self.dies_after = [], dies_after

    def forward(self, rows, logits=False):
        raise NotImplementedError

    def encode_text(self, text, context=Context()):  # noqa: B008
        voice = context.speaker[:1]
        return Encoded((*map(ord, voice), *map(ord, text)), len(voice))

    def generate(self, prompts, sampling, progress=None):
        if self.dies_after is not None and len(self.batches) >= self.dies_after:
            raise KeyboardInterrupt
        self.batches.append(len(prompts))
        if progress is not None:
            progress(len(prompts))
        return [self.say(prompt) for prompt in prompts]

    def say(self, prompt):
        generator = np.random.default_rng([prompt.seed, *prompt.text])
        speech_tokens = generator.integers(0, 50, size=generator.integers(1, 7))
        return Spoken(torch.from_numpy(speech_tokens), bool(generator.random() < 0.9))

    def rebuild(self):
        return self

    def without_adapter(self):
        raise NotImplementedError

    def save(self, directory):
        raise NotImplementedError

    def digest(self):
        return "talker"


class Ear(Judge):
    """Judges by the first token; cannot hear some speech tokens."""

    def __init__(self, hears=True, deaf_to=()):
        super().__init__()
        self.needs_audio, self.deaf_to, self.batches = hears, deaf_to, []

    def judge(self, samples, expected):
        self.batches.append(len(samples))
        return [self.verdict(one, wanted) for one, wanted in zip(samples, expected, strict=True)]

    def verdict(self, heard, expected):
        first = int(heard.speech[0])
        if first in self.deaf_to:
            raise RuntimeError(f"code {first} hurts")
        if self.needs_audio:
            assert heard.waveform is not None
            assert heard.waveform.tolist() == heard.speech.float().tolist()
        right = expected.transcripts[expected.right[0]]
        return Verdict(right, READINGS[first % 3], first / 100, first / 200, target_share=(0.25, 0.5))


class Tube(Vocoder):
    """Makes each token one sample."""

    sample_rate = 100

    def speak(self, speech, speakers):
        return [speech_tokens.float() for speech_tokens in speech]


@dataclass
class Module:
    policy: CodecLM = field(default_factory=Talker)
    judge: nn.Module | None = field(default_factory=Ear)
    vocoder: nn.Module | None = field(default_factory=Tube)
    sampling: Sampling = field(default_factory=Sampling)


def sentences(count=4):
    return [
        SentencePrompt(
            id=f"s{i}",
            text="あ" * (count - i) + "辛い",
            language="ja",
            spans=(Span(count - i, count - i + 2, ("からい",), ("つらい",)),),
            transcripts={"からい": "あからい", "つらい": "あつらい"},
        )
        for i in range(count)
    ]


VOICES = ["sakura", "takumi"]


def make_prompts(folder):
    path = folder / "sentences.jsonl"
    write_prompts(path, sentences())
    return path


def make_candidates(folder):
    return sample(Module(), make_prompts(folder), folder / "candidates.jsonl", 3, VOICES)


def make_judged(folder):
    return judge(Module(), make_candidates(folder), folder / "judged.jsonl")
