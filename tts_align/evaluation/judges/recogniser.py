# SPDX-License-Identifier: Apache-2.0
"""Judges made of a pretrained recogniser: it writes down what it hears, and scores candidates that it is given.

A subclass brings a recogniser; what is compared, which reading counts and when the judge abstains is decided here, the
same for all of them.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.evaluation.judges.weights import files_digest
from tts_align.evaluation.metrics.functional import cer, error_rate
from tts_align.evaluation.readings.choice import Choice, choose
from tts_align.evaluation.readings.lexicon import read_lexicon
from tts_align.evaluation.readings.spelling import Marked, Script, candidate_readings, reference_texts, spell
from tts_align.utils.audio import resample

log = logging.getLogger(__name__)
LongAudio = Literal["windows", "fail"]
SAMPLE_RATE = 16000
"""Of every recogniser here, in Hz."""
_QUIET = SAMPLE_RATE // 50
_WITHOUT_SPACES = ("ja", "zh", "yue", "th", "lo", "my", "km")
_NAMES = {"cmn": "zh", "jpn": "ja", "jp": "ja", "eng": "en"}


@dataclass(frozen=True)
class Recognition:
    """What a recogniser makes of one utterance.

    Args:
        transcript: what it writes down by itself.
        scores: log-likelihood of each text that was asked for, in nats.
    """

    transcript: str
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class ReadingRules:
    """When a reading counts as heard.

    Args:
        min_margin: smallest distance in nats between the best right and the best wrong reading; below it the judge
            abstains.
        subtract_unheard: whether to take away what the recogniser expects before it hears anything: the score of the
            same candidates for silence. By default yes for Whisper, which has learnt how words are written, and no
            for CTC.
        max_cer: highest character error rate, against the nearest reading, of an utterance whose reading counts; in
            what is hardly understood no reading is heard.
        lexicon: file of words with their readings and spellings; see the README of the evaluation.
    """

    min_margin: float = 1.0
    subtract_unheard: bool | None = None
    max_cer: float = 0.5
    lexicon: Path | None = None

    def __post_init__(self) -> None:
        """Refuse bounds that mean nothing."""
        if not self.min_margin >= 0 or not self.max_cer >= 0:
            raise ValueError(f"min_margin and max_cer must be at least 0, got {self.min_margin} and {self.max_cer}")


@dataclass(frozen=True)
class _Task:
    """One utterance to judge: its sound in windows, and its candidates."""

    windows: list[Tensor]
    language: str
    marked: Marked
    spelled: Mapping[str, tuple[str, ...]]

    @property
    def texts(self) -> tuple[str, ...]:
        """Candidates to score; none of an utterance in several windows."""
        single = len(self.windows) == 1 and len(self.spelled) > 1
        return tuple(text for texts in self.spelled.values() for text in texts) if single else ()


class RecogniserJudge(Judge):
    """What judges with a pretrained recogniser have in common.

    Args:
        model: folder of the recogniser.
        language: code of the language that is spoken, such as ja; empty for that of each sentence.
        batch_size: utterances heard together; does not change a verdict.
        readings: rules by which a reading counts as heard.
        long_audio: handling of a recording that is longer than the recogniser hears at once: windows (it is cut at
            quiet moments, and no reading is told from another) or fail (an error names it).
    """

    neutral_arguments: ClassVar[frozenset[str]] = frozenset({"batch_size", "model", "device_threads"})
    scores_readings: ClassVar[bool] = True
    """Whether it scores candidates; one that does not leaves every reading open."""
    expects: ClassVar[bool] = False
    """Whether it has learnt how words are written, so that candidates score differently without any sound."""
    max_seconds: ClassVar[float] = 30.0
    """Longest sound that is heard at once."""

    def __init__(
        self,
        model: str,
        language: str = "",
        batch_size: int = 16,
        readings: ReadingRules | None = None,
        long_audio: LongAudio = "windows",
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.folder, self.language, self.batch_size = Path(model), plain_language(language), batch_size
        self.rules, self.long_audio = readings or ReadingRules(), long_audio
        self.lexicon = read_lexicon(self.rules.lexicon)
        self.register_buffer("_place", torch.zeros(0), persistent=False)  # follows the trainer's device
        self._unheard: dict[tuple[str, int], dict[str, float]] = {}

    @abstractmethod
    def hear(
        self, sounds: Sequence[Float[Tensor, " _"]], language: str, texts: Sequence[Sequence[str]]
    ) -> list[Recognition]:
        """Transcribe sounds, and score the texts asked for with each.

        Args:
            sounds: at 16 kHz, of :attr:`max_seconds` at most.
            language: code of what is spoken in all of them.
            texts: for each sound the candidates to score.
        """

    @abstractmethod
    def weight_files(self) -> Iterable[Path]:
        """Files whose content decides what is heard."""

    @property
    def script(self) -> Script:
        """What it writes."""
        return Script.WRITTEN

    def identity(self) -> dict[str, str]:
        """What a verdict depends on; the weights by the content of their files, wherever they lie."""
        lexicon = [self.rules.lexicon] if self.rules.lexicon is not None else []
        return super().identity() | {
            "weights": files_digest(self.weight_files()),
            "model": self.folder.name,
            "lexicon": files_digest(lexicon) if lexicon else "",
        }

    def same_as(self, other: Judge) -> bool:
        """Whether another judge is the same recogniser."""
        mine, others = self.identity(), other.identity()
        return all(mine[name] == others[name] for name in ("class", "version", "weights"))

    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        """One verdict per utterance."""
        with torch.device("cpu"):
            tasks = [self._task(one, target) for one, target in zip(samples, expected, strict=True)]
        heard: list[list[Recognition]] = [[] for _ in tasks]
        for language in dict.fromkeys(task.language for task in tasks):
            places = [place for place, task in enumerate(tasks) if task.language == language for _ in task.windows]
            windows = [window for task in tasks if task.language == language for window in task.windows]
            for start in range(0, len(windows), self.batch_size):
                batch = slice(start, start + self.batch_size)
                asked = [tasks[place].texts for place in places[batch]]
                for place, one in zip(places[batch], self.hear(windows[batch], language, asked), strict=True):
                    heard[place].append(one)
        silent = self._of_silence(tasks)
        return [self._verdict(*one) for one in zip(tasks, heard, silent, strict=True)]

    def _task(self, sample: SpeechSample, expected: Expected) -> _Task:
        if sample.waveform is None:
            raise ValueError(f"{type(self).__name__} hears sound: the recipe must set model.vocoder")
        language = self.language or plain_language(expected.language)
        if not language:
            raise ValueError(
                f"the language of {expected.text!r} is not known: set model.judge.init_args.language, or give every "
                "sentence a column language"
            )
        sound = sample.waveform.detach().float().cpu()
        if sample.sample_rate != SAMPLE_RATE:
            sound = resample(sound, sample.sample_rate, SAMPLE_RATE)
        marked = Marked(expected.text, expected.spans, expected.transcripts, expected.right, language)
        return _Task(self._windows(sound), language, marked, self._spelled(marked))

    def _spelled(self, marked: Marked) -> dict[str, tuple[str, ...]]:
        if not marked.spans and not any(marked.transcripts):
            return {}
        if not self.scores_readings:
            return dict.fromkeys(candidate_readings(marked, self.lexicon), ())
        return spell(marked, self.script, self.lexicon)

    def _windows(self, sound: Float[Tensor, " time"]) -> list[Float[Tensor, " _"]]:
        longest = int(self.max_seconds * SAMPLE_RATE)
        if len(sound) > longest and self.long_audio == "fail":
            raise ValueError(
                f"the recording lasts {len(sound) / SAMPLE_RATE:.1f} s, and the recogniser hears {self.max_seconds:g} "
                "s at once: cut it, or set model.judge.init_args.long_audio: windows"
            )
        return quiet_cuts(sound, longest)

    def _verdict(self, task: _Task, heard: Sequence[Recognition], silent: Mapping[str, float]) -> Verdict:
        between = "" if task.language in _WITHOUT_SPACES else " "
        transcript = between.join(filter(None, (one.transcript for one in heard)))
        texts = reference_texts(task.marked, task.spelled, self.script, self.lexicon)
        rates = {reading: self._rate(target_texts, transcript) for reading, target_texts in texts.items()}
        nearest = min(rates.values(), default=math.inf)
        if not task.spelled:
            return Verdict(transcript, Reading.UNMARKED, nearest, nearest)
        right = [rate for reading, rate in rates.items() if reading in task.marked.right]
        choice = self._choice(task, heard[0], silent)
        reading = Reading.ABSTAINED
        if nearest > self.rules.max_cer:
            reading = Reading.NEITHER
        elif choice.reading:
            reading = Reading.RIGHT if choice.reading in task.marked.right else Reading.WRONG
        return Verdict(transcript, reading, min(right or [nearest]), nearest, choice.margin, readings=choice.scores)

    def _rate(self, target_texts: Sequence[str], transcript: str) -> float:
        """Error rate against the nearest text: of characters, or of phonemes or syllables where that is written."""
        if not target_texts:
            return math.inf
        if self.script in (Script.WRITTEN, Script.KANA):
            return min(cer(text, transcript) for text in target_texts)
        return min(error_rate(self.reference(text).split(), transcript.split()) for text in target_texts)

    def reference(self, text: str) -> str:
        """A text as the recogniser would write it."""
        return text

    def _choice(self, task: _Task, heard: Recognition, silent: Mapping[str, float]) -> Choice:
        scores = dict(zip(task.texts, heard.scores, strict=True))
        asked = {reading: [text for text in texts if text in scores] for reading, texts in task.spelled.items()}
        return choose(
            {reading: [scores[text] for text in texts] for reading, texts in asked.items()},
            task.marked.right,
            self.rules.min_margin,
            {reading: [silent[text] for text in texts] for reading, texts in asked.items()} if silent else None,
        )

    def _of_silence(self, tasks: Sequence[_Task]) -> list[Mapping[str, float]]:
        """Scores of each task's candidates for a silence as long as its utterance; empty where none are taken away."""
        subtract = self.expects if self.rules.subtract_unheard is None else self.rules.subtract_unheard
        if not subtract:
            return [{}] * len(tasks)
        found: list[Mapping[str, float]] = []
        for task in tasks:
            length = 0 if self.expects else len(task.windows[0])  # Whisper always hears 30 s
            known = self._unheard.setdefault((task.language, length), {})
            missing = [text for text in task.texts if text not in known]
            if missing:
                (heard,) = self.hear([torch.zeros(max(length, 1), device="cpu")], task.language, [missing])
                known |= dict(zip(missing, heard.scores, strict=True))
            found.append({text: known[text] for text in task.texts})
        if not self.expects:
            self._unheard.clear()
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Without what is loaded outside PyTorch; it is loaded again where it is used."""
        return {**self.__dict__, "_unheard": {}}


def plain_language(code: str) -> str:
    """A language's code without script and region, by its two letters if it has them.

    >>> plain_language("ja-JP"), plain_language("cmn-Hans")
    ('ja', 'zh')
    """
    first = code.replace("_", "-").partition("-")[0].lower()
    return _NAMES.get(first, first)


def quiet_cuts(sound: Float[Tensor, " time"], longest: int) -> list[Float[Tensor, " _"]]:
    """A sound in pieces no longer than ``longest``, each cut at the quietest moment of its last sixth.

    Args:
        sound: the samples.
        longest: largest number of samples of a piece.
    """
    pieces = []
    while len(sound) > longest:
        tail = sound[longest - longest // 6 : longest]
        # :: (time,) -> (moments, _QUIET) -> (moments,)
        moments = tail[: len(tail) // _QUIET * _QUIET].reshape(-1, _QUIET).square().mean(-1)
        cut = longest - longest // 6 + int(moments.argmin()) * _QUIET + _QUIET // 2 if len(moments) else longest
        pieces.append(sound[:cut])
        sound = sound[cut:]
    return [*pieces, sound]
