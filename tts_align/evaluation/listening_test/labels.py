# SPDX-License-Identifier: Apache-2.0
"""Desirable and undesirable rows from what listeners said."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tts_align.data.records import Row
from tts_align.evaluation.listening_test.answers import Sheet
from tts_align.evaluation.listening_test.records import SAME, Key, Kind, ListeningTestError, Recording
from tts_align.evaluation.listening_test.results import counted, heard


@dataclass(frozen=True)
class HumanRule:
    """Which recordings become rows.

    Every kind of question votes in its own way. The right reading is a vote for the recording and any other a vote
    against it; unclear is none. Of two recordings the better one gets a vote for it, the other one a vote against it. A
    naturalness of ``good`` or more is a vote for, of ``bad`` or less against. Checks, repeated questions and ABX give
    no votes.

    Args:
        kinds: questions whose answers label: any of reading, ab, cmos, nmos; by default the first of these that the
            test asks, because what sounds natural may still be misread.
        min_listeners: lowest number of listeners that voted on a recording.
        agreement: lowest share of the votes that decide its label.
        good: lowest naturalness that is a vote for.
        bad: highest naturalness that is a vote against.
    """

    kinds: tuple[Kind, ...] = ()
    min_listeners: int = 1
    agreement: float = 0.6
    good: int = 4
    bad: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        faults = []
        if self.min_listeners < 1:
            faults.append(f"rule.min_listeners must be at least 1, got {self.min_listeners}")
        if not 0.5 < self.agreement <= 1:
            faults.append(f"rule.agreement must be more than 0.5 and at most 1, got {self.agreement:g}")
        if not 1 <= self.bad < self.good <= 5:
            faults.append(f"rule.bad must be less than rule.good, both from 1 to 5, got {self.bad} and {self.good}")
        if "abx" in self.kinds:
            faults.append("rule.kinds: abx says whether two recordings differ, not which is better")
        if faults:
            raise ListeningTestError("; ".join(faults))


_LABELLING: tuple[Kind, ...] = ("reading", "ab", "cmos", "nmos")


@dataclass(frozen=True)
class LabelledRows:
    """Rows, and what became of the recordings that are none.

    Args:
        rows: with labels.
        undecided: recordings whose votes do not agree.
        unheard: recordings that too few listeners voted on.
    """

    rows: tuple[Row, ...]
    undecided: int
    unheard: int


def label(sheets: Sequence[Sheet], key: Key, rule: HumanRule, start: Path) -> LabelledRows:
    """Turn answers into rows.

    Args:
        sheets: of the listeners that count.
        key: of the test.
        rule: what a label needs.
        start: folder of the manifest, which the paths of recordings start from.

    Raises:
        ListeningTestError: the test does not ask what labels need.
    """
    kinds = rule.kinds or next(((kind,) for kind in _LABELLING if kind in key.kinds), ())
    if missing := [kind for kind in kinds if kind not in key.kinds]:
        raise ListeningTestError(f"this test does not ask {missing[0]}, only {', '.join(key.kinds)}")
    if not kinds:
        raise ListeningTestError(f"answers to {', '.join(key.kinds)} say of no recording whether it is good")
    votes = _votes(sheets, key, kinds, rule)
    rows: list[Row] = []
    undecided = unheard = 0
    for clip in sorted(votes):
        listeners = {listener for listener, _ in votes[clip]}
        share = sum(vote for _, vote in votes[clip]) / len(votes[clip])
        recording = key.clips[clip].recording
        assert recording is not None
        if len(listeners) < rule.min_listeners:
            unheard += 1
        elif max(share, 1 - share) < rule.agreement:
            undecided += 1
        else:
            rows.append(_row(recording, key, kinds, share, len(listeners), start))
    return LabelledRows(tuple(rows), undecided, unheard)


def _votes(
    sheets: Sequence[Sheet], key: Key, kinds: Sequence[Kind], rule: HumanRule
) -> dict[str, list[tuple[str, bool]]]:
    """Votes for (``True``) and against each clip, with who gave them."""
    votes: defaultdict[str, list[tuple[str, bool]]] = defaultdict(list)
    for kind in kinds:
        for listener, answer in counted(sheets, key, kind):
            first = answer.clips[0]
            if kind == "reading":
                said = heard(answer, key)
                if said != "unclear":
                    votes[first].append((listener, said == "right"))
            elif kind == "nmos":
                if not rule.bad < int(answer.value) < rule.good:
                    votes[first].append((listener, int(answer.value) >= rule.good))
            elif answer.value not in (SAME, 0):
                one, other = key.trials[answer.trial].clips
                better = answer.value if kind == "ab" else (other if int(answer.value) > 0 else one)
                votes[one].append((listener, better == one))
                votes[other].append((listener, better == other))
    return votes


def _row(recording: Recording, key: Key, kinds: Sequence[Kind], share: float, listeners: int, start: Path) -> Row:
    """A row of a manifest that says where its label comes from."""
    several = len(key.systems) > 1
    return Row(
        id=f"{recording.id}-{recording.system}" if several else recording.id,
        text=recording.text,
        language=recording.language,
        speaker=recording.speaker,
        speech=recording.speech,
        audio=Path(os.path.relpath(recording.audio, start)).as_posix(),
        desirable=share > 0.5,
        spans=recording.spans,
        instruct=recording.instruct,
        transcript=recording.transcript,
        scores={"votes_for": share, "listeners": float(listeners)},
        notes={
            "sentence": recording.sentence,
            "system": recording.system,
            "labelled_by": f"listening test {key.test}",
            "question": " and ".join(kinds),
        },
    )
