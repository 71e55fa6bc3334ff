# SPDX-License-Identifier: Apache-2.0
"""How well a judge tells readings apart, measured where the reading is known.

A judge is asked about sound of which it is known how the marked word is said: recordings with their reading, or the
policy speaking the sentence with the reading written out. What it answers is its own accuracy. Without it an accuracy
of a policy says nothing: a judge that guesses finds every policy half right.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tts_align.evaluation.columns import wrong_types
from tts_align.evaluation.judges.base import Judge, Reading
from tts_align.evaluation.statistics.intervals import wilson
from tts_align.evaluation.table import accuracy_line
from tts_align.utils.files import write_json
from tts_align.utils.readers import read_json_object
from tts_align.utils.shards import digest

log = logging.getLogger(__name__)
CALIBRATION = "judge_accuracy.json"
"""Where a run keeps the accuracy of its judge."""


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
        return accuracy_line(self.summary())

    def to_row(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**dataclasses.asdict(self), "accuracy": self.summary()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Calibration:
        """Read what :meth:`to_row` wrote.

        Raises:
            ValueError: a part is missing, or holds something else than it should.
        """
        if faults := list(_faults(row)):
            raise ValueError("; ".join(faults))
        words = {name: WordCount(**one) for name, one in row["words"].items()}
        return cls(row["judge"], row["source"], words, row["failed"], row["unspoken"])


_COUNTS = tuple(one.name for one in dataclasses.fields(WordCount))


def _faults(row: Mapping[str, Any]) -> Iterator[str]:
    """A phrase for each part of a calibration that is missing, or holds something else than it should."""
    yield from (f"{one.name}: is missing" for one in dataclasses.fields(Calibration) if one.name not in row)
    yield from wrong_types(row, {"source": (str,), "failed": (int,), "unspoken": (int,)})
    judge, words = row.get("judge", {}), row.get("words", {})
    yield from (
        f"{name}: expected names and values, got {one!r:.60}"
        for name, one in (("judge", judge), ("words", words))
        if not isinstance(one, dict)
    )
    if isinstance(judge, dict):
        yield from (f"judge.{fault}" for fault in wrong_types(judge, dict.fromkeys(judge, (str,))))
    for word, counts in words.items() if isinstance(words, dict) else ():
        if not isinstance(counts, dict):
            yield f"words.{word}: expected names and values, got {counts!r:.60}"
            continue
        yield from (f"words.{word}.{fault}" for fault in wrong_types(counts, dict.fromkeys(counts, (int,))))
        for name, count in counts.items():
            if name not in _COUNTS:
                yield f"words.{word}.{name}: expected one of {', '.join(_COUNTS)}"
            elif type(count) is int and count < 0:
                yield f"words.{word}.{name}: expected at least 0, got {count}"


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
        row = read_json_object(path)
    except FileNotFoundError:
        return None
    try:
        return Calibration.from_row(row)
    except ValueError as error:
        raise ValueError(
            f"{path}: not a judge's accuracy ({error}): measure it with `tts-align judge --calibrate`"
        ) from None


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
