# SPDX-License-Identifier: Apache-2.0
"""Sentences to speak, and how each may be read: what ``sample`` starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tts_align.data import words
from tts_align.data.columns import LANGUAGE
from tts_align.data.records import Span
from tts_align.evaluation.judges.base import Expected
from tts_align.utils.assets import resolve
from tts_align.utils.files import read_json_lines, write_json_lines
from tts_align.utils.lazy import Lazy
from tts_align.utils.lines import line_at, placed_lines, row_of
from tts_align.utils.readers import read_text

_MAX_FAULTS = 20
_AT_HAND = 4096
"""Sentences that are kept in memory at a time of a file that is not."""


@dataclass(frozen=True)
class SentencePrompt:
    """One sentence to speak.

    Args:
        id: unique name.
        text: as written.
        language: BCP 47 code; empty if unknown.
        speaker: the one voice it is for; empty for all of them.
        spans: marked words; readings of the first decide.
        transcripts: reading -> transcript of the whole sentence in the judge's script; one entry under the empty
            reading when no word is marked.
        right: readings that are right; by default those of the first span.
        instruct: how to speak, in words, for models that take an instruction.
    """

    id: str
    text: str
    language: str = ""
    speaker: str = ""
    spans: tuple[Span, ...] = ()
    transcripts: Mapping[str, str] = field(default_factory=dict)
    right: tuple[str, ...] = ()
    instruct: str = ""

    def __post_init__(self) -> None:
        """Fill in what follows from the rest, and check it; every fault is named."""
        if not self.right and self.spans:
            object.__setattr__(self, "right", self.spans[0].right)
        if not self.transcripts and not self.spans:
            object.__setattr__(self, "transcripts", {"": self.text})
        if faults := list(self._faults()):
            raise ValueError("; ".join(faults))

    def _faults(self) -> Iterable[str]:
        if not self.id:
            yield "id is empty"
        if not self.text.strip():
            yield "text is empty"
        for span in self.spans:
            if not 0 <= span.start < span.end <= len(self.text):
                yield f"span {span.start}..{span.end} does not lie in the text of {len(self.text)} characters"
        if unknown := [reading for reading in self.right if self.transcripts and reading not in self.transcripts]:
            yield f"transcripts has no entry for the right reading {unknown[0]!r}, only {sorted(self.transcripts)}"
        if any(self.transcripts) and not self.right:
            yield f"transcripts names readings {sorted(self.transcripts)}, but none is marked right"

    @property
    def expected(self) -> Expected:
        """What a judge compares with."""
        return Expected(self.text, self.transcripts, self.right, self.spans, self.language)

    @property
    def target_text(self) -> str:
        """Transcript of the first right reading, in the judge's script; empty when it is the text itself."""
        found = [self.transcripts[reading] for reading in (*self.right, "") if reading in self.transcripts]
        return found[0] if found and found[0] != self.text else ""

    def to_row(self) -> dict[str, Any]:
        """The columns of a manifest."""
        return {name: value for name, value in asdict(self).items() if value or name in ("id", "text")}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SentencePrompt:
        """Read the columns of a manifest; columns of other commands are ignored."""
        if missing := [name for name in ("id", "text") if not isinstance(row.get(name), str)]:
            raise ValueError(f"column {missing[0]!r} is missing or not text")
        if faults := list(_wrong_types(row)):
            raise ValueError("; ".join(faults))
        known = {name.name: row[name.name] for name in fields(cls) if row.get(name.name)}
        known["spans"] = tuple(_span(span) for span in known.get("spans", ()))
        known["right"] = _words(known.get("right", ()))
        return cls(**known)


def _span(row: Mapping[str, Any]) -> Span:
    try:
        start, end = row["start"], row["end"]
        if type(start) is not int or type(end) is not int:
            raise TypeError("start and end are numbers of characters, and whole")
        return Span(start, end, _words(row["right"]), _words(row.get("wrong") or ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"expected a span with start, end and right, got {row!r:.200} ({error})") from None


def _words(value: Any) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(word, str) for word in words):
        raise TypeError(f"expected words, got {value!r:.60}")
    return words


def _wrong_types(row: Mapping[str, Any]) -> Iterator[str]:
    """A phrase for each column that holds something else than it should."""
    for name in ("language", "speaker", "instruct"):
        if not isinstance(row.get(name) or "", str):
            yield f"{name}: expected text, got {row[name]!r:.60}"
    language = row.get("language")
    if isinstance(language, str) and language and not LANGUAGE.fullmatch(language):
        yield f"language: expected a code such as ja, en-US or zh-Hant, got {language!r:.60}"
    transcripts = row.get("transcripts") or {}
    if not isinstance(transcripts, dict) or not all(isinstance(value, str) for value in transcripts.values()):
        yield f"transcripts: expected a transcript for each reading, got {transcripts!r:.60}"
    spans = row.get("spans") or []
    if not isinstance(spans, list | tuple) or not all(isinstance(span, dict) for span in spans):
        yield f"spans: expected a list of {{start, end, right, wrong}}, got {spans!r:.60}"


def read_prompts(path: str | Path) -> list[SentencePrompt]:
    """Read sentences: a JSONL file, or a plain text file (``.txt``) with one sentence per line.

    A sentence of a text file is named after its line, ``line-1`` and so on; blank lines are left out.

    Args:
        path: the file; ``demo:symbolic/test.jsonl`` names an embedded one, ``words:ja/test_words`` a split of the
            benchmark of ambiguous words.

    Raises:
        ValueError: with file and line of every fault, twenty at most.
    """
    return [prompt for _, prompt in _checked(path, _rows(path))]


def stream_prompts(path: str | Path) -> Sequence[SentencePrompt]:
    """The same sentences, checked at once, but those of a JSONL file stay in it and are read when they are asked for.

    Args:
        path: see :func:`read_prompts`.

    Raises:
        ValueError: with file and line of every fault, twenty at most.
    """
    place = None if str(path).startswith(words.PREFIX) else resolve(path)
    if place is None or place.suffix == ".txt":
        return read_prompts(path)
    offsets: dict[int, int] = {}

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, offset, content in placed_lines(place):
            offsets[number] = offset
            yield number, row_of(content, f"{path}:{number}")

    for _ in _checked(path, rows()):
        pass
    places = np.fromiter(offsets.values(), np.int64, len(offsets))

    @lru_cache(_AT_HAND)
    def read(number: int) -> SentencePrompt:
        return SentencePrompt.from_row(row_of(line_at(place, int(places[number])), path))

    return Lazy(len(places), read)


def _checked(path: str | Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, SentencePrompt]]:
    """Number of the line and sentence of each row; raises at the end if there were faults."""
    lines: dict[str, int] = {}
    faults: list[str] = []
    count = 0
    for number, row in rows:
        try:
            prompt = SentencePrompt.from_row(row)
            if prompt.id in lines:
                raise ValueError(f"id {prompt.id!r} is taken by line {lines[prompt.id]}")
        except (ValueError, TypeError) as error:
            count += 1
            if count <= _MAX_FAULTS:
                faults.append(f"{path}:{number}: {error}")
            continue
        lines[prompt.id] = number
        yield number, prompt
    if not lines and not faults:
        raise ValueError(f"{path}: holds no sentence")
    if faults:
        more = [f"and {count - _MAX_FAULTS} more"] if count > _MAX_FAULTS else []
        raise ValueError("\n".join(faults + more))


def _rows(path: str | Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Line number and columns of each sentence."""
    if str(path).startswith(words.PREFIX):
        return words.named(str(path))
    place = resolve(path)
    return _text_lines(place) if place.suffix == ".txt" else read_json_lines(place)


def _text_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and sentence of each line that is not blank."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            yield number, {"id": f"line-{number}", "text": line.strip()}


def write_prompts(path: Path, prompts: Iterable[SentencePrompt]) -> int:
    """Write a JSONL file of sentences, atomically; return how many."""
    return write_json_lines(path, (prompt.to_row() for prompt in prompts))
