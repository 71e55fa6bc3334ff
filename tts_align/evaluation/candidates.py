# SPDX-License-Identifier: Apache-2.0
"""Candidates: utterances of sentences, as ``sample`` draws them and ``judge`` hears them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tts_align.data.columns import read_codes
from tts_align.data.labels import read_label
from tts_align.data.records import Row, Span
from tts_align.evaluation.columns import are_numbers, wrong_types
from tts_align.evaluation.judges.base import Reading, Verdict
from tts_align.evaluation.prompts import SentencePrompt
from tts_align.utils.assets import resolve
from tts_align.utils.files import read_json_lines


@dataclass(frozen=True)
class SpokenPiece:
    """A part of an utterance that was spoken by itself.

    Args:
        text: what the model read.
        length: how many of the utterance's speech tokens are its own.
    """

    text: str
    length: int


@dataclass(frozen=True)
class Candidate:
    """One utterance of a sentence.

    Args:
        prompt: the sentence.
        speaker: whose voice was asked for.
        sample: number of the utterance among those of its sentence and voice.
        seed: what it was drawn with.
        speech: speech tokens without end-of-speech.
        finished: whether end-of-speech was sampled.
        verdict: what the judge says; ``None`` before it has listened.
        error: why there is no verdict although the judge was asked; empty otherwise.
        audio: path of its recording, relative to the file of candidates; empty when none was written.
        label: a person's thumb, if the file has one.
        measures: numbers of measures, such as the similarity of the voice, by name.
        pieces: what was spoken one after the other, if that is not the text as a whole.
    """

    prompt: SentencePrompt
    speaker: str
    sample: int
    seed: int
    speech: tuple[int, ...] = field(repr=False)
    finished: bool
    verdict: Verdict | None = None
    error: str = ""
    audio: str = ""
    label: bool | None = None
    measures: Mapping[str, float] = field(default_factory=dict)
    pieces: tuple[SpokenPiece, ...] = ()

    @property
    def id(self) -> str:
        """Unique name: sentence, voice and number."""
        return candidate_id(self.prompt.id, self.speaker, self.sample)

    def to_row(self) -> dict[str, Any]:
        """One line of JSON; a number that is missing is left out."""
        row = {"id": self.id, "sentence": self.prompt.id} | self.prompt.to_row() | {"id": self.id}
        row |= {"speaker": self.speaker, "sample": self.sample, "seed": self.seed, "finished": self.finished}
        row["speech"] = list(self.speech)
        if self.pieces:
            row["pieces"] = [dataclasses.asdict(piece) for piece in self.pieces]
        if self.verdict is not None:
            verdict = dataclasses.asdict(self.verdict)
            row |= {name: value for name, value in verdict.items() if _is_known(value)}
        row |= {"measures": dict(self.measures)} if self.measures else {}
        later = {"audio": self.audio, "error": self.error}
        row |= {name: value for name, value in later.items() if value}
        return row if self.label is None else row | {"label": self.label}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], desirable_stars: float | None = None) -> Candidate:
        """Read what :meth:`to_row` wrote; other columns are ignored.

        Args:
            row: the columns.
            desirable_stars: see :func:`~tts_align.data.labels.read_label`.
        """
        needed = ("sentence", "speaker", "sample", "seed", "speech", "finished")
        if missing := [name for name in needed if name not in row]:
            raise ValueError(f"column {missing[0]!r} is missing: was this file written by `tts-align sample`?")
        heard = ("transcript", "cer", "nearest_cer") if row.get("reading") is not None else ()
        if missing := [name for name in heard if name not in row]:
            raise ValueError(
                f"column {missing[0]!r} is missing beside 'reading': was this written by `tts-align judge`?"
            )
        if faults := list(_wrong_types(row)):
            raise ValueError("; ".join(faults))
        return cls(
            prompt=SentencePrompt.from_row({**row, "id": row["sentence"], "speaker": ""}),
            speaker=row["speaker"],
            sample=row["sample"],
            seed=row["seed"],
            speech=tuple(row["speech"]),
            finished=row["finished"],
            verdict=_verdict(row) if row.get("reading") is not None else None,
            error=row.get("error", ""),
            audio=row.get("audio") or "",
            label=read_label(row.get("label"), desirable_stars),
            measures=row.get("measures") or {},
            pieces=tuple(SpokenPiece(**piece) for piece in row.get("pieces") or ()),
        )

    @property
    def cut(self) -> list[tuple[int, ...]]:
        """Speech tokens of each piece; one for an utterance that was spoken as a whole."""
        if not self.pieces:
            return [self.speech]
        ends = list(itertools.accumulate(piece.length for piece in self.pieces))
        return [self.speech[end - piece.length : end] for piece, end in zip(self.pieces, ends, strict=True)]

    def moved(self, old: Path, new: Path) -> Candidate:
        """The same with the path of its recording starting from another folder."""
        if not self.audio or Path(self.audio).is_absolute():
            return self
        path = Path(os.path.relpath(Path(old, self.audio).absolute(), new.absolute())).as_posix()
        return dataclasses.replace(self, audio=path)

    def to_rows(self, desirable: bool | None) -> list[Row]:
        """Rows of a manifest, with a label: one, or one for each piece that was spoken by itself.

        A piece's row has the text that the model read. Of an undesirable utterance in several pieces with a marked word
        only the piece that holds it is kept: the others may well be right.
        """
        whole = self.to_manifest(desirable)
        if not self.pieces:
            return [whole]
        many = len(self.pieces) > 1
        rows = []
        for number, (piece, speech, spans) in enumerate(zip(self.pieces, self.cut, self._marks(), strict=True)):
            if speech:
                own: dict[str, Any] = (
                    {"audio": "", "transcript": "", "id": f"{whole.id}-piece-{number}"} if many else {}
                )
                rows.append(dataclasses.replace(whole, text=piece.text, speech=speech, spans=spans, **own))
        marked = [row for row in rows if row.spans]
        return marked if marked and many and desirable is False else rows

    def _marks(self) -> list[tuple[Span, ...]]:
        """The marked words of each piece, found again by counting how often they occur before."""
        found: list[list[Span]] = [[] for _ in self.pieces]
        for span in self.prompt.spans:
            word = self.prompt.text[span.start : span.end]
            before = self.prompt.text[: span.start].count(word)
            if sum(piece.text.count(word) for piece in self.pieces) != self.prompt.text.count(word):
                continue  # cleaning the text changed the word
            for marks, piece in zip(found, self.pieces, strict=True):
                if before < piece.text.count(word):
                    start = -1
                    for _ in range(before + 1):
                        start = piece.text.index(word, start + 1)
                    marks.append(dataclasses.replace(span, start=start, end=start + len(word)))
                    break
                before -= piece.text.count(word)
        return [tuple(marks) for marks in found]

    def to_manifest(self, desirable: bool | None) -> Row:
        """The row of a manifest, with a label."""
        scores: dict[str, float] = {"finished": float(self.finished), **self.measures}
        notes: dict[str, str] = {"sentence": self.prompt.id}
        if self.verdict is not None:
            numbers = {name: getattr(self.verdict, name) for name in ("cer", "nearest_cer", "margin")}
            scores |= {name: value for name, value in numbers.items() if math.isfinite(value)}
            if self.verdict.target_share is not None:
                start, end = self.verdict.target_share
                scores |= {"target_start": start, "target_end": end}
            notes |= {"reading": str(self.verdict.reading), "transcript": self.verdict.transcript}
        return Row(
            id=self.id,
            text=self.prompt.text,
            language=self.prompt.language,
            speaker=self.speaker,
            speech=self.speech,
            audio=self.audio,
            desirable=desirable,
            spans=self.prompt.spans,
            instruct=self.prompt.instruct,
            scores=scores,
            notes=notes,
            transcript=self.prompt.target_text,
        )


_TYPES: Mapping[str, tuple[type, ...]] = {
    "sentence": (str,),
    "speaker": (str,),
    "sample": (int,),
    "seed": (int,),
    "finished": (bool,),
    "error": (str,),
    "audio": (str,),
    "transcript": (str,),
    "reading": (str,),
    "cer": (int, float),
    "nearest_cer": (int, float),
    "margin": (int, float),
}
"""What each column holds; a number in quotes, or a fraction where a whole number belongs, is a fault and no number."""


def _wrong_types(row: Mapping[str, Any]) -> Iterator[str]:
    """A phrase for each column that holds something else than it should."""
    yield from wrong_types(row, _TYPES)
    for name in ("sample", "seed", "cer", "nearest_cer"):
        if type(row.get(name)) in (int, float) and not row[name] >= 0:
            yield f"{name}: expected at least 0, got {row[name]}"
    for name in ("cer", "nearest_cer", "margin"):
        if type(row.get(name)) is float and math.isinf(row[name]):
            yield f"{name}: expected a finite number, got {row[name]}"
    for name in ("measures", "readings"):
        if (numbers := row.get(name)) is not None and not are_numbers(numbers):
            yield f"{name}: expected a finite number for each name, got {numbers!r:.60}"
    if (pieces := row.get("pieces")) and not _are_pieces(pieces, row["speech"]):
        yield (
            f"pieces: expected a list of {{text, length}} that are the speech's {_size(row['speech'])} tokens, "
            f"got {pieces!r:.60}"
        )
    _, fault = read_codes(row["speech"], None) if row["speech"] != [] else ((), None)
    if fault is not None:
        yield f"speech: {fault}"
    share = row.get("target_share")
    if share is not None and not (
        isinstance(share, list | tuple)
        and len(share) == 2
        and all(type(one) in (int, float) and 0 <= one <= 1 for one in share)
    ):
        yield f"target_share: expected two numbers from 0 to 1, got {share!r:.60}"


def _are_pieces(given: Any, speech: Any) -> bool:
    """Whether this is a list of pieces that together are the utterance."""
    if not isinstance(given, list | tuple) or not all(isinstance(one, dict) for one in given):
        return False
    if not all(
        one.keys() == {"text", "length"} and isinstance(one["text"], str) and type(one["length"]) is int
        for one in given
    ):
        return False
    return all(one["length"] >= 0 for one in given) and sum(one["length"] for one in given) == _size(speech)


def _size(speech: Any) -> int:
    return len(speech) if isinstance(speech, list | tuple) else -1


def candidate_id(sentence: str, speaker: str, sample: int) -> str:
    """Name of an utterance."""
    return f"{sentence}-{speaker}-{sample}" if speaker else f"{sentence}-{sample}"


def candidate_seed(seed: int, sentence: str, speaker: str, sample: int) -> int:
    """Seed of an utterance, made of nothing but its name and the global seed.

    Example:
        >>> candidate_seed(0, "a", "sakura", 1) == candidate_seed(0, "a", "sakura", 1) < 2**48
        True
    """
    name = "\0".join((str(seed), sentence, speaker, str(sample)))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big")


def read_candidates(path: str | Path, desirable_stars: float | None = None) -> list[Candidate]:
    """Read what ``sample`` or ``judge`` wrote.

    Args:
        path: the file.
        desirable_stars: number of stars from which on an utterance is desirable, if people gave stars.

    Raises:
        ValueError: with file and line of the first fault, or of an id that appears twice.
    """
    found: dict[str, Candidate] = {}
    for number, row in read_json_lines(resolve(path)):
        try:
            candidate = Candidate.from_row(row, desirable_stars)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if candidate.id in found:
            raise ValueError(f"{path}:{number}: utterance {candidate.id!r} appears twice")
        found[candidate.id] = candidate
    return list(found.values())


def _is_known(value: Any) -> bool:
    return value is not None and value != {} and not (isinstance(value, float) and math.isnan(value))


def _verdict(row: Mapping[str, Any]) -> Verdict:
    share = row.get("target_share")
    return Verdict(
        transcript=row["transcript"],
        reading=Reading(row["reading"]),
        cer=row["cer"],
        nearest_cer=row["nearest_cer"],
        margin=row.get("margin", math.nan),
        target_share=None if share is None else (share[0], share[1]),
        readings=row.get("readings") or {},
    )
