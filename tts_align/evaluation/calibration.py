# SPDX-License-Identifier: Apache-2.0
"""How well a judge tells readings apart, measured where the reading is known.

A judge is asked about sound of which it is known how the marked word is said: recordings with their reading, or the
policy speaking the sentence with the reading written out. What it answers is its own accuracy. Without it an accuracy
of a policy says nothing: a judge that guesses finds every policy half right.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.evaluation.listening import raise_if_memory_is_exhausted
from tts_align.evaluation.prompts import SentencePrompt
from tts_align.evaluation.readings.lexicon import Lexicon
from tts_align.evaluation.readings.spelling import Marked, Script, spell
from tts_align.evaluation.statistics.intervals import wilson
from tts_align.utils.audio import load_audio
from tts_align.utils.files import read_json_lines, write_json
from tts_align.utils.shards import digest

log = logging.getLogger(__name__)
CALIBRATION = "judge_accuracy.json"
"""Where a run keeps the accuracy of its judge."""
RECORDINGS = "recordings.jsonl"
"""The list of recordings in a folder of them."""
_RATE = 16000


class UnreliableJudgeError(ValueError):
    """The judge tells readings apart less often than it must, or nobody knows how often."""


@dataclass(frozen=True)
class WordCount:
    """What became of the utterances of one reading of one word.

    Args:
        right: heard as it was said.
        wrong: heard as another reading, or as none.
        abstained: left open.
    """

    right: int = 0
    wrong: int = 0
    abstained: int = 0


@dataclass(frozen=True)
class Calibration:
    """How often a judge hears the reading that was said.

    Args:
        judge: its identity.
        source: what spoke: recordings or policy.
        words: reading of a marked word, as ``辛い/からい`` -> what became of its utterances.
        failed: utterances that could not be judged.
        unspoken: readings that could not be written out, so that nobody spoke them.
    """

    judge: Mapping[str, str]
    source: str
    words: Mapping[str, WordCount] = field(default_factory=dict)
    failed: int = 0
    unspoken: int = 0

    @property
    def right(self) -> int:
        """Utterances heard as they were said."""
        return sum(one.right for one in self.words.values())

    @property
    def judged(self) -> int:
        """Utterances of which the judge did not abstain."""
        return self.right + sum(one.wrong for one in self.words.values())

    @property
    def abstained(self) -> int:
        """Utterances whose reading it left open."""
        return sum(one.abstained for one in self.words.values())

    def summary(self) -> dict[str, Any]:
        """The numbers, as they stand beside every accuracy: with Wilson's interval over utterances."""
        interval = wilson(self.right, self.judged) if self.judged else None
        return {
            "value": interval.value if interval else None,
            "low": interval.low if interval else None,
            "high": interval.high if interval else None,
            "n": self.judged,
            "abstained": self.abstained,
            "failed": self.failed,
            "unspoken": self.unspoken,
            "source": self.source,
            "judge": digest(sorted(self.judge.items())),
            "model": self.judge.get("model", ""),
        }

    def __str__(self) -> str:
        known = self.summary()
        if known["value"] is None:
            return f"the judge told no reading from another: {self.abstained} left open, {self.failed} not judged"
        counted = f"{known['n']} utterances, {self.abstained} more left open, {self.failed} not judged"
        return f"{known['value']:.1%} [{known['low']:.1%}, {known['high']:.1%}] of {counted} ({self.source})"

    def to_row(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**dataclasses.asdict(self), "accuracy": self.summary()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Calibration:
        """Read what :meth:`to_row` wrote."""
        words = {name: WordCount(**one) for name, one in row["words"].items()}
        return cls(row["judge"], row["source"], words, row["failed"], row["unspoken"])


def is_same_judge(calibration: Calibration, judge: Judge) -> bool:
    """Whether a judge is the one that was measured: the same weights, arguments and code, wherever they lie."""
    ignored = {"model"}  # the name of a folder
    mine = {name: value for name, value in judge.identity().items() if name not in ignored}
    return mine == {name: value for name, value in calibration.judge.items() if name not in ignored}


def read_calibration(path: Path) -> Calibration | None:
    """What :func:`write_calibration` wrote; ``None`` if there is no such file.

    Raises:
        ValueError: the file is no calibration.
    """
    try:
        return Calibration.from_row(json.loads(Path(path).read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a judge's accuracy ({error!r}): measure it with `tts-align judge`") from None


def calibration_of(path: Path, judge: Judge) -> Calibration | None:
    """The stored accuracy of a judge; ``None``, and said, if it is another judge's."""
    found = read_calibration(path)
    if found is None or is_same_judge(found, judge):
        return found
    log.warning("%s is the accuracy of another judge than this recipe's, and does not count", path)
    return None


def accuracy_of(judged: Path) -> Path:
    """Where ``judge`` lays the accuracy of its judge: beside its file."""
    return judged.with_name(f"{judged.name}.{CALIBRATION}")


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a judge's accuracy, whole or not at all."""
    write_json(path, calibration.to_row())


@dataclass(frozen=True)
class KnownUtterance:
    """An utterance whose reading is known.

    Args:
        sample: the sound.
        expected: the sentence; what is right there is what was said.
        word: the marked word as written, for the table.
    """

    sample: SpeechSample
    expected: Expected
    word: str

    @property
    def name(self) -> str:
        """Word and reading."""
        return f"{self.word}/{self.expected.right[0]}"


def is_recorded(path: Path) -> bool:
    """Whether a file or folder lists recordings, and not just sentences."""
    if path.is_dir():
        return True
    return path.suffix == ".jsonl" and any("audio" in row for _, row in read_json_lines(path))


def read_recordings(path: Path) -> list[tuple[SentencePrompt, Path]]:
    """Recordings with marked words; ``right`` of the first span is what is said in the recording.

    Args:
        path: JSONL file with columns ``id``, ``text``, ``spans`` and ``audio`` (relative to the file), or a folder that
            holds such a file by the name ``recordings.jsonl``.

    Raises:
        ValueError: with file and line.
    """
    file = path / RECORDINGS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} is not there: expected a list of recordings with columns id, text, spans and audio")
    found = []
    for number, row in read_json_lines(file):
        try:
            prompt = SentencePrompt.from_row(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}:{number}: {error}") from None
        if not isinstance(row.get("audio"), str):
            raise ValueError(f"{file}:{number}: audio: expected the path of a recording, got {row.get('audio')!r}")
        if not prompt.right:
            raise ValueError(f"{file}:{number}: no marked word: expected spans with right, the reading that is said")
        found.append((prompt, file.parent / row["audio"]))
    if not found:
        raise ValueError(f"{file}: holds no recording")
    return found


def load_known(prompt: SentencePrompt, audio: Path, language: str = "") -> KnownUtterance:
    """A recording with what is said in it.

    Raises:
        AudioError: the recording is missing or unusable.
    """
    sound = load_audio(audio, _RATE)
    expected = dataclasses.replace(prompt.expected, language=prompt.language or language)
    return KnownUtterance(SpeechSample(torch.zeros(0, dtype=torch.long), sound, _RATE), expected, word_of(prompt))


def word_of(prompt: SentencePrompt) -> str:
    """The first marked word as written; without one the readings it is named by."""
    if not prompt.spans:
        return "/".join(prompt.transcripts)
    return prompt.text[prompt.spans[0].start : prompt.spans[0].end]


def written_out(prompt: SentencePrompt, language: str, lexicon: Lexicon) -> list[tuple[SentencePrompt, SentencePrompt]]:
    """A sentence with each reading of its marked word written out, so that a policy can hardly misread it.

    Japanese readings stand in katakana, Mandarin ones as a character of that sound alone, English ones as a word of
    that sound; a lexicon's spellings come before these.

    Args:
        prompt: the sentence.
        language: of a sentence that does not say its own.
        lexicon: of the user.

    Returns:
        For each reading that can be written out, what is spoken, and the original with that reading as the right one.
    """
    code = prompt.language or language
    marked = Marked(prompt.text, prompt.spans, {}, prompt.right, code.partition("-")[0])
    if not prompt.spans:
        return []
    first, pairs = prompt.spans[0], []
    readings = dict.fromkeys([*first.right, *first.wrong])
    for reading, texts in spell(marked, Script.WRITTEN, lexicon).items():
        own = lexicon.spellings(marked.word, reading)
        if not texts or reading not in readings:
            continue
        text = texts[0] if own or marked.language != "ja" else texts[-1]
        # Readings that are equally right are not told apart.
        same = [one for one in (first.right if reading in first.right else ()) if one != reading]
        right = (reading, *same)
        span = dataclasses.replace(first, right=right, wrong=tuple(one for one in readings if one not in right))
        original = dataclasses.replace(
            prompt, id=f"{prompt.id}-{reading}", spans=(span, *prompt.spans[1:]), right=right, language=code
        )
        spoken = dataclasses.replace(original, text=text, spans=(), transcripts={"": text}, right=())
        pairs.append((spoken, original))
    return pairs


def hear(judge: Judge, known: Sequence[KnownUtterance]) -> list[Verdict | str]:
    """Verdicts, or why there is none: a batch that fails is judged one by one.

    Raises:
        Exception: memory is exhausted.
    """
    if not known:
        return []
    try:
        return list(judge.judge([one.sample for one in known], [one.expected for one in known]))
    except Exception as error:
        raise_if_memory_is_exhausted(error)
        if len(known) == 1:
            return [f"{type(error).__name__}: {error}"]
    return [verdict for one in known for verdict in hear(judge, [one])]


def tally(verdicts: Iterable[tuple[str, Reading | None]]) -> tuple[dict[str, WordCount], int]:
    """Counts by word and reading, and how many were not judged.

    Args:
        verdicts: name of word and reading, and what was heard; ``None`` without a verdict.
    """
    words: dict[str, WordCount] = {}
    failed = 0
    for name, heard in verdicts:
        if heard is None:
            failed += 1
            continue
        count = words.get(name, WordCount())
        part = {Reading.RIGHT: "right", Reading.ABSTAINED: "abstained"}.get(heard, "wrong")
        words[name] = dataclasses.replace(count, **{part: getattr(count, part) + 1})
    return dict(sorted(words.items())), failed


def check_reliable(calibration: Calibration | None, least: float, what: str) -> None:
    """Refuse a judge that is known to be worse than it must be.

    Args:
        calibration: its accuracy; ``None`` if it was never measured.
        least: smallest accuracy that will do.
        what: is refused, for the message.

    Raises:
        UnreliableJudgeError: with the numbers.
    """
    if calibration is None:
        return
    value = calibration.summary()["value"]
    if value is None or value < least:
        raise UnreliableJudgeError(
            f"{what}: the judge's own accuracy is {calibration}, at least {least:.0%} is asked for "
            "(min_judge_accuracy). Choose another judge, a wider margin (model.judge.init_args.readings.min_margin) or "
            "words that it can tell apart"
        )
