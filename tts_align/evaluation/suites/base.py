# SPDX-License-Identifier: Apache-2.0
"""What a test set holds, whatever file it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tts_align.evaluation.prompts import SentencePrompt
from tts_align.evaluation.protocols import Reference
from tts_align.utils.files import json_line, write_json_lines
from tts_align.utils.readers import read_text
from tts_align.utils.shards import digest

_MAX_FAULTS = 20


@dataclass(frozen=True)
class SuiteItem:
    """One utterance to be spoken or scored.

    Args:
        sentence: what a policy is asked to say, and a judge to expect; named as its recording is.
        reference: what a protocol compares with.
        prompt_audio: recording of the voice, or ``None``.
        prompt_text: what is said in it; empty if unknown, or if the voice shall not continue it.
        truth_audio: the sentence spoken by a person, or ``None``.
        where: file and line.
    """

    sentence: SentencePrompt
    reference: Reference
    prompt_audio: Path | None = None
    prompt_text: str = ""
    truth_audio: Path | None = None
    where: str = ""

    @property
    def id(self) -> str:
        """Name of the utterance."""
        return self.sentence.id


@dataclass(frozen=True)
class Suite:
    """A test set.

    Args:
        name: its kind: seed, cv3, jkyb, manifest or sentences.
        path: where it was read from.
        items: utterances, in the file's order.
        protocol: name of the protocol that belongs to it.
    """

    name: str
    path: str
    items: tuple[SuiteItem, ...]
    protocol: str

    @property
    def languages(self) -> list[str]:
        """Languages of its sentences."""
        return sorted({item.reference.language for item in self.items})

    @property
    def has_voices(self) -> bool:
        """Whether its sentences bring recordings of their voices."""
        return any(item.prompt_audio is not None for item in self.items)

    def digest(self) -> str:
        """Changes with the utterances and what a protocol compares them with, and not with where the set lies."""
        return digest([(item.id, item.reference) for item in self.items])

    def write_voices(self, path: Path) -> Path:
        """Write the file of voices that CosyVoice's policy and vocoder read; a file that says the same is left alone.

        Args:
            path: of the file.

        Raises:
            ValueError: a recording is missing, with file and line of each, twenty at most.
        """
        rows: dict[str, dict[str, Any]] = {}
        faults = FirstFaults()
        for item in self.items:
            if item.prompt_audio is None or item.sentence.speaker in rows:
                continue
            if not item.prompt_audio.is_file():
                faults.add(f"{item.where}: there is no recording {item.prompt_audio}")
            text = {"text": item.prompt_text} if item.prompt_text else {}
            rows[item.sentence.speaker] = {
                "speaker": item.sentence.speaker,
                "audio": str(item.prompt_audio.absolute()),
                **text,
            }
        faults.check()
        lines = "".join(map(json_line, rows.values())).encode()
        if not path.is_file() or path.read_bytes() != lines:
            write_json_lines(path, rows.values())
        return path


class VoiceNames:
    """A name for each recording and transcript: the file's stem, with a number if another has it."""

    def __init__(self) -> None:
        self._names: dict[tuple[Path, str], str] = {}
        self._taken: set[str] = set()

    def name(self, audio: Path | None, text: str) -> str:
        """Name of a voice; empty without a recording."""
        if audio is None:
            return ""
        if (audio, text) not in self._names:
            name, number = audio.stem, 1
            while name in self._taken:
                number += 1
                name = f"{audio.stem}-{number}"
            self._taken.add(name)
            self._names[audio, text] = name
        return self._names[audio, text]


class FirstFaults:
    """The first twenty faults, and how many there are: a file of a million wrong lines fills no memory.

    Args:
        lines: faults that are known already.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.lines: list[str] = []
        self.total = 0
        for line in lines:
            self.add(line)

    def add(self, line: str) -> None:
        """Count a fault, and keep it if it is among the first."""
        self.total += 1
        if len(self.lines) < _MAX_FAULTS:
            self.lines.append(line)

    def join(self, later: FirstFaults) -> None:
        """Put others behind these."""
        self.lines += later.lines[: _MAX_FAULTS - len(self.lines)]
        self.total += later.total

    def check(self) -> None:
        """Raise ``ValueError`` if there are any, with each on a line, twenty at most."""
        if self.total:
            more = [f"and {self.total - len(self.lines)} more"] if self.total > len(self.lines) else []
            raise ValueError("\n".join([*self.lines, *more]))


class Faults:
    """What is wrong with the lines of a test set, and which names are taken.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.found = FirstFaults()
        self._lines: dict[str, int] = {}

    def add(self, line: int, what: str) -> None:
        """Note a fault."""
        self.found.add(f"{self.path}:{line}: {what}")

    def check_id(self, line: int, name: str) -> bool:
        """Whether a name is a new one that stays in its folder as a file's name; a fault is noted if not."""
        parts = PurePosixPath(name).parts
        if not name or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            self.add(line, f"the utterance is named {name!r}, expected a name that can be a file's")
        elif name in self._lines:
            self.add(line, f"utterance {name!r} is taken by line {self._lines[name]}")
        else:
            self._lines[name] = line
            return True
        return False

    def finish(self, items: Sequence[SuiteItem]) -> None:
        """Raise if there were faults, or if nothing was found."""
        if not items and not self.found.total:
            self.found.add(f"{self.path}: holds no sentence")
        self.found.check()


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and content of each line that is not blank.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no test set {path}")
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def language_of(text: str) -> str:
    """Chinese if a text has Chinese characters, else English: all that Seed-TTS-Eval knows.

    >>> language_of("我爱 AI"), language_of("AI")
    ('zh', 'en')
    """
    return "zh" if any("\u3400" <= one <= "\u9fff" for one in text) else "en"


def listed(paths: Iterable[Path]) -> str:
    """Some paths for a message."""
    names = sorted(map(str, paths))
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"
