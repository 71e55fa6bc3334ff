# SPDX-License-Identifier: Apache-2.0
"""Answers of listeners, as the page saved them: checked against the key, file by file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tts_align.evaluation.listening_test.records import (
    ANSWERS_FORMAT,
    OTHER,
    SAME,
    UNCLEAR,
    VERSION,
    Key,
    Kind,
    ListeningTestError,
    Trial,
)
from tts_align.utils.readers import ReadError, parse_json, read_bytes, read_json

_LARGEST_FILE = 50_000_000


@dataclass(frozen=True)
class Answer:
    """What one listener said to one question.

    Args:
        trial: name of the question.
        kind: what was asked.
        value: naturalness from 1 to 5; by how much the second clip *of the key* is better than the first, -3 to 3; name
            of the chosen clip, or "same"; number of the chosen reading, "other" or "unclear".
        clips: names of the clips in the order in which they were heard.
        x: the third clip of an ABX question; empty otherwise.
        repeat: whether it is the second answer to the question.
        milliseconds: from when the question was shown.
        plays: how often each of the clips was heard to its end.
    """

    trial: str
    kind: Kind
    value: int | str
    clips: tuple[str, ...]
    x: str = ""
    repeat: bool = False
    milliseconds: float = 0.0
    plays: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sheet:
    """All answers of one listener.

    Args:
        path: file they came from.
        listener: name or number.
        about: what the listener said about herself: headphones, native.
        answers: to the questions that count, repeated ones and checks too.
    """

    path: Path
    listener: str
    about: Mapping[str, str]
    answers: tuple[Answer, ...] = field(repr=False)

    def of(self, kind: Kind) -> list[Answer]:
        """Answers to the questions of one kind."""
        return [answer for answer in self.answers if answer.kind == kind]


@dataclass(frozen=True)
class Sheets:
    """The answers that can be used, and why others cannot.

    Args:
        sheets: one for each listener.
        faults: file by file.
        notes: what was found and does no harm.
    """

    sheets: tuple[Sheet, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_key(path: Path) -> Key:
    """Read the key that ``listen make`` wrote.

    Raises:
        ListeningTestError: it is not there, or no key.
    """
    path = Path(path)
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise ListeningTestError(f"{path}: there is no such key: `listen make` wrote it beside the page") from None
    except ReadError as error:
        raise ListeningTestError(f"{path}: not the key of a listening test: {error.what}") from None
    try:
        return Key.from_json(found, path.parent.resolve())
    except ListeningTestError as error:
        raise ListeningTestError(f"{path}: {error}") from None


def read_sheets(paths: Iterable[Path], key: Key) -> Sheets:
    """Read files of answers; one that is wrong is named and left out, and the others count.

    A listener who saved twice, first a part and then more, counts once, with the fuller file.

    Args:
        paths: files; of a folder its .json files.
        key: of the test.

    Raises:
        ListeningTestError: there is no file.
    """
    files = list(dict.fromkeys(file for path in paths for file in _files(Path(path))))
    if not files:
        raise ListeningTestError("no file of answers: give those that listeners saved")
    faults, notes = [], []
    found: dict[str, Sheet] = {}
    for path in files:
        try:
            sheet = read_sheet(path, key)
        except ListeningTestError as error:
            faults.append(f"{path}: {error}")
            continue
        other = found.get(sheet.listener)
        if other is None:
            found[sheet.listener] = sheet
        elif _continues(sheet, other) or _continues(other, sheet):
            found[sheet.listener] = max(other, sheet, key=lambda one: len(one.answers))
            notes.append(f"{path}: the same answers of listener {sheet.listener!r} as in {other.path}; they count once")
        else:
            faults.append(
                f"{path}: listener {sheet.listener!r} has answered differently in {other.path}, which counts: "
                "if these are two persons, give one of them another name in the file"
            )
    return Sheets(tuple(found.values()), tuple(faults), tuple(notes))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.glob("*.json") if not file.name.endswith(".key.json"))
    return [path]


def _continues(longer: Sheet, shorter: Sheet) -> bool:
    return longer.answers[: len(shorter.answers)] == shorter.answers


def read_sheet(path: Path, key: Key) -> Sheet:
    """Read one file of answers.

    Raises:
        ListeningTestError: it is not there, not whole, of another test, or not what the page writes.
    """
    try:
        content = read_bytes(path, _LARGEST_FILE)
    except FileNotFoundError:
        raise ListeningTestError("there is no such file") from None
    except ReadError as error:
        raise ListeningTestError(f"not a file of answers: {error.what}") from None
    try:
        found = parse_json(content.decode("utf-8-sig"), path)
    except UnicodeDecodeError:
        raise ListeningTestError("not text in UTF-8: ask the listener to save it again") from None
    except ReadError as error:
        raise ListeningTestError(f"not whole, or not JSON ({error.what}): ask the listener to save it again") from None
    return _sheet(path, found, key)


def _sheet(path: Path, found: Any, key: Key) -> Sheet:
    if not isinstance(found, dict) or found.get("format") != ANSWERS_FORMAT:
        raise ListeningTestError("not a file of answers: expected what the page of a listening test saves")
    if missing := [name for name in ("version", "test", "listener", "answers") if name not in found]:
        raise ListeningTestError(f"{missing[0]!r} is missing")
    if found["version"] != VERSION:
        raise ListeningTestError(f"answers of version {found['version']!r}, expected {VERSION}")
    if found["test"] != key.test:
        raise ListeningTestError(f"answers to another test: {found['test']!r}, the key is that of {key.test!r}")
    listener = found["listener"]
    if not isinstance(listener, str) or not listener.strip():
        raise ListeningTestError(f"listener: expected a name, got {listener!r:.40}")
    if not isinstance(found["answers"], list):
        raise ListeningTestError(f"answers: expected a list, got {type(found['answers']).__name__}")
    about = found.get("about")
    about = {str(name): str(value) for name, value in about.items()} if isinstance(about, dict) else {}
    answers = [_answer(number, one, key) for number, one in enumerate(found["answers"], start=1)]
    counted = [one for one in answers if not key.trials[one.trial].training]
    seen: set[tuple[str, bool]] = set()
    for one in counted:
        if (one.trial, one.repeat) in seen:
            raise ListeningTestError(f"question {one.trial} is answered twice")
        seen.add((one.trial, one.repeat))
    return Sheet(path, listener.strip(), about, tuple(counted))


def _answer(number: int, found: Any, key: Key) -> Answer:
    """One answer, checked.

    Raises:
        ListeningTestError: with its number.
    """
    try:
        return _checked(found, key)
    except ListeningTestError as error:
        raise ListeningTestError(f"answer {number}: {error}") from None


def _checked(found: Any, key: Key) -> Answer:
    if not isinstance(found, dict):
        raise ListeningTestError(f"expected an object, got {type(found).__name__}")
    if missing := [name for name in ("trial", "clips", "answer", "plays", "milliseconds") if name not in found]:
        raise ListeningTestError(f"{missing[0]!r} is missing")
    name = found["trial"]
    if not isinstance(name, str) or name not in key.trials:
        raise ListeningTestError(f"no question of this test is called {name!r:.40}")
    trial = key.trials[name]
    clips = found["clips"]
    if not isinstance(clips, list) or not all(isinstance(one, str) for one in clips):
        raise ListeningTestError(f"clips: expected names, got {clips!r:.60}")
    if sorted(clips) != sorted(trial.clips):
        raise ListeningTestError(f"clips: expected {', '.join(trial.clips)}, got {', '.join(clips):.60}")
    x = found.get("x", "") if trial.kind == "abx" else ""
    if trial.kind == "abx" and x not in trial.clips:
        raise ListeningTestError(f"x: expected one of {', '.join(trial.clips)}, got {x!r:.40}")
    milliseconds, plays = found["milliseconds"], found["plays"]
    if not _is_number(milliseconds) or milliseconds < 0:
        raise ListeningTestError(f"milliseconds: expected a number of at least 0, got {milliseconds!r:.40}")
    heard = list(plays.values()) if isinstance(plays, dict) else []
    if len(heard) != len(clips) + (trial.kind == "abx") or not all(type(one) is int and one >= 1 for one in heard):
        raise ListeningTestError(f"plays: expected that every clip was heard to its end, got {plays!r:.60}")
    value = _value(found["answer"], trial, tuple(clips))
    repeat = found.get("repeat") is True
    return Answer(name, trial.kind, value, tuple(clips), str(x), repeat, float(milliseconds), tuple(heard))


def _value(given: Any, trial: Trial, clips: Sequence[str]) -> int | str:
    """The answer, the same whichever clip came first."""
    low, high = {"nmos": (1, 5), "cmos": (-3, 3)}.get(trial.kind, (0, 0))
    if low != high:
        if type(given) is not int or not low <= given <= high:
            raise ListeningTestError(f"answer: expected a whole number from {low} to {high}, got {given!r:.40}")
        return -given if trial.kind == "cmos" and tuple(clips) != trial.clips else given
    allowed: Sequence[str] = (*trial.clips, SAME) if trial.kind == "ab" else trial.clips
    if trial.kind == "reading":
        allowed = (*map(str, range(len(trial.choices))), OTHER, UNCLEAR)
    if not isinstance(given, str) or given not in allowed:
        raise ListeningTestError(f"answer: expected one of {', '.join(allowed)}, got {given!r:.40}")
    return given


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
