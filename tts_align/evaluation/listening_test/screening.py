# SPDX-License-Identifier: Apache-2.0
"""Which listeners count, by rules that are stated before anybody listens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tts_align.evaluation.listening_test.answers import Answer, Sheet
from tts_align.evaluation.listening_test.records import Key, ListeningTestError

_ALIKE = 1
"""Two ratings of one question that differ by no more are alike."""


@dataclass(frozen=True)
class Rules:
    """Rules that a listener must meet to count.

    Args:
        min_checks: lowest share of the questions with a known answer that were answered rightly; 0 for no such rule.
        min_consistency: lowest share of the repeated questions that were answered alike both times: the same choice, or
            ratings that differ by 1 at most; 0 for no such rule.
        min_answered: lowest share of the questions that were answered.
        headphones: whether to count only those who said that they used headphones.
        native: whether to count only those who said that the language is their first.
    """

    min_checks: float = 1.0
    min_consistency: float = 0.5
    min_answered: float = 1.0
    headphones: bool = False
    native: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        shares = {name: getattr(self, name) for name in ("min_checks", "min_consistency", "min_answered")}
        if wrong := [
            f"rules.{name} must lie in 0..1, got {value:g}" for name, value in shares.items() if not 0 <= value <= 1
        ]:
            raise ListeningTestError("; ".join(wrong))


@dataclass(frozen=True)
class Screened:
    """One listener, and whether she counts.

    Args:
        listener: name or number.
        answered: questions that were answered, repeated ones too.
        asked: questions that there are for one listener.
        checks_right: questions with a known answer that were answered rightly.
        checks: how many of them were answered.
        alike: repeated questions that were answered alike.
        repeats: how many of them were answered.
        reason: why she does not count; empty if she does.
    """

    listener: str
    answered: int
    asked: int
    checks_right: int
    checks: int
    alike: int
    repeats: int
    reason: str = ""


def is_check(key: Key, trial: str) -> bool:
    """Whether the answer to a question is known."""
    return any(key.clips[clip].check for clip in key.trials[trial].clips)


def questions(key: Key, latin: bool) -> int:
    """How many questions one listener gets, repeated ones too.

    Args:
        key: of the test.
        latin: whether each listener hears each sentence once only.
    """
    count = 0
    for kind in key.kinds:
        trials = [one for one in key.trials.values() if one.kind == kind and not one.training]
        mine = len({one.group for one in trials}) if latin else len(trials)
        count += mine + min(key.repeats, mine // 2)
    return count


def screen(sheets: Sequence[Sheet], key: Key, rules: Rules) -> list[Screened]:
    """Hold every listener against the rules."""
    return [_screened(sheet, key, rules) for sheet in sheets]


def _screened(sheet: Sheet, key: Key, rules: Rules) -> Screened:
    first = {one.trial: one for one in sheet.answers if not one.repeat}
    checks = [_is_right(one, key) for one in first.values() if is_check(key, one.trial)]
    twice = [_alike(first[one.trial], one) for one in sheet.answers if one.repeat and one.trial in first]
    asked = questions(key, key.design == "latin")
    found = Screened(sheet.listener, len(sheet.answers), asked, sum(checks), len(checks), sum(twice), len(twice))
    return Screened(**{**vars(found), "reason": _reason(found, sheet, rules)})


def _reason(found: Screened, sheet: Sheet, rules: Rules) -> str:
    if found.answered < rules.min_answered * found.asked:
        return f"answered {found.answered} of {found.asked} questions"
    if found.checks_right < rules.min_checks * found.checks:
        return f"{found.checks_right} of {found.checks} checks right"
    if found.alike < rules.min_consistency * found.repeats:
        return f"{found.alike} of {found.repeats} repeated questions answered alike"
    for rule in ("headphones", "native"):
        if getattr(rules, rule) and sheet.about.get(rule) != "yes":
            return f"{rule}: {sheet.about.get(rule) or 'not said'}"
    return ""


def _is_right(answer: Answer, key: Key) -> bool:
    if answer.kind == "abx":
        return answer.value == answer.x
    if answer.kind == "cmos":  # the first clip of the key is the good one
        return int(answer.value) < 0
    return str(answer.value) in key.trials[answer.trial].expected


def _alike(first: Answer, second: Answer) -> bool:
    if isinstance(first.value, int) and isinstance(second.value, int):
        return abs(first.value - second.value) <= _ALIKE
    if first.kind == "abx":  # the third clip may be another one the second time
        return (first.value == first.x) == (second.value == second.x)
    return first.value == second.value
