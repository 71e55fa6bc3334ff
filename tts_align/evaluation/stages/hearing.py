# SPDX-License-Identifier: Apache-2.0
"""The stages that listen: transcribe, readings, and one for each measure (similarity, then quality)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.faults import attempt
from tts_align.evaluation.judges.base import Judge, Reading, SpeechSample, Verdict
from tts_align.evaluation.listening import SILENCE, Failures
from tts_align.evaluation.measures.base import MeasuredSample, Sound, UtteranceMeasure
from tts_align.evaluation.stages.sound import Sounds, UtteranceSound, read_sound
from tts_align.evaluation.stages.store import Row, StageStore
from tts_align.utils.audio import AudioError
from tts_align.utils.files import file_name
from tts_align.utils.shards import digest


@dataclass(frozen=True)
class Listeners:
    """What listens to every utterance.

    Args:
        judge: transcribes, and tells readings unless another judge does; ``None`` when nobody transcribes.
        readings: tells readings, and writes them as they sound.
        measures: numbers of voice and quality.
        prompts: name of the sentence -> recording of the voice that was asked for.
    """

    judge: Judge | None = None
    readings: Judge | None = None
    measures: Sequence[UtteranceMeasure] = ()
    prompts: Mapping[str, Path] = field(default_factory=dict)

    @property
    def need_audio(self) -> bool:
        """Whether any of them hears sound."""
        return any(one is not None and one.needs_audio for one in (self.judge, self.readings, *self.measures))


class Hearing:
    """The listening stages of one system.

    Args:
        listeners: what listens.
        folder: of all stages.
        system: whose utterances these are.
        made: key of the utterances and of their sound.
        ids: all utterances of the test.
        mine: those of this process.
        rank: number of this process.
        max_failed_share: largest share of this process's utterances on which one of the listeners may fail.
    """

    def __init__(
        self,
        listeners: Listeners,
        folder: Path,
        system: str,
        made: str,
        ids: Sequence[str],
        mine: Sequence[str],
        rank: int,
        max_failed_share: float,
    ) -> None:
        self.listeners, self.system = listeners, system
        self.measures = sorted(listeners.measures, key=lambda one: not one.needs_prompt)
        judges = {"transcribe": listeners.judge, "readings": listeners.readings}
        self.judges = {name: judge for name, judge in judges.items() if judge is not None}
        keys = {name: digest(name, made, judge.identity()) for name, judge in self.judges.items()}
        heard = keys.get("transcribe", "")
        keys["sound"] = digest("sound", made)
        stamps = [(name, _stamp(path)) for name, path in sorted(listeners.prompts.items())]
        for one in self.measures:
            prompts = stamps if one.needs_prompt else ()
            keys[stage_of(one)] = digest("measure", made, heard, one.identity(), prompts)
        self.stores = {
            name: StageStore(folder, file_name(f"{name}-{system}"), key, ids, mine, rank) for name, key in keys.items()
        }
        self.failures = {name: Failures(len(mine), max_failed_share) for name in keys}

    def listen(self, batch: Sequence[Candidate], sounds: Sounds) -> None:
        """Take a batch through every stage that still lacks it."""
        self._check(batch, sounds)
        for name, judge in self.judges.items():
            self._judge(name, judge, batch, sounds)
        for measure in self.measures:
            self._measure(measure, batch, sounds)

    def _check(self, batch: Sequence[Candidate], sounds: Sounds) -> None:
        """Length, and failures that need no model."""
        todo = self._todo("sound", batch)
        answers = attempt(sounds, todo, [one.id for one in todo], self.failures["sound"].split)
        self._keep("sound", todo, answers)

    def _judge(self, name: str, judge: Judge, batch: Sequence[Candidate], sounds: Sounds) -> None:
        todo = self._todo(name, batch)
        silent, spoken = self._divided(todo)
        work = torch.no_grad()(lambda some: _verdicts(judge, some, sounds))
        answers = self._answers(name, work, spoken)
        answers |= {one.id: silence_of(one) for one in silent}
        self._keep(name, todo, [answers[one.id] for one in todo])

    def _measure(self, measure: UtteranceMeasure, batch: Sequence[Candidate], sounds: Sounds) -> None:
        name = stage_of(measure)
        todo = self._todo(name, batch)
        silent, spoken = self._divided(todo)
        if measure.needs_prompt:
            without = [one for one in spoken if one.prompt.id not in self.listeners.prompts]
            silent, spoken = silent + without, [one for one in spoken if one.prompt.id in self.listeners.prompts]
        work = torch.no_grad()(
            lambda some: measure.measure([self._sample(measure, *one) for one in _with(some, sounds)])
        )
        answers = self._answers(name, work, spoken)
        answers |= {one.id: {} for one in silent}
        self._keep(name, todo, [answers[one.id] for one in todo])

    def _answers(
        self, name: str, work: Callable[[Sequence[Candidate]], Sequence[Any]], batch: Sequence[Candidate]
    ) -> dict[str, Any]:
        ids = [one.id for one in batch]
        return dict(zip(ids, attempt(work, batch, ids, self.failures[name].split), strict=True))

    def _sample(self, measure: UtteranceMeasure, candidate: Candidate, heard: UtteranceSound) -> MeasuredSample:
        prompt = self.listeners.prompts.get(candidate.prompt.id) if measure.needs_prompt else None
        transcribed = self.stores["transcribe"].get(candidate.id) if "transcribe" in self.stores else None
        sound = heard.sound or Sound(torch.zeros(0), 0)
        return MeasuredSample(
            waveform=None if heard.sound is None else sound.waveform,
            sample_rate=sound.sample_rate,
            text=candidate.prompt.text,
            speech=torch.tensor(candidate.speech, dtype=torch.long),
            finished=candidate.finished if candidate.speech else None,
            prompt=None if prompt is None else read_sound(prompt),
            transcript=str((transcribed or {}).get("transcript", "")),
            language=candidate.prompt.language,
        )

    def _todo(self, name: str, batch: Sequence[Candidate]) -> list[Candidate]:
        wanted = set(self.stores[name].wanted([one.id for one in batch]))
        return [one for one in batch if one.id in wanted]

    def _divided(self, batch: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
        """Those with nothing to hear, and the others; what has no sound because the vocoder failed is with these."""
        rows = {one.id: self.stores["sound"].get(one.id) or {} for one in batch}
        silent = {name for name, row in rows.items() if not UtteranceSound(None, row.get("failure", "")).is_speech}
        return [one for one in batch if one.id in silent], [one for one in batch if one.id not in silent]

    def _keep(self, name: str, batch: Sequence[Candidate], answers: Sequence[Any]) -> None:
        rows = []
        for one, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                reason = f"{type(answer).__name__}: {answer}"
                self.failures[name].add(one.id, reason)
                rows.append({"id": one.id, "error": reason})
            else:
                rows.append({"id": one.id, **_columns(one, answer)})
        self.stores[name].add(rows)


def stage_of(measure: UtteranceMeasure) -> str:
    """Name of a measure's stage."""
    return f"{'similarity' if measure.needs_prompt else 'quality'}-{measure.name}"


def silence_of(candidate: Candidate) -> Verdict:
    """Verdict on an utterance with nothing to hear: no reading of its marked word, if it has one."""
    return SILENCE if candidate.prompt.right else dataclasses.replace(SILENCE, reading=Reading.UNMARKED)


def _columns(candidate: Candidate, answer: UtteranceSound | Verdict | Mapping[str, float]) -> Row:
    """What is kept of an answer."""
    if isinstance(answer, UtteranceSound):
        sound = answer.sound
        seconds = {} if sound is None else {"seconds": round(len(sound.waveform) / sound.sample_rate, 4)}
        return {**seconds, "failure": answer.failure}
    if isinstance(answer, Verdict):
        row = dataclasses.replace(candidate, speech=(), verdict=answer, error="").to_row()
        names = [one.name for one in dataclasses.fields(Verdict)]
        return {name: row[name] for name in names if name in row}
    return {"measures": {name: float(value) for name, value in answer.items() if value == value}}


def _verdicts(judge: Judge, batch: Sequence[Candidate], sounds: Sounds) -> list[Verdict]:
    heard = sounds(batch) if judge.needs_audio else [UtteranceSound(None)] * len(batch)
    samples = [
        SpeechSample(
            torch.tensor(one.speech, dtype=torch.long),
            None if it.sound is None else it.sound.waveform,
            0 if it.sound is None else it.sound.sample_rate,
            one.speaker,
        )
        for one, it in zip(batch, heard, strict=True)
    ]
    return judge.judge(samples, [one.prompt.expected for one in batch])


def _with(batch: Sequence[Candidate], sounds: Sounds) -> Iterator[tuple[Candidate, UtteranceSound]]:
    return zip(batch, sounds(batch), strict=True)


def _stamp(path: Path) -> tuple[str, int, int]:
    """Changes with the content of a file: its name, size and time."""
    if not path.is_file():
        raise AudioError(str(path), "there is no such recording")
    state = path.stat()
    return path.name, state.st_size, state.st_mtime_ns
