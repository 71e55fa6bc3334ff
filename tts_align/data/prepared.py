# SPDX-License-Identifier: Apache-2.0
"""What ``prepare`` leaves behind: the manifest, the rows it refused, and a summary."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tts_align.data.manifest import write_manifest
from tts_align.data.parse import Rules, parse
from tts_align.data.records import Faults, Manifest, ManifestError, Row
from tts_align.data.refused import Refused
from tts_align.utils.files import write_json, write_json_lines, written_atomically
from tts_align.utils.messages import say
from tts_align.utils.readers import read_json_object

OnBadRow = Literal["drop", "stop"]
_SHOWN = 10
_WRITING = "writing"
"""Key of a summary whose manifest is just being put in its place; holds what that is made with."""
_MOST_REASONS, _OTHERS = 1000, "other reasons"
"""Reasons that are counted each by itself."""
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|(?<!\w)/\S+|\d+(\.\d+)?")
"""Parts of a reason that differ from row to row."""


@dataclass(frozen=True)
class Summary:
    """What became of the rows.

    Args:
        rows: in the manifest.
        pairs: how many of them are pairs.
        without_vector: how many of them have no speaker vector.
        refused: rows left out.
        reasons: how often each reason was given, particulars left out.
    """

    rows: int
    pairs: int
    without_vector: int
    refused: int
    reasons: Mapping[str, int]

    def lines(self, out: Path, named: Path) -> Iterator[str]:
        """What a person reads."""
        pairs = f", {self.pairs} of them pairs" if self.pairs else ""
        lacking = f", {self.without_vector} without a speaker vector" if self.without_vector else ""
        yield f"prepared:     {out} ({_count(self.rows)}{pairs}{lacking})"
        if self.refused:
            yield f"refused:      {named} ({_count(self.refused)})"
            common = Counter(self.reasons).most_common()
            yield from (f"  {count:6}  {reason}" for reason, count in common[:_SHOWN])
            if len(common) > _SHOWN:
                yield f"          and {len(common) - _SHOWN} more reasons"


def _count(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


@dataclass(frozen=True)
class Target:
    """What is written, and how.

    Args:
        out: the manifest.
        overwrite: replace one made with other settings or inputs.
        on_bad_row: what a row that cannot be prepared does.
        desirable_stars: number of stars from which on a row is desirable, for labels that are stars.

    Raises:
        ValueError: the name has no known suffix.
    """

    out: Path
    overwrite: bool = False
    on_bad_row: OnBadRow = "drop"
    desirable_stars: float | None = None

    def __post_init__(self) -> None:
        """Look at the name before hours of work."""
        if self.out.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"out: expected a name that ends in .jsonl or .parquet, got {self.out.name!r}")

    @property
    def work(self) -> Path:
        """Where results lie until the manifest is written."""
        return self.out.with_name(f"{self.out.name}.work")

    @property
    def tables(self) -> Path:
        """Where the rows of a large source lie as a table until the manifest is written."""
        return self.out.with_name(f"{self.out.name}.tables")

    @property
    def refused(self) -> Path:
        """Where refused rows are named."""
        return self.out.with_name(f"{self.out.name}.refused.jsonl")

    @property
    def summary(self) -> Path:
        """What the manifest was made with, and what became of the rows."""
        return self.out.with_name(f"{self.out.name}.summary.json")

    def is_finished(self, made_with: str) -> bool:
        """Whether the manifest is there, made with these settings and inputs; says so.

        Raises:
            ValueError: it was made with others.
        """
        if not self.out.exists():
            return False
        summary = read_json_object(self.summary) if self.summary.exists() else {}
        if summary.pop("made_with", None) == made_with:
            self.work.unlink(missing_ok=True)  # killed at the very end
            self.tell(Summary(**summary))
            return True
        if self.overwrite or summary.get(_WRITING) == made_with:
            return False
        raise ValueError(f"{self.out} was made with other settings or inputs: choose another file, or overwrite it")

    def tell(self, summary: Summary) -> None:
        """Say what became of the rows."""
        say("\n".join(summary.lines(self.out, self.refused)))


def finish(
    target: Target, lines: Callable[[], Iterable[Mapping[str, Any]]], given: Manifest, left_out: Refused, made_with: str
) -> None:
    """Write the manifest, the refused rows and the summary, a row at a time.

    A manifest that is replaced stays until the new one is on the disk whole. Only then the summary stops to speak of
    the old one, and comes last: without it nothing is finished.

    Args:
        target: where.
        lines: gives every row, prepared or refused, in order; called twice.
        given: the source.
        left_out: rows of the source that have faults, which are refused too.
        made_with: digest of settings and inputs.

    Raises:
        ManifestError: no row is left, or one was refused and none shall be.
    """
    tally = _Tally()
    deque(tally.refused(_refused(left_out, lines)), maxlen=0)
    for line in lines():
        tally.add(line)
    if not tally.rows or (tally.faults.total and target.on_bad_row == "stop"):
        _write_refused(target, tally, left_out, lines)
        raise ManifestError(given.path, tally.faults)
    summary = tally.summary()
    with written_atomically(target.out) as scratch:
        write_manifest((_row(line["row"]) for line in lines() if "row" in line), scratch)
        _write_refused(target, tally, left_out, lines)
        write_json(target.summary, {_WRITING: made_with})  # it never stands beside another manifest than its own
    write_json(target.summary, {"made_with": made_with, **asdict(summary)})
    target.work.unlink(missing_ok=True)
    target.tell(summary)


def _write_refused(
    target: Target, tally: _Tally, left_out: Refused, lines: Callable[[], Iterable[Mapping[str, Any]]]
) -> None:
    """Name the refused rows, if there are any."""
    if tally.faults.total:
        write_json_lines(target.refused, _refused(left_out, lines))
    else:
        target.refused.unlink(missing_ok=True)


def _refused(left_out: Refused, lines: Callable[[], Iterable[Mapping[str, Any]]]) -> Iterator[Mapping[str, str]]:
    yield from left_out
    yield from (line["refused"] for line in lines() if "refused" in line)


class _Tally:
    """Counts what became of the rows."""

    def __init__(self) -> None:
        self.rows = self.pairs = self.without_vector = 0
        self.faults = Faults()
        self.reasons: Counter[str] = Counter()

    def refused(self, rows: Iterable[Mapping[str, str]]) -> Iterator[Mapping[str, str]]:
        """Count refused rows on their way."""
        for line in rows:
            self.faults.add(self.faults.total, line["where"], line["what"])
            reason = _PARTICULARS.sub("…", line["what"])
            known = reason in self.reasons or len(self.reasons) < _MOST_REASONS
            self.reasons[reason if known else _OTHERS] += 1
            yield line

    def add(self, line: Mapping[str, Any]) -> None:
        """Count a prepared row."""
        if "row" in line:
            self.rows += 1
            self.pairs += "pair" in line["row"]
            self.without_vector += not line["row"].get("speaker_vector")

    def summary(self) -> Summary:
        """All of it."""
        common = dict(self.reasons.most_common())
        return Summary(self.rows, self.pairs, self.without_vector, self.faults.total, common)


def _row(columns: Mapping[str, Any]) -> Row:
    row, faults, _ = parse(columns, "", Rules())
    assert row is not None, faults
    return row
