# SPDX-License-Identifier: Apache-2.0
"""Turn judged candidates into desirable and undesirable rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tts_align.data.manifest import write_manifest
from tts_align.data.records import Row
from tts_align.evaluation.calibration import accuracy_of, check_reliable, read_calibration
from tts_align.evaluation.candidates import Candidate, read_candidates
from tts_align.evaluation.columns import are_numbers, wrong_types
from tts_align.evaluation.judges.base import Reading
from tts_align.evaluation.measures.attributes import measured_attributes
from tts_align.evaluation.metrics.functional import normalise
from tts_align.utils.assets import resolve
from tts_align.utils.files import check_not_source, file_name, read_json_lines, remove_leftovers

Keep = Literal["best", "all"]
Otherwise = Literal["drop", "undesirable"]


@dataclass(frozen=True)
class LabelRule:
    """Which candidates become rows.

    Desirable is what has the right reading, best first by character error rate; undesirable what has the wrong reading,
    worst first. A sentence without a marked word has no wrong reading: there ``max_cer`` alone divides good from bad.
    Where the judge abstained there is no row. Length and measures are asked of desirable rows alone.

    Args:
        keep: rows to keep: best (the best ``desirable`` and the worst ``undesirable`` of each sentence and voice) or
            all.
        desirable: desirable rows to keep of each sentence and voice, those with the lowest error rates.
        undesirable: undesirable rows to keep of each sentence and voice, those with the highest error rates.
        max_cer: highest character error rate of a desirable row.
        neither: treatment of an utterance that says neither reading, or was cut by the length limit: drop it, or count
            it as undesirable.
        undesirable_cer: lowest character error rate at which a row is undesirable although no reading in it is wrong;
            between max_cer and this there is no row. By default only sentences without a marked word have such rows,
            above max_cer.
        min_margin: smallest distance in nats between right and wrong reading; closer ones give no row. Judges without
            a margin are not asked.
        min_tokens_per_character: fewest speech tokens per character of the text; shorter speech is hurried or cut.
        max_tokens_per_character: most speech tokens per character of the text; longer speech drags or repeats.
        min_measures: lowest number of each named measure, such as {similarity: 0.7}.
        max_measures: highest number of each named measure, such as {longest_silence: 1.0}.
        outside: treatment of a row that would be desirable but for its length or a measure: drop it, or count it as
            undesirable.
        unfinished: treatment of an utterance that was cut by the length limit; by default the same as with ``neither``.
    """

    keep: Keep = "best"
    desirable: int = 1
    undesirable: int = 1
    max_cer: float = 0.1
    neither: Otherwise = "drop"
    undesirable_cer: float | None = None
    min_margin: float = 0.0
    min_tokens_per_character: float | None = None
    max_tokens_per_character: float | None = None
    min_measures: dict[str, float] = field(default_factory=dict)
    max_measures: dict[str, float] = field(default_factory=dict)
    outside: Otherwise = "drop"
    unfinished: Otherwise | None = None

    def __post_init__(self) -> None:
        """Refuse rules that keep nothing, or that have no effect."""
        faults = []
        if self.desirable < 0 or self.undesirable < 0 or self.desirable + self.undesirable == 0:
            faults.append(f"desirable and undesirable must keep something, got {self.desirable} and {self.undesirable}")
        if self.max_cer < 0:
            faults.append(f"max_cer must not be negative, got {self.max_cer}")
        if self.undesirable_cer is not None and self.undesirable_cer < self.max_cer:
            faults.append(f"undesirable_cer must be at least max_cer, got {self.undesirable_cer} and {self.max_cer}")
        if not self.min_margin >= 0:
            faults.append(f"min_margin must not be negative, got {self.min_margin}")
        if self.outside == "undesirable" and not self._bounded:
            faults.append("outside has no effect without a bound of length or of a measure; leave it out")
        if self.keep == "all" and (self.desirable, self.undesirable) != (1, 1):
            faults.append("desirable and undesirable have no effect with keep: all; leave them out")
        if faults:
            raise ValueError("; ".join(faults))

    def side(self, candidate: Candidate) -> bool | None:
        """Whether a candidate is desirable, undesirable (``False``), or neither.

        Raises:
            ValueError: a measure is asked for that the candidate has not.
        """
        verdict = candidate.verdict
        if verdict is None or verdict.reading is Reading.ABSTAINED or abs(verdict.margin) < self.min_margin:
            return None
        if verdict.reading is Reading.WRONG:
            return False
        if not candidate.finished:
            return _otherwise(self.unfinished or self.neither)
        if verdict.reading is Reading.NEITHER:
            return _otherwise(self.neither)
        if verdict.cer <= self.max_cer:
            return True if self._inside(candidate) else _otherwise(self.outside)
        if self.undesirable_cer is not None:
            return False if verdict.cer >= self.undesirable_cer else None
        return False if verdict.reading is Reading.UNMARKED else None

    @property
    def _bounded(self) -> bool:
        lengths = (self.min_tokens_per_character, self.max_tokens_per_character)
        return bool(self.min_measures or self.max_measures) or lengths != (None, None)

    def _inside(self, candidate: Candidate) -> bool:
        """Whether length and measures lie within their bounds."""
        pace = len(candidate.speech) / max(1, len(normalise(candidate.prompt.text)))
        low, high = self.min_tokens_per_character, self.max_tokens_per_character
        if (low is not None and pace < low) or (high is not None and pace > high):
            return False
        if missing := [name for name in (*self.min_measures, *self.max_measures) if name not in candidate.measures]:
            known = ", ".join(sorted(candidate.measures)) or "none"
            raise ValueError(
                f"rule: candidate {candidate.id!r} has no measure {missing[0]!r}, only {known}: pass --measures with "
                "what `tts-align score` wrote of the recordings, or --reward with a reward model of the attribute"
            )
        above = all(candidate.measures[name] >= least for name, least in self.min_measures.items())
        return above and all(candidate.measures[name] <= most for name, most in self.max_measures.items())


def _otherwise(choice: Otherwise) -> bool | None:
    return False if choice == "undesirable" else None


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


def with_measures(candidates: Sequence[Candidate], path: Path) -> list[Candidate]:
    """Candidates with the numbers that were measured of their recordings.

    Args:
        candidates: in any order.
        path: folder with ``utterances.jsonl``, or a JSONL file; rows are found by the name of the candidate, or of its
            recording.

    Raises:
        ValueError: no row is of any candidate, two rows are of one, or a measure is no finite number.
    """
    file = path / "utterances.jsonl" if path.is_dir() else path
    found: dict[str, dict[str, float]] = {}
    for number, row in read_json_lines(file):
        faults = list(wrong_types(row, {"id": (str,)}))
        if (numbers := row.get("measures")) is not None and not are_numbers(numbers):
            faults.append(f"measures: expected a finite number for each name, got {numbers!r:.60}")
        if faults:
            raise ValueError(f"{file}:{number}: {'; '.join(faults)}")
        name = row.get("id", "")
        if name in found:
            raise ValueError(f"{file}:{number}: measures of {name!r} appear twice: score one system at a time")
        found[name] = numbers or {}
    named = [found.get(one.id, found.get(file_name(one.id))) for one in candidates]
    if not any(named):
        raise ValueError(f"{file}: holds no measures of these candidates, such as {candidates[0].id!r}")
    if missing := [one.id for one, numbers in zip(candidates, named, strict=True) if numbers is None]:
        print(f"{'measures':12}none of {len(missing)} of {len(candidates)} candidates, {missing[0]} first", flush=True)
    return [
        replace(one, measures={**one.measures, **(numbers or {})})
        for one, numbers in zip(candidates, named, strict=True)
    ]


def with_attributes(candidates: Sequence[Candidate], directory: Path) -> list[Candidate]:
    """Candidates with what a reward model says of their attributes among their measures."""
    found = measured_attributes({one.id: one.speech for one in candidates}, directory)
    return [replace(one, measures={**one.measures, **found[one.id]}) for one in candidates]


def label(
    judged: str | Path,
    out: Path,
    rule: LabelRule | None = None,
    measures: Path | None = None,
    reward: Path | None = None,
    judge_accuracy: Path | None = None,
    min_judge_accuracy: float = 0.8,
    desirable_stars: float | None = None,
) -> LabelCounts:
    """Label judged candidates by a rule, write the manifest, and print how many rows and pairs there are.

    A line with a ``label`` that a person added (true or false, 1 or 0, up or down, good or bad, or stars) keeps it.

    Args:
        judged: JSONL file that ``judge`` wrote, or ``sample`` if people labelled it.
        out: manifest to write, .jsonl or .parquet.
        rule: which candidates become rows.
        measures: numbers of the recordings for the rule: a folder that `tts-align score` wrote, or a JSONL file with
            columns ``id`` and ``measures``.
        reward: directory of a reward model, such as runs/NAME/reward/model; what it says of each candidate's attributes
            counts as measures: {manner.lively: 0.5} for a class or event, {quality: 4} for a score or number.
        judge_accuracy: file that `tts-align judge --calibrate` wrote; by default what ``judge`` laid beside its file.
        min_judge_accuracy: lowest accuracy of the judge itself, where it was measured, at which readings are labelled.
        desirable_stars: number of stars from which on a row is desirable, where people gave 1 to 5 stars.

    Raises:
        UnreliableJudgeError: the judge tells readings apart less often than it must.
    """
    rule = rule or LabelRule()
    check_not_source(out, resolve(judged), *(one for one in (measures, reward, judge_accuracy) if one is not None))
    remove_leftovers(Path(out).parent)
    candidates = read_candidates(judged, desirable_stars)
    if not any(one.verdict or one.error or one.label is not None for one in candidates):
        raise ValueError(f"{judged}: no candidate was judged yet: run `tts-align judge` first")
    if measures is not None:
        candidates = with_measures(candidates, measures)
    if reward is not None:
        candidates = with_attributes(candidates, reward)
    heard = [one.verdict.reading for one in candidates if one.verdict is not None and one.label is None]
    if Reading.RIGHT in heard or Reading.WRONG in heard:
        known = read_calibration(judge_accuracy or accuracy_of(Path(judged)))
        check_reliable(known, min_judge_accuracy, f"{judged}: no labels are made")
        print(f"{'judge':12}{known or 'its own accuracy was never measured: tts-align judge --calibrate'}", flush=True)
    labelled = choose(candidates, rule)
    counts = count(candidates, labelled)
    print(counts, flush=True)
    if not labelled:
        raise ValueError(
            f"{judged}: the rule keeps no row: raise max_cer, ask less of measures, or count neither as undesirable"
        )
    start, end = resolve(judged).parent, Path(out).parent
    rows: list[Row] = [row for one, desirable in labelled for row in one.moved(start, end).to_rows(desirable)]
    write_manifest(rows, out)
    return counts
