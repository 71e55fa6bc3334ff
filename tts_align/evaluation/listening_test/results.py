# SPDX-License-Identifier: Apache-2.0
"""Numbers of a listening test: means with intervals over listeners and sentences, and exact tests."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, Literal

from tts_align.evaluation.listening_test.answers import Answer, Sheet
from tts_align.evaluation.listening_test.records import OTHER, SAME, UNCLEAR, Key, Kind
from tts_align.evaluation.listening_test.screening import is_check
from tts_align.evaluation.statistics.intervals import RESAMPLES, Interval, two_way_bootstrap, wilson
from tts_align.evaluation.statistics.significance import binomial, holm, mcnemar, wilcoxon

Ties = Literal["split", "drop"]
HeardReading = Literal["right", "wrong", "other", "unclear"]
HEARD: tuple[HeardReading, ...] = ("right", "wrong", "other", "unclear")
Table = dict[str, dict[str, Any]]
Answers = list[tuple[str, Answer]]
"""Who answered, and what."""


@dataclass(frozen=True)
class Rating:
    """One answer as a number.

    Args:
        listener: who gave it.
        item: utterance it is about.
        value: the number.
    """

    listener: str
    item: str
    value: float


def heard(answer: Answer, key: Key) -> HeardReading:
    """What a listener heard of the marked word."""
    trial = key.trials[answer.trial]
    if answer.value in (OTHER, UNCLEAR):
        return "other" if answer.value == OTHER else "unclear"
    return "right" if trial.choices[int(answer.value)] in trial.right else "wrong"


def counted(sheets: Iterable[Sheet], key: Key, kind: Kind) -> Answers:
    """Listener and answer of every question of one kind that says something about a system: the first answers to it."""
    return [
        (sheet.listener, answer)
        for sheet in sheets
        for answer in sheet.of(kind)
        if not answer.repeat and not is_check(key, answer.trial)
    ]


def summarise(sheets: Sequence[Sheet], key: Key, ties: Ties = "split", resamples: int = RESAMPLES) -> dict[str, Any]:
    """Tables of every kind of question.

    Args:
        sheets: of the listeners that count.
        key: of the test.
        ties: what becomes of "no difference": half a vote for each side, or none.
        resamples: of the bootstrap over listeners and sentences.
    """
    tables: dict[Kind, Callable[[Answers, Key, int], Table]] = {
        "nmos": _nmos,
        "cmos": _cmos,
        "ab": partial(_ab, ties=ties),
        "abx": _abx,
        "reading": _reading,
    }
    found: dict[str, Any] = {kind: tables[kind](counted(sheets, key, kind), key, resamples) for kind in key.kinds}
    if "reading" in key.kinds:
        found["reading"]["judge"] = judge_agreement(sheets, key)
    return found


def _interval(ratings: Sequence[Rating], resamples: int) -> dict[str, Any]:
    """Mean and 95 % interval over listeners and sentences."""
    values = [one.value for one in ratings]
    found = two_way_bootstrap(values, [one.listener for one in ratings], [one.item for one in ratings], resamples)
    return _plain(found) | {
        "listeners": len({one.listener for one in ratings}),
        "sentences": len({one.item for one in ratings}),
    }


def _plain(interval: Interval) -> dict[str, Any]:
    numbers = {name: getattr(interval, name) for name in ("value", "low", "high")}
    return {name: None if math.isnan(value) else value for name, value in numbers.items()} | {"n": interval.n}


def item_means(ratings: Iterable[Rating]) -> dict[str, float]:
    """Mean over listeners of each utterance."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for one in ratings:
        values[one.item].append(one.value)
    return {item: sum(some) / len(some) for item, some in sorted(values.items())}


def _with_holm(pairs: dict[str, Any]) -> dict[str, Any]:
    """The p-values of all pairs, adjusted for their number."""
    adjusted = holm({name: one["p_value"] for name, one in pairs.items()})
    return {name: one | {"p_holm": adjusted[name]} for name, one in pairs.items()}


def _by_system(answers: Answers, key: Key, number: Callable[[Answer], float]) -> dict[str, list[Rating]]:
    found: dict[str, list[Rating]] = {system: [] for system in key.systems}
    for listener, answer in answers:
        clip = key.trials[answer.trial].clips[0]
        found[key.system(clip)].append(Rating(listener, key.item(answer.trial), number(answer)))
    return found


def _by_pair(answers: Answers, key: Key, number: Callable[[Answer], float]) -> dict[str, list[Rating]]:
    found: dict[str, list[Rating]] = {}
    for listener, answer in answers:
        first, second = (key.system(clip) for clip in key.trials[answer.trial].clips)
        rating = Rating(listener, key.item(answer.trial), number(answer))
        found.setdefault(f"{first} | {second}", []).append(rating)
    return found


def _nmos(answers: Answers, key: Key, resamples: int) -> Table:
    systems = _by_system(answers, key, lambda one: float(one.value))
    means = {system: item_means(ratings) for system, ratings in systems.items()}
    pairs = {}
    for first, second in combinations(key.systems, 2):
        both = sorted(means[first].keys() & means[second].keys())
        differences = [means[second][item] - means[first][item] for item in both]
        tested = wilcoxon(differences)
        mean = sum(differences) / len(differences) if differences else None
        pairs[f"{first} | {second}"] = {"difference": mean, "sentences": len(both), "p_value": tested.p_value}
    return {"systems": {name: _interval(some, resamples) for name, some in systems.items()}, "pairs": _with_holm(pairs)}


def _cmos(answers: Answers, key: Key, resamples: int) -> Table:
    pairs = _by_pair(answers, key, lambda one: float(one.value))
    return {
        "pairs": _with_holm(
            {
                name: _interval(some, resamples) | {"p_value": wilcoxon(list(item_means(some).values())).p_value}
                for name, some in pairs.items()
            }
        )
    }


def _ab(answers: Answers, key: Key, resamples: int, ties: Ties = "split") -> Table:
    def vote(answer: Answer) -> float:
        return 0.5 if answer.value == SAME else float(answer.value == key.trials[answer.trial].clips[0])

    found = {}
    for name, votes in _by_pair(answers, key, vote).items():
        first, same = sum(one.value == 1 for one in votes), sum(one.value == 0.5 for one in votes)
        shown = votes if ties == "split" else [one for one in votes if one.value != 0.5]
        counts = {"first": first, "same": same, "second": len(votes) - first - same}
        halves = same // 2 if ties == "split" else 0
        found[name] = counts | _preference(shown, first + halves, counts["second"] + halves, resamples)
    return {"pairs": _with_holm(found)}


def _abx(answers: Answers, key: Key, resamples: int) -> Table:
    found = {}
    for name, votes in _by_pair(answers, key, lambda one: float(one.value == one.x)).items():
        right = int(sum(one.value for one in votes))
        found[name] = {"right": right} | _preference(votes, right, len(votes) - right, resamples)
    return {"pairs": _with_holm(found)}


def _preference(votes: Sequence[Rating], first: int, second: int, resamples: int) -> dict[str, Any]:
    """A share of votes: its interval over listeners and sentences, and exact tests against one half.

    The p-value of votes takes them as independent, which votes of one listener or on one sentence are not; that of
    sentences, which is the one to report, gives each sentence the side that most of its votes are on.
    """
    sides = [math.copysign(1, mean - 0.5) for mean in item_means(votes).values() if mean != 0.5]
    return _interval(votes, resamples) | {
        "p_votes": binomial(first, first + second),
        "p_value": binomial(sides.count(1), len(sides)),
    }


def _reading(answers: Answers, key: Key, resamples: int) -> Table:
    systems = _by_system(answers, key, lambda one: float(heard(one, key) == "right"))
    counts = {system: dict.fromkeys(HEARD, 0) for system in key.systems}
    for _, answer in answers:
        counts[key.system(answer.clips[0])][heard(answer, key)] += 1
    right = {name: {item: mean > 0.5 for item, mean in item_means(some).items()} for name, some in systems.items()}
    pairs = {}
    for first, second in combinations(key.systems, 2):
        both = sorted(right[first].keys() & right[second].keys())
        changed = mcnemar([right[first][one] for one in both], [right[second][one] for one in both])
        pairs[f"{first} | {second}"] = vars(changed) | {"sentences": len(both)}
    return {
        "systems": {name: counts[name] | _interval(some, resamples) for name, some in systems.items()},
        "pairs": _with_holm(pairs),
    }


def majority(answers: Answers, key: Key) -> dict[str, tuple[HeardReading, float, int]]:
    """What most listeners heard of the marked word of each clip, their share, and how many answered; no ties."""
    votes: defaultdict[str, list[HeardReading]] = defaultdict(list)
    for _, answer in answers:
        votes[answer.clips[0]].append(heard(answer, key))
    found: dict[str, tuple[HeardReading, float, int]] = {}
    for clip, heard_here in votes.items():
        best = max(HEARD, key=heard_here.count)
        share = heard_here.count(best) / len(heard_here)
        if share > 0.5:
            found[clip] = (best, share, len(heard_here))
    return found


def judge_agreement(sheets: Sequence[Sheet], key: Key) -> dict[str, Any]:
    """How often the judge of the recordings heard what most listeners heard: its accuracy, as people see it."""
    agreed = judged = 0
    for clip, (said, *_) in majority(counted(sheets, key, "reading"), key).items():
        recording = key.clips[clip].recording
        if recording is not None and recording.reading in ("right", "wrong"):
            judged += 1
            agreed += said == recording.reading
    return _plain(wilson(agreed, judged))
