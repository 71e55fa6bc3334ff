# SPDX-License-Identifier: Apache-2.0
"""What ``test`` speaks, and with what it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tts_align.evaluation.judges.base import Judge
from tts_align.evaluation.listening import MAX_FAILED_SHARE
from tts_align.evaluation.measures.base import UtteranceMeasure, describe
from tts_align.evaluation.protocols import find_protocol
from tts_align.evaluation.suites import SUITES


@dataclass(frozen=True)
class TestSettings:
    """What ``test`` speaks, and with what it is measured.

    Args:
        prompts: the test set, none of whose sentences was trained on: by default JSONL, or plain text with one sentence
            per line; demo: names an embedded one. Else the file or folder that ``suite`` says.
        suite: kind of the test set: sentences, manifest, seed (a .lst of Seed-TTS-Eval), cv3 (a folder of CV3-Eval) or
            jkyb (a file of Joyo-Kanji-Yomi, Parakeet edition).
        protocol: rules that turn transcripts into error rates: seed, cv3, whisper, kana, pinyin or jkyb; by default the
            test set's own, and none for sentences.
        language: BCP 47 code of the sentences, where the test set does not say it.
        measures: numbers of voice, quality and prosody beside the verdicts, by class path.
        readings: listener that tells the readings of marked words, if it is not the judge that transcribes.
        speakers: voices to speak in; by default the only one there is. A sentence that names its own is spoken in that
            one only.
        samples: utterances per sentence and voice.
        sentences: number of sentences to test, evenly spread, for trials; all by default.
        seed: seed of all utterances, the same before and after; by default 1 plus that of the run (seed_everything).
        batch_rows: utterances spoken together; does not change them.
        audio: number of sentences whose sound is kept, before and after, those whose reading changed first; all keeps
            every utterance.
        max_failed_share: largest share of a system's utterances that may go without a verdict because vocoder or judge
            failed on them; they are left out of all numbers, counted and named.
        forgetting: whether to speak general sentences without marked words as well, before and after, in every language
            of the test set: what the training may have broken besides.
    """

    __test__ = False  # not a test, whatever its name

    prompts: str
    suite: str = "sentences"
    protocol: str | None = None
    language: str = ""
    measures: Sequence[UtteranceMeasure] = field(default_factory=tuple)
    readings: Judge | None = None
    speakers: tuple[str, ...] = ()
    samples: int = 1
    sentences: int | None = None
    seed: int | None = None
    batch_rows: int = 128
    audio: int | Literal["all"] = 4
    max_failed_share: float = MAX_FAILED_SHARE
    forgetting: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.samples < 1 or self.batch_rows < 1 or (self.sentences is not None and self.sentences < 1):
            raise ValueError("model.test: samples, batch_rows and sentences must be at least 1")
        if self.suite not in SUITES:
            raise ValueError(f"model.test.suite: expected one of {', '.join(SUITES)}, got {self.suite!r}")
        if self.protocol is not None:
            find_protocol(self.protocol)
        describe(self.measures)

    @property
    def listeners(self) -> list[Judge | UtteranceMeasure]:
        """What listens besides the judge of the recipe."""
        return [*self.measures, *([] if self.readings is None else [self.readings])]
