# SPDX-License-Identifier: Apache-2.0
"""What the embedded audio experiment must show before it is shipped, on sentences that nothing was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tts_align.cli.demo.flow import reconstruction_error
from tts_align.data.demo.audio import Clip
from tts_align.data.demo.sentences import READINGS, SPEAKERS, Sentence
from tts_align.evaluation.judges.base import Expected, Reading, SpeechSample, Verdict
from tts_align.evaluation.judges.ctc import CTCJudge, error_rate
from tts_align.models.base.generation import Context, Sampling
from tts_align.models.codec.vocoder import MelVocoder
from tts_align.models.flow.dit import DiTFlow
from tts_align.models.policy.qwen2 import Qwen2CodecLM
from tts_align.utils.progress import Bar

SAMPLES = 5
"""Utterances per test sentence and voice."""

# All repeats are legitimate here (a long vowel is one token again and again), so there is no repetition-aware sampling.
SAMPLING = Sampling(top_p=0.9, top_k=0, repetition_window=0, min_ratio=1.0, max_ratio=15.0)


@dataclass(frozen=True)
class Gate:
    """A number and where it must lie.

    Attributes:
        name: What is measured.
        value: What came out.
        low: Smallest value that passes.
        high: Largest value that passes.
    """

    name: str
    value: float
    low: float = 0.0
    high: float = 1.0

    @property
    def passed(self) -> bool:
        """Whether the value lies where it must."""
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        mark = "passed" if self.passed else "FAILED"
        return f"{mark}  {self.name}: {self.value:.4f}, must lie in [{self.low:g}, {self.high:g}]"


def measure_codec(parts: Path, copies: Sequence[Clip]) -> list[Gate]:
    """Whether copy-synthesised sentences are understood."""
    transcripts = CTCJudge(str(parts / "judge")).recogniser.transcribe([clip.audio for clip in copies])
    errors = [error_rate(clip.kana, heard) for clip, heard in zip(copies, transcripts, strict=True)]
    return [Gate("codec copy-synthesis CER", sum(errors) / len(errors), high=0.03)]


def measure_flow(parts: Path, known: Sequence[Clip]) -> list[Gate]:
    """Whether sentences are understood when the flow has made them of their speech tokens."""
    flow = DiTFlow(directory=str(parts / "flow")).eval()
    return [Gate("flow reconstruction CER", reconstruction_error(flow, parts, known), high=0.01)]


def measure_judge(parts: Path, known: Sequence[Clip], copies: Sequence[Clip]) -> list[Gate]:
    """Whether both recognisers tell the reading of sentences whose reading is known."""
    return [
        Gate(f"{name} reading accuracy, {kind} speech", _reading_accuracy(parts / name, clips), low=0.98)
        for name in ("judge", "labeller")
        for kind, clips in (("real", known), ("copy-synthesised", copies))
    ]


def _reading_accuracy(recogniser: Path, clips: Sequence[Clip]) -> float:
    right = [next(reading for reading in READINGS if reading in clip.kana) for clip in clips]
    expected = [
        Expected("", {other: clip.kana.replace(reading, other) for other in READINGS}, (reading,))
        for clip, reading in zip(clips, right, strict=True)
    ]
    judge = CTCJudge(str(recogniser))
    heard = [SpeechSample(clip.audio[:0].long(), clip.audio, judge.recogniser.sizes.sample_rate) for clip in clips]
    verdicts = judge.judge(heard, expected)
    return sum(verdict.reading is Reading.RIGHT for verdict in verdicts) / len(verdicts)


def measure_base(
    parts: Path, sentences: Sequence[Sentence], rates: Mapping[tuple[str, str], float], samples: int = SAMPLES
) -> list[Gate]:
    """What the base model says of sentences it never heard: `samples` utterances of each in each voice."""
    rows = [(sentence, speaker) for sentence in sentences for speaker in SPEAKERS for _ in range(samples)]
    verdicts = speak_and_judge(parts, rows)
    right: dict[str, list[bool]] = {"taught right": [], "taught wrong": []}
    by_sentence: dict[str, list[bool]] = {}
    for (sentence, _), verdict in zip(rows, verdicts, strict=True):
        is_right = verdict.reading is Reading.RIGHT
        right["taught right" if rates[sentence.cell] > 0.5 else "taught wrong"].append(is_right)
        by_sentence.setdefault(sentence.id, []).append(is_right)
    one_sided = [all(group) or not any(group) for group in by_sentence.values()]
    neither = [verdict.reading is Reading.NEITHER for verdict in verdicts]
    return [
        Gate("base accuracy", _share([*right["taught right"], *right["taught wrong"]]), 0.60, 0.72),
        Gate("base says neither reading", _share(neither), high=0.03),
        Gate("cells taught right, read right", _share(right["taught right"]), low=0.93),
        Gate("cells taught wrong, read right", _share(right["taught wrong"]), high=0.12),
        Gate("base CER", sum(verdict.cer for verdict in verdicts) / len(verdicts), high=0.2),
        Gate("base nearest CER", sum(verdict.nearest_cer for verdict in verdicts) / len(verdicts), high=0.03),
        Gate("one-sided sentences", _share(one_sided), low=0.75),
    ]


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def speak_and_judge(
    parts: Path, rows: Sequence[tuple[Sentence, str]], sampling: Sampling = SAMPLING, batch_size: int = 256
) -> list[Verdict]:
    """Sample an utterance for each (sentence, speaker), make it sound, let the judge hear it."""
    model, judge = Qwen2CodecLM(str(parts / "base")), CTCJudge(str(parts / "judge"))
    vocoder = MelVocoder(str(parts / "codec"))
    verdicts: list[Verdict] = []
    for start in Bar(range(0, len(rows), batch_size), desc="gates", unit="batch"):
        some = rows[start : start + batch_size]
        encoded = [model.encode_text(sentence.text, Context(speaker)) for sentence, speaker in some]
        prompts = [text.prompt(start + row) for row, text in enumerate(encoded)]
        speech = [spoken.speech for spoken in model.generate(prompts, sampling)]
        audio = vocoder.speak(speech, [speaker for _, speaker in some])
        heard = [
            SpeechSample(speech_tokens, sound, vocoder.sample_rate, speaker)
            for speech_tokens, sound, (_, speaker) in zip(speech, audio, some, strict=True)
        ]
        expected = [Expected(sentence.text, sentence.candidates, (sentence.reading_right,)) for sentence, _ in some]
        verdicts += judge.judge(heard, expected)
    return verdicts
