# SPDX-License-Identifier: Apache-2.0
"""What a listening test is made of: recordings, trials, and the key that says what a listener must not know."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tts_align.data.records import Span

Kind = Literal["nmos", "cmos", "ab", "abx", "reading"]
Design = Literal["full", "latin"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PAIRED: tuple[Kind, ...] = ("cmos", "ab", "abx")
"""Kinds whose trials hold two recordings of one sentence."""
SAME, OTHER, UNCLEAR = "same", "other", "unclear"
"""Answers that name no recording, and no candidate reading."""
KEY_FORMAT, ANSWERS_FORMAT, VERSION = "tts-align listening key", "tts-align listening answers", 1


class ListeningTestError(ValueError):
    """A listening test cannot be made, or its key cannot be read."""


@dataclass(frozen=True)
class Recording:
    """One utterance of one system, as it lies on the disk.

    Args:
        system: who speaks.
        id: of the utterance, the same for all systems.
        sentence: name of the sentence.
        audio: file of the recording.
        text: what should be said; may be empty.
        language: code of the language; may be empty.
        speaker: name of the voice; may be empty.
        speech: speech tokens of the recording, if they are known.
        spans: marked words; the readings of the first may be asked for.
        instruct: how to speak, in words; may be empty.
        transcript: what the text ought to sound like, in a recogniser's script; may be empty.
        reading: what a judge heard of the marked word; empty without one.
    """

    system: str
    id: str
    sentence: str
    audio: Path
    text: str = ""
    language: str = ""
    speaker: str = ""
    speech: tuple[int, ...] = field(default=(), repr=False)
    spans: tuple[Span, ...] = ()
    instruct: str = ""
    transcript: str = ""
    reading: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        """Candidate readings of the marked word, the right ones first; none without a word that is marked."""
        return (*self.spans[0].right, *self.spans[0].wrong) if self.spans else ()


@dataclass(frozen=True)
class Clip:
    """A recording as the page holds it.

    Args:
        recording: where it came from; of a check, what was made unusable, or nothing.
        gain_db: by how much it was turned up, so that all clips are equally loud.
        check: whether it was made to see if a listener listens.
    """

    recording: Recording | None
    gain_db: float = 0.0
    check: bool = False


@dataclass(frozen=True)
class Trial:
    """One question.

    Args:
        kind: what is asked.
        clips: names of the recordings that are heard: one, or two to compare.
        group: number of the sentence: in the design ``latin`` a listener hears one trial of each.
        choices: candidate readings, for the question which one was heard.
        right: those of them that are right.
        expected: answers that show that the listener listens; empty for a question without a known answer.
        training: whether it only teaches how to answer.
    """

    kind: Kind
    clips: tuple[str, ...]
    group: int
    choices: tuple[str, ...] = ()
    right: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    training: bool = False


@dataclass(frozen=True)
class Key:
    """What is behind the names on the page.

    Args:
        test: name of the test, made of everything in it.
        title: as listeners see it.
        systems: who speaks.
        kinds: what is asked, in this order.
        design: whether every listener answers everything (full), or each sentence once (latin).
        sample_rate: of all clips, in Hz.
        loudness_lufs: of all clips, by ITU-R BS.1770.
        repeats: number of questions of each kind that every listener gets twice.
        clips: by their names on the page.
        trials: by their names on the page.
    """

    test: str
    title: str
    systems: tuple[str, ...]
    kinds: tuple[Kind, ...]
    design: Design
    sample_rate: int
    loudness_lufs: float
    repeats: int
    clips: Mapping[str, Clip]
    trials: Mapping[str, Trial]

    def system(self, clip: str) -> str:
        """Who speaks in a clip."""
        recording = self.clips[clip].recording
        assert recording is not None
        return recording.system

    def item(self, trial: str) -> str:
        """The utterance that a question is about."""
        recording = self.clips[self.trials[trial].clips[0]].recording
        assert recording is not None
        return recording.id

    def to_json(self, start: Path) -> dict[str, Any]:
        """As the key file holds it.

        Args:
            start: folder of the key, which the paths of recordings start from.
        """
        return {
            "format": KEY_FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
            "clips": {name: _clip_to_json(clip, start) for name, clip in self.clips.items()},
            "trials": {name: _without_defaults(trial) for name, trial in self.trials.items()},
        }

    @classmethod
    def from_json(cls, found: Any, start: Path) -> Key:
        """Read what :meth:`to_json` made.

        Args:
            found: what the file holds.
            start: folder of the key.

        Raises:
            ListeningTestError: it is no key.
        """
        if not isinstance(found, dict) or found.get("format") != KEY_FORMAT:
            raise ListeningTestError("not the key of a listening test: expected what `tts-align listen make` wrote")
        if found.get("version") != VERSION:
            raise ListeningTestError(f"key of version {found.get('version')!r}, expected {VERSION}")
        try:
            plain = {name: found[name] for name in _PLAIN}
            plain |= {name: tuple(plain[name]) for name in ("systems", "kinds")}
            clips = {name: _clip_from_json(clip, start) for name, clip in found["clips"].items()}
            trials = {name: _trial_from_json(trial) for name, trial in found["trials"].items()}
            return cls(**plain, clips=clips, trials=trials)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ListeningTestError(f"damaged key of a listening test: {type(error).__name__}: {error}") from None


_PLAIN = ("test", "title", "systems", "kinds", "design", "sample_rate", "loudness_lufs", "repeats")


def _without_defaults(record: Any) -> dict[str, Any]:
    """Fields of a record that say something, as JSON has them."""
    return {name: value for name, value in dataclasses.asdict(record).items() if value or name in ("id", "group")}


def _clip_to_json(clip: Clip, start: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"gain_db": round(clip.gain_db, 3)} | ({"check": True} if clip.check else {})
    if clip.recording is None:
        return found
    audio = os.path.relpath(clip.recording.audio, start)
    return found | {"recording": _without_defaults(clip.recording) | {"audio": Path(audio).as_posix()}}


def _clip_from_json(found: Mapping[str, Any], start: Path) -> Clip:
    given = found.get("recording")
    recording = None
    if given is not None:
        spans = tuple(_span(span) for span in given.get("spans", ()))
        speech = tuple(given.get("speech", ()))
        recording = Recording(**{**given, "audio": start / given["audio"], "spans": spans, "speech": speech})
    return Clip(recording, float(found["gain_db"]), bool(found.get("check", False)))


def _span(given: Mapping[str, Any]) -> Span:
    return Span(given["start"], given["end"], *(tuple(given.get(side, ())) for side in ("right", "wrong")))


def _trial_from_json(found: Mapping[str, Any]) -> Trial:
    if found["kind"] not in KINDS:
        raise ValueError(f"kind {found['kind']!r}")
    lists: Sequence[str] = ("clips", "choices", "right", "expected")
    return Trial(**{**found, **{name: tuple(found[name]) for name in lists if name in found}})
