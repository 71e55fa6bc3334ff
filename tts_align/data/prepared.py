# SPDX-License-Identifier: Apache-2.0
"""What ``prepare`` leaves behind: the manifest, the rows it refused, and a summary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tts_align.data.manifest import write_manifest
from tts_align.data.parse import Rules, parse
from tts_align.data.records import Fault, Manifest, ManifestError, Row
from tts_align.utils.files import write_json, write_json_lines
from tts_align.utils.messages import say
from tts_align.utils.readers import read_json_object

OnBadRow = Literal["drop", "stop"]
_SHOWN = 10
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
            self.tell(Summary(**summary))
            return True
        if self.overwrite:
            return False
        raise ValueError(f"{self.out} was made with other settings or inputs: choose another file, or overwrite it")

    def tell(self, summary: Summary) -> None:
        """Say what became of the rows."""
        say("\n".join(summary.lines(self.out, self.refused)))


def finish(target: Target, lines: Sequence[Mapping[str, Any]], given: Manifest, made_with: str) -> None:
    """Write the manifest, the refused rows and the summary.

    Args:
        target: where.
        lines: every row, prepared or refused, in order.
        given: the source, whose own faults are refused too.
        made_with: digest of settings and inputs.

    Raises:
        ManifestError: no row is left, or one was refused and none shall be.
    """
    rows = [_row(line["row"]) for line in lines if "row" in line]
    refused = [*_left_out(given.dropped), *(line["refused"] for line in lines if "refused" in line)]
    if refused:
        write_json_lines(target.refused, refused)
    else:
        target.refused.unlink(missing_ok=True)
    if not rows or (refused and target.on_bad_row == "stop"):
        raise ManifestError(given.path, [Fault(line["where"], line["what"]) for line in refused])
    reasons = Counter(_PARTICULARS.sub("…", line["what"]) for line in refused)
    summary = Summary(
        rows=len(rows),
        pairs=sum(row.pair is not None for row in rows),
        without_vector=sum(not row.speaker_vector for row in rows),
        refused=len(refused),
        reasons=dict(reasons.most_common()),
    )
    target.out.unlink(missing_ok=True)  # so that a summary never stands beside another manifest
    write_json(target.summary, {"made_with": made_with, **asdict(summary)})
    write_manifest(rows, target.out)
    target.work.unlink(missing_ok=True)
    target.tell(summary)


def _row(columns: Mapping[str, Any]) -> Row:
    row, faults, _ = parse(columns, "", Rules())
    assert row is not None, faults
    return row


def _left_out(faults: Sequence[Fault]) -> list[dict[str, str]]:
    """Rows of the source that have faults, each once."""
    places: dict[str, list[str]] = {}
    for fault in faults:
        places.setdefault(fault.where, []).append(fault.what)
    return [{"where": where, "what": "; ".join(what)} for where, what in places.items()]
