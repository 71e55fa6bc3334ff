# SPDX-License-Identifier: Apache-2.0
"""Turn judged candidates into desirable and undesirable rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tts_align.data.manifest import write_manifest
from tts_align.data.records import Row
from tts_align.evaluation.candidates import Candidate, read_candidates
from tts_align.evaluation.judges.base import Reading
from tts_align.utils.assets import resolve
from tts_align.utils.files import check_not_source, remove_leftovers

Keep = Literal["best", "all"]


@dataclass(frozen=True)
class LabelRule:
    """Which candidates become rows.

    Desirable is what has the right reading, best first by character error rate; undesirable what has the wrong reading,
    worst first. A sentence without a marked word has no wrong reading: there ``max_cer`` alone divides good from bad.

    Args:
        keep: rows to keep: best (the best ``desirable`` and the worst ``undesirable`` of each sentence and voice) or
            all.
        desirable: desirable rows to keep of each sentence and voice, those with the lowest error rates.
        undesirable: undesirable rows to keep of each sentence and voice, those with the highest error rates.
        max_cer: highest character error rate of a desirable row.
        neither: what to do with an utterance that says neither reading, or was cut by the length limit: drop it, or
            count it as undesirable.
    """

    keep: Keep = "best"
    desirable: int = 1
    undesirable: int = 1
    max_cer: float = 0.1
    neither: Literal["drop", "undesirable"] = "drop"

    def __post_init__(self) -> None:
        """Refuse rules that keep nothing, or that have no effect."""
        faults = []
        if self.desirable < 0 or self.undesirable < 0 or self.desirable + self.undesirable == 0:
            faults.append(f"desirable and undesirable must keep something, got {self.desirable} and {self.undesirable}")
        if self.max_cer < 0:
            faults.append(f"max_cer must not be negative, got {self.max_cer}")
        if self.keep == "all" and (self.desirable, self.undesirable) != (1, 1):
            faults.append("desirable and undesirable have no effect with keep: all; leave them out")
        if faults:
            raise ValueError("; ".join(faults))

    def side(self, candidate: Candidate) -> bool | None:
        """Whether a candidate is desirable, undesirable (``False``), or neither."""
        verdict = candidate.verdict
        if verdict is None:
            return None
        if verdict.reading is Reading.WRONG:
            return False
        if verdict.reading is Reading.NEITHER or not candidate.finished:
            return False if self.neither == "undesirable" else None
        if verdict.cer <= self.max_cer:
            return True
        return False if verdict.reading is Reading.UNMARKED else None


@dataclass(frozen=True)
class LabelCounts:
    """What became of the candidates.

    Args:
        candidates: how many there were.
        failed: those that the judge could not judge.
        readings: how many of each reading.
        desirable: rows kept.
        undesirable: rows kept.
        sentences: sentences in a voice that have a row.
        one_sided: those of them with rows of one kind only.
        pairs: pairs that can be formed, each row used once.
    """

    candidates: int
    failed: int
    readings: dict[str, int]
    desirable: int
    undesirable: int
    sentences: int
    one_sided: int
    pairs: int

    def __str__(self) -> str:
        said = ", ".join(f"{count} {reading}" for reading, count in sorted(self.readings.items()))
        share = f"{self.one_sided / self.sentences:.0%}" if self.sentences else "none"
        lines = {
            "candidates": f"{self.candidates}: {said}" + (f", {self.failed} not judged" if self.failed else ""),
            "desirable": f"{self.desirable} rows",
            "undesirable": f"{self.undesirable} rows",
            "pairs": f"{self.pairs} can be formed",
            "one-sided": f"{share} of {self.sentences} sentences in a voice have rows of one kind only",
        }
        return "\n".join(f"{name:12}{line}" for name, line in lines.items())


def choose(candidates: Iterable[Candidate], rule: LabelRule) -> list[tuple[Candidate, bool]]:
    """Candidates with their labels, in the order in which they came; a person's label stands above the rule."""
    groups: defaultdict[tuple[str, str, bool], list[Candidate]] = defaultdict(list)
    every = list(candidates)
    chosen: dict[str, bool] = {one.id: one.label for one in every if one.label is not None and one.speech}
    for candidate in every:
        desirable = rule.side(candidate) if candidate.label is None else None
        if desirable is not None and candidate.speech:
            groups[candidate.prompt.id, candidate.speaker, desirable].append(candidate)
    for (_, _, desirable), members in groups.items():
        ranked = sorted(members, key=lambda one: _cer(one) if desirable else -_cer(one))
        limit = {"best": rule.desirable if desirable else rule.undesirable, "all": len(ranked)}[rule.keep]
        chosen |= dict.fromkeys((one.id for one in ranked[:limit]), desirable)
    return [(candidate, chosen[candidate.id]) for candidate in every if candidate.id in chosen]


def _cer(candidate: Candidate) -> float:
    assert candidate.verdict is not None
    return candidate.verdict.cer


def count(candidates: Sequence[Candidate], labelled: Sequence[tuple[Candidate, bool]]) -> LabelCounts:
    """Count what became of the candidates."""
    sides: defaultdict[tuple[str, str], Counter[bool]] = defaultdict(Counter)
    for candidate, desirable in labelled:
        sides[candidate.prompt.id, candidate.speaker][desirable] += 1
    pairs = [min(both[True], both[False]) for both in sides.values()]
    return LabelCounts(
        candidates=len(candidates),
        failed=sum(candidate.verdict is None for candidate in candidates),
        readings=Counter(str(one.verdict.reading) for one in candidates if one.verdict is not None),
        desirable=sum(desirable for _, desirable in labelled),
        undesirable=sum(not desirable for _, desirable in labelled),
        sentences=len(sides),
        one_sided=sum(number == 0 for number in pairs),
        pairs=sum(pairs),
    )


def label(
    judged: str | Path, out: Path, rule: LabelRule | None = None, desirable_stars: float | None = None
) -> LabelCounts:
    """Label judged candidates by a rule, write the manifest, and print how many rows and pairs there are.

    A line with a ``label`` that a person added (true or false, 1 or 0, up or down, good or bad, or stars) keeps it.

    Args:
        judged: JSONL file that ``judge`` wrote, or ``sample`` if people labelled it.
        out: manifest to write, .jsonl or .parquet.
        rule: which candidates become rows.
        desirable_stars: number of stars from which on a row is desirable, where people gave 1 to 5 stars.
    """
    rule = rule or LabelRule()
    check_not_source(out, resolve(judged))
    remove_leftovers(Path(out).parent)
    candidates = read_candidates(judged, desirable_stars)
    if not any(one.verdict or one.error or one.label is not None for one in candidates):
        raise ValueError(f"{judged}: no candidate was judged yet: run `tts-align judge` first")
    labelled = choose(candidates, rule)
    counts = count(candidates, labelled)
    print(counts, flush=True)
    if not labelled:
        raise ValueError(f"{judged}: the rule keeps no row: raise max_cer, or count neither as undesirable")
    start, end = resolve(judged).parent, Path(out).parent
    rows: list[Row] = [candidate.moved(start, end).to_manifest(desirable) for candidate, desirable in labelled]
    write_manifest(rows, out)
    return counts
