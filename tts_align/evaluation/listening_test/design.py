# SPDX-License-Identifier: Apache-2.0
"""Which questions a listening test asks, of which clips, under which names."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from tts_align.evaluation.listening_test import sound
from tts_align.evaluation.listening_test.records import (
    KINDS,
    PAIRED,
    Clip,
    Design,
    Key,
    Kind,
    ListeningTestError,
    Recording,
    Trial,
)
from tts_align.evaluation.listening_test.sources import Found
from tts_align.utils.audio import load_audio
from tts_align.utils.shards import digest

_TONES = (2, 3, 4)


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Args:
        kinds: questions, in this order: nmos (naturalness from 1 to 5), cmos (the second is better or worse, -3 to 3),
            ab (which is better), abx (which of two is the third), reading (which reading of the marked word was heard).
        sentences: utterances to ask about, evenly spread; all by default.
        design: full (every listener answers everything) or latin (every listener hears each sentence once, by another
            system or pair than the listener before).
        checks: questions of each kind with a known answer: who misses them did not listen.
        repeats: questions of each kind that every listener gets twice: who answers them differently is guessing.
        training: questions of each kind before the first that counts.
        title: heading above the test.
        language: language of the page (en, zh or ja); that of the browser by default, and listeners may change it.
        show_text: whether to show what should be said; the question for a reading always does.
        sample_rate: rate of all clips in Hz; by default the highest of the recordings.
        loudness_lufs: loudness of all clips, by ITU-R BS.1770; less if a clip would be cut.
        seed: seed of names, checks and the order of systems.
    """

    kinds: tuple[Kind, ...] = ("nmos",)
    sentences: int | None = None
    design: Design = "full"
    checks: int = 2
    repeats: int = 2
    training: int = 1
    title: str = ""
    language: Literal["", "en", "zh", "ja"] = ""
    show_text: bool = True
    sample_rate: int | None = None
    loudness_lufs: float = sound.LOUDNESS_LUFS
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work; every fault is named."""
        faults = []
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or set(self.kinds) - set(KINDS):
            faults.append(f"kinds must be different ones of {', '.join(KINDS)}, got {', '.join(self.kinds) or 'none'}")
        if self.design not in get_args(Design):
            faults.append(f"design must be one of {', '.join(get_args(Design))}, got {self.design!r}")
        if self.sentences is not None and self.sentences < 1:
            faults.append(f"sentences must be at least 1, got {self.sentences}")
        if min(self.checks, self.repeats, self.training) < 0:
            faults.append("checks, repeats and training must not be negative")
        if self.sample_rate is not None and self.sample_rate < 8000:
            faults.append(f"sample_rate must be at least 8000, got {self.sample_rate}")
        if not -60 <= self.loudness_lufs <= -10:
            faults.append(f"loudness_lufs must lie in -60..-10, got {self.loudness_lufs:g}")
        if faults:
            raise ListeningTestError("; ".join(faults))


@dataclass
class Drawn:
    """A listening test as it is put together.

    Args:
        key: what listeners must not know.
        sounds: every clip of the key, ready to be heard.
    """

    key: Key
    sounds: Mapping[str, Float[Tensor, " time"]] = field(repr=False)


def draw(found: Found, plan: Plan) -> Drawn:
    """Choose the utterances, ask every question about them, and give everything a name that reveals nothing.

    Raises:
        ListeningTestError: there is nothing to ask.
        AudioError: a recording cannot be used.
    """
    trials: list[Trial] = []
    maker = _Clips(found, plan)
    for kind in plan.kinds:
        chosen, taught = _chosen(found, plan, kind)
        trials += [trial for group, name in enumerate(chosen) for trial in _questions(found, maker, kind, group, name)]
        trials += maker.checks(kind, chosen)
        lessons = [next(_questions(found, maker, kind, group, name)) for group, name in enumerate(taught)]
        trials += [Trial(**{**vars(one), "training": True}) for one in lessons]
    return maker.finished(trials)


def _chosen(found: Found, plan: Plan, kind: Kind) -> tuple[list[str], list[str]]:
    """Utterances to ask about, and those to teach with, which are others where there are enough."""
    if kind in PAIRED and len(found.systems) < 2:
        raise ListeningTestError(f"{kind} compares systems: name a second one")
    names = found.common()
    if kind == "reading":
        names = [name for name in names if any(rows[name].choices for rows in found.systems.values())]
    if not names:
        what = "with a marked word: name a file of sentences with spans (--sentences)" if kind == "reading" else ""
        raise ListeningTestError(f"{kind}: no utterance that every system has {what}".rstrip())
    chosen = _spread(names, plan.sentences)
    rest = [name for name in names if name not in set(chosen)]
    return chosen, (rest or chosen)[: plan.training]


def _spread(names: list[str], count: int | None) -> list[str]:
    """``count`` names, from the first to the last.

    >>> _spread(["a", "b", "c", "d", "e"], 3)
    ['a', 'c', 'e']
    """
    if count is None or count >= len(names):
        return names
    return [names[place * (len(names) - 1) // max(1, count - 1)] for place in range(count)]


def _questions(found: Found, maker: _Clips, kind: Kind, group: int, name: str) -> Iterator[Trial]:
    """The questions of one kind about one utterance."""
    rows = {system: recordings[name] for system, recordings in found.systems.items()}
    if kind in PAIRED:
        for pair in combinations(rows.values(), 2):
            yield Trial(kind, tuple(maker.of(one) for one in pair), group)
        return
    marked = next((one for one in rows.values() if one.choices), None)
    for recording in rows.values():
        asked = kind == "reading" and marked is not None
        choices, right = (marked.choices, marked.spans[0].right) if asked and marked else ((), ())
        yield Trial(kind, (maker.of(recording),), group, tuple(dict.fromkeys(choices)), right)


class _Clips:
    """Every clip once, under a name of its own."""

    def __init__(self, found: Found, plan: Plan) -> None:
        self.plan, self.systems = plan, tuple(found.systems)
        self.first = {name: rows for name, rows in next(iter(found.systems.values())).items()}
        self.made: dict[tuple[object, ...], str] = {}
        self.recordings: dict[str, Recording | None] = {}
        self.sounds: dict[str, Tensor] = {}
        self.rate = plan.sample_rate or _highest_rate(found)
        self.bad: set[str] = set()

    def of(self, recording: Recording) -> str:
        """Name of the clip of a recording."""
        return self._add(("recording", recording.system, recording.id), recording)

    def _add(self, identity: tuple[object, ...], recording: Recording | None, made: Tensor | None = None) -> str:
        if identity not in self.made:
            name = f"clip {len(self.made)}"
            self.made[identity] = name
            self.recordings[name] = recording
            if made is None:
                assert recording is not None
                made = load_audio(recording.audio, self.rate, silent=True)
            self.sounds[name] = made
        return self.made[identity]

    def checks(self, kind: Kind, chosen: Sequence[str]) -> list[Trial]:
        """Questions with a known answer; speech is made bad enough to be heard by everybody."""
        trials = []
        for number in range(self.plan.checks):
            group = len(chosen) + number
            if kind == "reading":
                count = _TONES[number % len(_TONES)]
                clip = self._add(("tones", count), None, sound.tones(count, self.rate))
                self.bad.add(clip)
                choices = tuple(map(str, _TONES))
                trials.append(Trial(kind, (clip,), group, choices, (), (str(choices.index(str(count))),)))
                continue
            row = self.first[chosen[number % len(chosen)]]
            good = self.of(row)
            bad = self._add(("bad", kind, number), row, sound.degraded(self.sounds[good], self.plan.seed + number))
            self.bad.add(bad)
            if kind == "nmos":
                trials.append(Trial(kind, (bad,), group, expected=("1", "2")))
            else:
                trials.append(Trial(kind, (good, bad), group, expected=() if kind == "abx" else (good,)))
        return trials

    def finished(self, trials: Sequence[Trial]) -> Drawn:
        """Equal loudness, and names in an order that reveals nothing."""
        rate, shuffle = self.rate, random.Random(self.plan.seed)
        levels = {name: sound.loudness(one, rate) for name, one in self.sounds.items()}
        peaks = [float(one.abs().max()) for one in self.sounds.values()]
        level = sound.common_loudness(list(levels.values()), peaks, self.plan.loudness_lufs)
        gains = {name: level - own if math.isfinite(own) else 0.0 for name, own in levels.items()}
        order = list(self.sounds)
        shuffle.shuffle(order)
        clip_names = {name: f"c{number:03}" for number, name in enumerate(order, start=1)}
        trials = list(trials)
        shuffle.shuffle(trials)
        trials.sort(key=lambda trial: (self.plan.kinds.index(trial.kind), not trial.training))
        named = {
            f"t{number:03}": Trial(**{**vars(trial), **_renamed(trial, clip_names)})
            for number, trial in enumerate(trials, start=1)
        }
        clips = {clip_names[name]: Clip(self.recordings[name], gains[name], name in self.bad) for name in order}
        sounds = {clip_names[name]: self.sounds[name] * 10 ** (gains[name] / 20) for name in order}
        what = [(name, one.sum().item(), len(one)) for name, one in sounds.items()]
        key = Key(
            test=digest("listening test", self.plan, self.systems, what, sorted(map(repr, named.items()))),
            title=self.plan.title,
            systems=self.systems,
            kinds=self.plan.kinds,
            design=self.plan.design,
            sample_rate=rate,
            loudness_lufs=round(level, 2),
            repeats=self.plan.repeats,
            clips=clips,
            trials=named,
        )
        return Drawn(key, sounds)


def _renamed(trial: Trial, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {part: tuple(names.get(one, one) for one in getattr(trial, part)) for part in ("clips", "expected")}


def _highest_rate(found: Found) -> int:
    import soundfile

    files = {recording.audio for rows in found.systems.values() for recording in rows.values()}
    return max(8000, *(soundfile.info(str(path)).samplerate for path in sorted(files)))
